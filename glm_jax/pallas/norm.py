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
    layer: Int32[Array, ""] | int,
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

    Args:
      layer: a number that is known here asks for weights that no kernel makes: they are read before
        the kernel ahead has ended.

    Raises:
      NotImplementedError: D is no multiple of 128.
    """
    del chip  # a row fits one warpgroup of either
    num_rows, width = x.shape
    check_width(width)
    known = layer + shift if isinstance(layer, int) else None

    def add_norm_quantize_kernel(*refs: jax.Ref) -> None:
        (weight_ref, *others), outs = refs[: len(operands)], refs[len(operands) :]
        row = lax.axis_index("row")
        weight_row = None if known is None else load_row(weight_ref, known)
        launch_order.wait(interpret=interpret)
        place = others.pop()[0] + shift if known is None else known
        rows = [load_row(ref, row) for ref in others]
        if weight_row is None:
            # After the rows, which need not wait for the place; ahead of what needs them.
            weight_row = load_row(weight_ref, place)
        total = rows[0]
        if added is not None:
            total = total + rows[1]
            outs[0][row] = total
        store_normed(total, weight_row, eps, row, *outs[-3:], interpret=interpret)

    outputs = [*normed_types(num_rows, width)]
    if added is not None:
        outputs.insert(0, jax.ShapeDtypeStruct(x.shape, x.dtype))
    operands = [weight, x] if added is None else [weight, x, added]
    if not isinstance(layer, int):
        operands.append(layer.reshape(1))
    *residual, normed, values, scale = launch_order.kernel(
        add_norm_quantize_kernel,
        out_type=outputs,
        grid=(num_rows,),
        grid_names=("row",),
        # Threads exchange nothing but in reductions, which have barriers of their own.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        waits=False,
        kernel_name="norm_quantize" if added is None else "add_norm_quantize",
    )(*operands)
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
    *,
    interpret: bool,
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
    values_ref[index] = to_fp8(wide, scale, interpret=interpret)
    scale_ref[index, 0] = scale


def to_fp8(rows: Float32[Array, " *shape"], scale: Array, *, interpret: bool) -> Array:
    """rows / scale in FP8, for a scale that is a normal number, at most the largest one / 448.

    A GPU divides by multiplying with an approximate reciprocal, and cuts off what is past 448 as it
    converts. Said so, the bits are the same, and what only other scales need is not compiled.
    """
    if not interpret:
        return (rows * (1.0 / scale)).astype(FP8)
    # Here a conversion past 448 gives NaN, not the largest value.
    return jnp.clip(rows / scale, -_FP8_MAX, _FP8_MAX).astype(FP8)
