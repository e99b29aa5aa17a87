"""Experts' hidden rows quantized between their two products, routed and shared in one kernel.

Knows neither experts nor products. The first product does the same itself where its CTAs can wait for
each other: quantize_rows is that kernel's second half too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32

from glm_jax.pallas.dispatch import Dispatch

# Rows that a warpgroup quantizes at once, each a warp's.
GROUP = 4
_FP8_MAX = 448.0
_TINY = float(jnp.finfo(jnp.float32).tiny)
_LANES = 32

Quantized = tuple[Float8e4m3fn[Array, "R F"], Float32[Array, "R 1"]]


def quantize_hidden(
    hidden: BFloat16[Array, "R F"],
    shared: BFloat16[Array, "T S"] | None,
    dispatch: Dispatch,
    *,
    interpret: bool = False,
) -> tuple[Quantized, Quantized | None]:
    """Quantizes each row by its own largest magnitude, as fp8.quantize_rows does, to the bit.

    Rows of tiles that are not in use are not read, and nothing is written for them.

    Raises:
      NotImplementedError: F or S is no multiple of 64.
    """
    arrays = [_whole_groups(array) for array in (hidden, shared) if array is not None]
    groups = [array.shape[0] // GROUP for array in arrays]
    outs = plgpu.kernel(
        functools.partial(_body, groups[0], dispatch.tile // GROUP),
        out_type=[out for array in arrays for out in quantized_types(*array.shape)],
        grid=(sum(groups),),
        grid_names=("group",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="quantize_hidden",
    )(dispatch.num_tiles, *arrays)
    routed = as_pair(outs[:2], hidden.shape[0])
    return routed, None if shared is None else as_pair(outs[2:], shared.shape[0])


def quantized_types(num_rows: int, width: int) -> list[jax.ShapeDtypeStruct]:
    """The outputs that quantize_rows writes.

    Raises:
      NotImplementedError: the width is no multiple of 64.
    """
    _layout(width)
    return [
        jax.ShapeDtypeStruct((num_rows, width), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((num_rows,), jnp.float32),
    ]


def as_pair(outs: Any, num_rows: int) -> Quantized:
    """The arrays of quantized_types as products take them, without rows that only fill a group."""
    values, scale = outs
    return values[:num_rows], scale[:num_rows, None]


def quantize_rows(rows_ref: Any, values_ref: Any, scale_ref: Any, group: jax.Array) -> None:
    """Quantizes the GROUP rows of a group, each by its own largest magnitude: a warpgroup's work."""
    part = pl.ds(group * GROUP, GROUP)
    rows = plgpu.load(rows_ref.at[part], layout=_layout(rows_ref.shape[1]), optimized=False)
    rows = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(rows), axis=1)
    scale = jnp.where(largest > _FP8_MAX * _TINY, largest / _FP8_MAX, 1.0)
    scaled = jnp.clip(rows / lax.broadcast_in_dim(scale, rows.shape, (0,)), -_FP8_MAX, _FP8_MAX)
    _store(values_ref.at[part], scaled.astype(jnp.float8_e4m3fn))
    _store(scale_ref.at[part], scale)


def _store(ref: Any, rows: jax.Array) -> None:
    """Stores rows though each warp writes one of its own, which the compiler takes for an oversight."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, rows, optimized=False)
    else:
        # jax before 0.12 does not look, and knows no such word.
        ref[...] = rows


def _layout(width: int) -> Any:
    """A row a warp, each lane with pieces of 4 columns, or of 2."""
    vector = next((size for size in (4, 2) if width % (_LANES * size) == 0), None)
    if vector is None:
        raise NotImplementedError(f"{width=}: rows are of a multiple of 64 columns")
    return plgpu.Layout.TILED(
        plgpu.Tiling(((GROUP, _LANES * vector), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )


def _whole_groups(rows: BFloat16[Array, "R F"]) -> BFloat16[Array, "padded F"]:
    padding = -rows.shape[0] % GROUP
    return jnp.pad(rows, ((0, padding), (0, 0))) if padding else rows


def _body(num_routed: int, groups_per_tile: int, num_tiles_ref: Any, *refs: Any) -> None:
    group = lax.axis_index("group")
    num_sides = len(refs) // 3
    inputs, outs = refs[:num_sides], refs[num_sides:]

    @pl.when((group < num_routed) & (group < num_tiles_ref[0] * groups_per_tile))
    def _():
        quantize_rows(inputs[0], outs[0], outs[1], group)

    if num_sides == 2:

        @pl.when(group >= num_routed)
        def _():
            quantize_rows(inputs[1], outs[2], outs[3], group - num_routed)
