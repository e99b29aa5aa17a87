"""The dense FP8 products' shapes in GLM-4.7 on one of eight devices.

Knows no other kernel.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax import ops
from glm_jax.fp8 import FP8, quantize_rows
from glm_jax.pallas import dense_matmul
from glm_jax.pallas.chip import Chip
from tests.perf import peers
from tests.perf.measure import Case, relative_error
from tests.perf.sizes import Sizes


def fp8_values(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """FP8 values of every magnitude, drawn as bytes: as float32 they would not fit the device."""
    magnitudes = jax.random.bits(key, shape, jnp.uint8)
    # The bytes 0x7f and 0xff are NaN; a cleared exponent bit keeps all below 2.
    return jax.lax.bitcast_convert_type(magnitudes & jnp.uint8(0xBF), FP8)


def fp8_scales(key: jax.Array, shape: tuple[int, ...], width: int) -> jax.Array:
    """Scales of products of so many columns."""
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5) * width**-0.5


def one_error(got: jax.Array, expected: jax.Array) -> dict[str, jax.Array]:
    """Of an answer that is one array."""
    return {"out": relative_error(got, expected)}


def dense_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """q, k and v together; the output projection; gate and up of a dense layer, whose down is as wide."""
    layers, heads = sizes.layers, sizes.query_groups * 128
    shapes = {
        "qkv": (heads + 256, sizes.hidden, sizes.tokens),
        "o": (sizes.hidden, heads, sizes.tokens),
        "gate_up": (2 * sizes.expert_width, sizes.hidden, sizes.split_tokens),
    }

    def draw(tokens: int, rows: int, width: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        x = quantize_rows(jax.random.normal(keys[0], (tokens, width), jnp.bfloat16))
        values = fp8_values(keys[1], (layers, rows, width))
        scale = fp8_scales(keys[2], (layers, rows), width)
        return (*x, values, scale, jax.random.normal(keys[3], (layers, rows), jnp.bfloat16))

    def step(operands: Any, layer: jax.Array) -> jax.Array:
        x, x_scale, values, scale, bias = operands
        return dense_matmul.matmul(
            x, x_scale, values, scale, bias, layer, chip=chip, interpret=interpret
        )

    def reference(operands: Any, layer: jax.Array) -> jax.Array:
        x, x_scale, values, scale, bias = operands
        return ops.product(ops.Rows(x.astype(jnp.bfloat16), x, x_scale), values, scale, bias, layer)

    for name, (rows, width, all_tokens) in shapes.items():
        for tokens in all_tokens:
            yield Case(
                kernel="dense_matmul.matmul",
                shape=f"{name} T={tokens}",
                draw=partial(draw, tokens, rows, width),
                num_layers=layers,
                step=step,
                reference=reference,
                errors=one_error,
                # wgmma's own FP8 sums are off by up to 0.9e-3 (docs/kernel-log.md), and where that
                # crosses the middle of two bfloat16 numbers, the answers are 2**-8 apart.
                tolerance=4e-3,
                bytes=rows * width + tokens * (width + 4 + 2 * rows) + 6 * rows,
                operations=2 * tokens * rows * width,
                unit="fp8",
                phase="prefill" if tokens == sizes.prefill else "decode",
                alternatives={"XLA": reference},
                peers=peers.dense(tokens, rows, width),
            )
