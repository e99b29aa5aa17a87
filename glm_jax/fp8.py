"""FP8 as the checkpoint uses it: e4m3fn values with a float32 scale per output channel or token.

Knows no layer. real = values * scale; the scheme is compressed-tensors' float-quantized with
per-channel weights and per-token activations quantized at run time.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
_TINY = float(jnp.finfo(jnp.float32).tiny)


def quantize_rows(
    x: Float[Array, "*rows K"],
) -> tuple[Float8e4m3fn[Array, "*rows K"], Float32[Array, "*rows 1"]]:
    """Quantizes each row by its own largest magnitude; a row of zeros stays zeros."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # Below the smallest normal number a scale may be flushed to 0; such a row becomes zeros too.
    scale = jnp.where(largest > FP8_MAX * _TINY, largest / FP8_MAX, 1.0)
    # A conversion past 448 gives NaN, not the largest value, so the division's rounding is clamped.
    return jnp.clip(x / scale, -FP8_MAX, FP8_MAX).astype(FP8), scale
