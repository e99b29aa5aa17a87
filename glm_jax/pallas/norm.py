"""Residual add, RMSNorm and quantization to FP8 of each row, in one kernel.

Knows no layer and no other device. One warpgroup holds a row in its registers from the first read to
the last write, so a row's bits depend on nothing but the row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import launch_order
from glm_jax.pallas.chip import Chip

FP8 = jnp.float8_e4m3fn
_FP8_MAX = 448.0
_TINY = float(jnp.finfo(jnp.float32).tiny)
_THREADS = 128


class NormedRows(NamedTuple):
    """What the projections and the router of a sub-layer read.

    Attributes:
      residual: bfloat16[T, D], the rows before the norm, for the next residual add.
      normed: bfloat16[T, D], the rows normed and weighted.
      values: float8_e4m3fn[T, D], normed divided by scale.
      scale: float32[T, 1], each row's largest magnitude / 448, or 1 for a row of zeros.
      place: that of a later layer, if the kernel was to tell it.
    """

    residual: BFloat16[Array, "T D"]
    normed: BFloat16[Array, "T D"]
    values: Float8e4m3fn[Array, "T D"]
    scale: Float32[Array, "T 1"]
    place: Int32[Array, ""] | None = None


def add_norm_quantize(
    x: BFloat16[Array, "T D"],
    added: BFloat16[Array, "T D"] | None,
    weight: BFloat16[Array, "L D"],
    layer: Int32[Array, ""],
    *,
    eps: float,
    chip: Chip,
    shift: int = 0,
    interpret: bool = False,
) -> NormedRows:
    """x + added, its RMSNorm with weight[layer + shift], and the quantized form of that.

    Rounds to bfloat16 where the model does: after the sum, after the norm, after the weight. The GPU
    divides to within 2 units of the last place, so a value on the edge between two FP8 numbers may
    become the other one.

    Raises:
      NotImplementedError: D is no multiple of 128.
    """
    del chip  # a row fits one warpgroup of either
    num_rows, width = x.shape
    check_width(width)

    def add_norm_quantize_kernel(*refs: jax.Ref) -> None:
        row = lax.axis_index("row")
        x_ref, *added_refs, weight_ref, layer_ref = refs[: -len(outputs)]
        residual_ref, normed_ref, values_ref, scale_ref = (None, *refs[-3:])
        total = load_row(x_ref, row)
        if added_refs:
            residual_ref = refs[-len(outputs)]
            total = total + load_row(added_refs[0], row)
            residual_ref[row] = total
        weight_row = load_row(weight_ref, layer_ref[0] + shift)
        store_normed(total, weight_row, eps, row, normed_ref, values_ref, scale_ref)

    outputs = [*normed_types(num_rows, width)]
    if added is not None:
        outputs.insert(0, jax.ShapeDtypeStruct(x.shape, x.dtype))
    operands = [x] if added is None else [x, added]
    *residual, normed, values, scale = launch_order.kernel(
        add_norm_quantize_kernel,
        out_type=outputs,
        grid=(num_rows,),
        grid_names=("row",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands, weight, layer.reshape(1))
    return NormedRows(residual[0] if residual else x, normed, values, scale)


def check_width(width: int) -> None:
    """Refuses rows that a warpgroup cannot hold in equal parts.

    Raises:
      NotImplementedError: width is no multiple of 128.
    """
    if width % _THREADS:
        raise NotImplementedError(f"{width=}: rows are cut into {_THREADS} equal parts")


def normed_types(num_rows: int, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The outputs that store_normed writes."""
    return (
        jax.ShapeDtypeStruct((num_rows, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_rows, width), FP8),
        jax.ShapeDtypeStruct((num_rows, 1), jnp.float32),
    )


def row_layout(width: int) -> Any:
    """How a warpgroup holds a row: each thread pieces of up to 16 bytes of bfloat16."""
    vector = next(size for size in (8, 4, 2, 1) if width % (_THREADS * size) == 0)
    return plgpu.Layout.WG_STRIDED((width,), vec_size=vector)


def load_row(ref: jax.Ref, row: Int32[Array, ""] | int) -> Array:
    """A row in registers, as row_layout says."""
    return plgpu.layout_cast(ref[row], row_layout(ref.shape[-1]))


def store_normed(
    row: BFloat16[Array, " D"],
    weight: BFloat16[Array, " D"],
    eps: float,
    index: Int32[Array, ""],
    normed_ref: jax.Ref,
    values_ref: jax.Ref,
    scale_ref: jax.Ref,
) -> None:
    """Norms a row held by the calling warpgroup, quantizes it and writes all three outputs."""
    wide = row.astype(jnp.float32)
    mean = jnp.sum(wide * wide) / row.shape[0]
    normed = (wide * lax.rsqrt(mean + eps)).astype(jnp.bfloat16) * weight
    normed_ref[index] = normed
    wide = normed.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide))
    # Below the smallest normal number a scale may be flushed to 0; such a row becomes zeros too.
    scale = jnp.where(largest > _FP8_MAX * _TINY, largest / _FP8_MAX, 1.0)
    # A conversion past 448 gives NaN, not the largest value, so the division's rounding is clamped.
    values_ref[index] = jnp.clip(wide / scale, -_FP8_MAX, _FP8_MAX).astype(FP8)
    scale_ref[index, 0] = scale
