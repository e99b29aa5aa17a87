"""The FP8 products' shapes in GLM-4.7 on one of eight devices: dense layers and experts.

Knows no other kernel.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax import expert_kernels, ops
from glm_jax.fp8 import FP8, quantize_rows
from glm_jax.operands import Staged, Workspace
from glm_jax.pallas import all_reduce, dense_matmul, grid, route_stage
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import stage
from glm_jax.pallas.grouped_down import combine, grouped_down
from glm_jax.pallas.grouped_gate_up import grouped_gate_up
from glm_jax.pallas.quantize import quantize_hidden
from glm_jax.pallas.tiling import TuningConfig
from tests.perf import peers
from tests.perf.measure import Case, relative_error
from tests.perf.sizes import Sizes


def _values(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """FP8 values of every magnitude, drawn as bytes: as float32 they would not fit the device."""
    magnitudes = jax.random.bits(key, shape, jnp.uint8)
    # The bytes 0x7f and 0xff are NaN; a cleared exponent bit keeps all below 2.
    return jax.lax.bitcast_convert_type(magnitudes & jnp.uint8(0xBF), FP8)


def _scales(key: jax.Array, shape: tuple[int, ...], width: int) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5) * width**-0.5


def _one_error(got: jax.Array, expected: jax.Array) -> dict[str, jax.Array]:
    return {"out": relative_error(got, expected)}


def dense_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """q, k and v together; and the output projection."""
    layers, heads = sizes.layers, sizes.query_groups * 128
    shapes = {"qkv": (heads + 256, sizes.hidden), "o": (sizes.hidden, heads)}

    def draw(tokens: int, rows: int, width: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        x = quantize_rows(jax.random.normal(keys[0], (tokens, width), jnp.bfloat16))
        values = _values(keys[1], (layers, rows, width))
        scale = _scales(keys[2], (layers, rows), width)
        return (*x, values, scale, jax.random.normal(keys[3], (layers, rows), jnp.bfloat16))

    def step(operands: Any, layer: jax.Array) -> jax.Array:
        x, x_scale, values, scale, bias = operands
        return dense_matmul.matmul(
            x, x_scale, values, scale, bias, layer, chip=chip, interpret=interpret
        )

    def reference(operands: Any, layer: jax.Array) -> jax.Array:
        x, x_scale, values, scale, bias = operands
        return ops.product(ops.Rows(x.astype(jnp.bfloat16), x, x_scale), values, scale, bias, layer)

    for name, (rows, width) in shapes.items():
        for tokens in sizes.tokens:
            yield Case(
                kernel="dense_matmul.matmul",
                shape=f"{name} T={tokens}",
                draw=partial(draw, tokens, rows, width),
                num_layers=layers,
                step=step,
                reference=reference,
                errors=_one_error,
                # wgmma's own FP8 sums are off by up to 0.9e-3 (docs/kernel-log.md), and where that
                # crosses the middle of two bfloat16 numbers, the answers are 2**-8 apart.
                tolerance=4e-3,
                bytes=rows * width + tokens * (width + 4 + 2 * rows) + 6 * rows,
                operations=2 * tokens * rows * width,
                unit="fp8",
                alternatives={"XLA": reference},
                peers=peers.dense(tokens, rows, width),
            )


def expert_step(
    operands: Any,
    layer: jax.Array,
    *,
    chip: Chip,
    interpret: bool = False,
    gate_up: TuningConfig | None = None,
    down: TuningConfig | None = None,
) -> jax.Array:
    """This device's experts from the tokens' picks to their sum, cut as their kernels choose or as said."""
    x, x_scale, picks, weights, up, up_scale, down_values, down_scale, *of_shared = operands
    on = {"chip": chip, "interpret": interpret}
    plan = stage(x, x_scale, picks, jnp.int32(0), up.shape[1], **on)
    hidden, shared_hidden = grouped_gate_up(
        x, x_scale, plan, up, up_scale, layer,
        shared_values=of_shared[0], shared_scale=of_shared[1], config=gate_up, **on,
    )  # fmt: skip
    quantized, shared_quantized = quantize_hidden(hidden, shared_hidden, plan, interpret=interpret)
    assert shared_quantized is not None
    out, shared_out = grouped_down(
        *quantized, plan, down_values, down_scale, layer,
        shared_hidden=shared_quantized[0], shared_hidden_scale=shared_quantized[1],
        shared_values=of_shared[2], shared_scale=of_shared[3], config=down, **on,
    )  # fmt: skip
    return combine(out, shared_out, plan.rows, weights)


def engine_step(
    operands: Any, layer: jax.Array, *, chip: Chip, interpret: bool = False
) -> jax.Array:
    """The same as steps do it: their choice of kernels, and their sum."""
    x, x_scale, picks, weights, up, up_scale, down, down_scale, *of_shared = operands
    plan = stage(x, x_scale, picks, jnp.int32(0), up.shape[1], chip=chip, interpret=interpret)
    staged = None
    if not interpret and len(x) <= route_stage.MAX_TOKENS:
        nothing: Any = [None] * len(Workspace._fields)
        staged = Staged(plan, Workspace(*nothing)._replace(gate_up=grid.make_counter()))
    made = expert_kernels.products(
        chip, ops.Rows(None, x, x_scale), picks, weights, staged, jnp.int32(0),
        ((up, up_scale), (down, down_scale)), (tuple(of_shared[:2]), tuple(of_shared[2:])), layer,
        interpret=interpret,
    )  # fmt: skip
    return all_reduce.add_up(all_reduce.Summands(*made), interpret=interpret)


def expert_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """This device's experts, the shared expert with them: its share of them whole, and its part of each."""
    whole = sizes.local_experts, sizes.expert_width
    yield from _expert_cases(sizes, *whole, sizes.tokens, "", chip, interpret)
    parts = sizes.experts, sizes.split_width
    yield from _expert_cases(sizes, *parts, sizes.split_tokens, "split ", chip, interpret)


def _expert_cases(
    sizes: Sizes, num_local: int, inner: int, all_tokens: Sequence[int], name: str, chip: Chip,
    interpret: bool,
) -> Iterator[Case]:  # fmt: skip
    """From the tokens' picks to their sum."""
    layers, width, shared = sizes.heavy_layers, sizes.hidden, sizes.shared_width

    def draw(tokens: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 12)
        x = quantize_rows(jax.random.normal(keys[0], (tokens, width), jnp.bfloat16))
        scores = jax.random.uniform(keys[1], (tokens, sizes.experts))
        weights, picks = jax.lax.top_k(scores, sizes.picks)
        up, down = (layers, num_local, 2, inner), (layers, num_local, width)
        shared_up, shared_down = (layers, 2, shared), (layers, width)
        return (
            *(*x, picks, weights / sizes.picks),
            *(_values(keys[2], (*up, width)), _scales(keys[3], up, width)),
            *(_values(keys[4], (*down, inner)), _scales(keys[5], down, inner)),
            *(_values(keys[6], (*shared_up, width)), _scales(keys[7], shared_up, width)),
            *(_values(keys[8], (*shared_down, shared)), _scales(keys[9], shared_down, shared)),
        )

    def reference(operands: Any, layer: jax.Array) -> jax.Array:
        x, x_scale, picks, weights, up, up_scale, down, down_scale, *of_shared = operands
        rows = ops.Rows(x.astype(jnp.bfloat16), x, x_scale)
        routing = ops.local_routing(picks, weights, 0, num_local)
        routed = ops.experts(rows, routing, up, up_scale, down, down_scale, layer, num_local)
        gate_up = ops.product(rows, of_shared[0], of_shared[1], None, layer)
        hidden = ops.as_rows(ops.gated_silu(gate_up), is_fp8=True)
        shared_out = ops.product(hidden, of_shared[2], of_shared[3], None, layer)
        return routed[0] + shared_out.astype(jnp.float32)

    for tokens in all_tokens:
        # Each token picks `picks` of all experts; what of this device's is read depends on how many.
        in_use = num_local * (1 - (1 - sizes.picks / sizes.experts) ** tokens)
        rows = tokens * (sizes.picks * num_local / sizes.experts)
        weights = 3 * width * (in_use * inner + shared)
        yield Case(
            kernel="experts",
            shape=f"{name}T={tokens}",
            draw=partial(draw, tokens),
            num_layers=layers,
            step=partial(engine_step, chip=chip, interpret=interpret),
            reference=reference,
            errors=_one_error,
            # The reference quantizes hidden rows of its own; where they round another way, the sums
            # come to differ by 2e-2 (docs/kernel-log.md).
            tolerance=3e-2,
            bytes=weights + tokens * (width + 2 * width) + rows * (width + 3 * inner + 2 * width),
            operations=2 * 3 * width * (rows * inner + tokens * shared),
            unit="fp8",
            # A step makes its counter once; here each call has its own, which XLA sets to zero.
            is_timed_alone=True,
            alternatives={"XLA, every expert": reference} if tokens <= 64 and not name else {},
            peers={} if name else peers.experts(tokens),
        )
