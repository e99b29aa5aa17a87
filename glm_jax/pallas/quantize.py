"""Experts' hidden rows quantized between their two products, routed and shared in one kernel.

Knows neither experts nor products. In decode the second product does the same itself while its first
weights are under way.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32

from glm_jax.pallas import launch_order
from glm_jax.pallas.dispatch import Dispatch

# Rows that a warpgroup quantizes at once, each a warp's.
GROUP = 4
# The grid is for the most rows that there can be: eight times what one of eight devices is given. So
# many CTAs are running at once on any chip, and none is started for nothing.
_MOST_CTAS = 1024
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
    num_groups = sum(array.shape[0] for array in arrays) // GROUP
    num_ctas = min(num_groups, _MOST_CTAS)

    def body(num_tiles_ref: Any, *refs: Any) -> None:
        inputs, outs = refs[: len(arrays)], refs[len(arrays) :]
        in_use = num_tiles_ref[0] * (dispatch.tile // GROUP)
        cta = lax.axis_index("cta")
        quantize_groups(in_use, inputs, outs, cta, num_ctas, interpret=interpret)

    outs = launch_order.kernel(
        body,
        out_type=[out for array in arrays for out in quantized_types(*array.shape)],
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="quantize_hidden",
    )(dispatch.num_tiles, *arrays)
    routed = as_pair(outs[:2], hidden.shape[0])
    return routed, None if shared is None else as_pair(outs[2:], shared.shape[0])


def quantize_groups(
    in_use: jax.Array,
    rows: Sequence[Any],
    quantized: Sequence[Any],
    first: jax.Array,
    stride: int,
    tell: Callable[[], None] = lambda: None,
    *,
    interpret: bool = False,
) -> None:
    """Quantizes every stride-th group from first on: of routed rows those in use, then of tokens' all.

    Args:
      in_use: groups of routed rows.
      rows: refs of routed rows and, where there are any, of tokens' rows.
      quantized: refs of quantized_types of each.
      tell: called after each group.
    """
    for side, (ref, count) in enumerate(zip(rows, _counts(in_use, rows), strict=True)):

        def visit(number: jax.Array, _: None, first: Any, side: int = side, ref: Any = ref) -> None:
            values, scale = quantized[2 * side], quantized[2 * side + 1]
            quantize_rows(ref, values, scale, first + number * stride, interpret=interpret)
            tell()

        number = lax.div(count - first + stride - 1, jnp.int32(stride))
        lax.fori_loop(0, number, partial(visit, first=first), None)
        first = first + number * stride - count


def num_groups(in_use: jax.Array, rows: Sequence[Any]) -> jax.Array:
    """How many groups there are for quantize_groups."""
    return sum(_counts(in_use, rows), jnp.int32(0))


def _counts(in_use: jax.Array, rows: Sequence[Any]) -> list[Any]:
    """Groups of each side."""
    return [in_use, *(ref.shape[0] // GROUP for ref in rows[1:])]


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


def quantize_rows(
    rows_ref: Any, values_ref: Any, scale_ref: Any, group: jax.Array, *, interpret: bool
) -> None:
    """Quantizes the GROUP rows of a group, each by its own largest magnitude: a warpgroup's work."""
    part = pl.ds(group * GROUP, GROUP)
    rows = plgpu.load(rows_ref.at[part], layout=_layout(rows_ref.shape[1]), optimized=False)
    rows = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(rows), axis=1)
    scale = jnp.where(largest > _FP8_MAX * _TINY, largest / _FP8_MAX, 1.0)
    if interpret:
        # A conversion past 448 gives NaN here, not the largest value.
        wide = lax.broadcast_in_dim(scale, rows.shape, (0,))
        values = jnp.clip(rows / wide, -_FP8_MAX, _FP8_MAX)
    else:
        # As norm.to_fp8.
        values = rows * lax.broadcast_in_dim(1.0 / scale, rows.shape, (0,))
    _store(values_ref.at[part], values.astype(jnp.float8_e4m3fn))
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
