"""Experts' hidden rows quantized between their two products, routed and shared in one kernel.

Knows neither experts nor products.
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

_FP8_MAX = 448.0
_TINY = float(jnp.finfo(jnp.float32).tiny)
_WARPGROUP = 128

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
    arrays = [hidden] if shared is None else [hidden, shared]
    for array in arrays:
        if array.shape[1] % (_WARPGROUP // 2):
            raise NotImplementedError(f"{array.shape=}: width must be a multiple of 64")
    lines = [_lines(array) for array in arrays]
    outs = plgpu.kernel(
        functools.partial(_body, [array.shape[1] for array in arrays], dispatch.tile),
        out_type=[
            out
            for array, line in zip(arrays, lines, strict=True)
            for out in (
                jax.ShapeDtypeStruct(line.shape, jnp.float8_e4m3fn),
                jax.ShapeDtypeStruct((line.size // array.shape[1],), jnp.float32),
            )
        ],
        grid=(sum(line.shape[0] for line in lines),),
        grid_names=("line",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="quantize_hidden",
    )(dispatch.num_tiles, *lines)
    pairs = []
    for array, values, scale in zip(arrays, outs[::2], outs[1::2], strict=True):
        num_rows, width = array.shape
        pairs.append((values.reshape(-1, width)[:num_rows], scale[:num_rows, None]))
    return pairs[0], pairs[1] if shared is not None else None


def _lines(rows: BFloat16[Array, "R F"]) -> BFloat16[Array, "lines columns"]:
    """Rows as a warpgroup reads them, by 128 columns: one a line, or two where one ends between."""
    num_rows, width = rows.shape
    if width % _WARPGROUP == 0:
        return rows
    if num_rows % 2:
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    return rows.reshape(-1, 2 * width)


def _body(widths: list[int], tile: int, num_tiles_ref: Any, *refs: Any) -> None:
    line = lax.axis_index("line")
    inputs, outs = refs[: len(widths)], refs[len(widths) :]
    num_lines = inputs[0].shape[0]
    rows_per_line = inputs[0].shape[1] // widths[0]

    @pl.when((line < num_lines) & (line * rows_per_line < num_tiles_ref[0] * tile))
    def _():
        _quantize(widths[0], inputs[0], outs[0], outs[1], line)

    if len(widths) == 2:

        @pl.when(line >= num_lines)
        def _():
            _quantize(widths[1], inputs[1], outs[2], outs[3], line - num_lines)


def _quantize(width: int, lines_ref: Any, values_ref: Any, scale_ref: Any, line: jax.Array) -> None:
    """Quantizes the one row or the two rows of a line."""
    columns = lines_ref.shape[1]
    share = columns // _WARPGROUP
    vector = next(size for size in (8, 4, 2, 1) if share % size == 0)
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=vector)
    values = plgpu.layout_cast(lines_ref[line], layout).astype(jnp.float32)
    magnitudes = jnp.abs(values)
    if columns == width:
        scale = _scale(jnp.max(magnitudes))
        scale_ref[line] = scale
    else:
        index = plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (columns,), 0), layout)
        is_first = index < width
        scales = [
            _scale(jnp.max(jnp.where(is_mine, magnitudes, 0.0)))
            for is_mine in (is_first, index >= width)
        ]
        scale_ref[2 * line], scale_ref[2 * line + 1] = scales
        scale = jnp.where(is_first, *scales)
    scaled = jnp.clip(values / scale, -_FP8_MAX, _FP8_MAX)
    values_ref[line] = scaled.astype(jnp.float8_e4m3fn)


def _scale(largest: jax.Array) -> jax.Array:
    return jnp.where(largest > _FP8_MAX * _TINY, largest / _FP8_MAX, 1.0)
