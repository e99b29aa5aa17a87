"""The experts' shapes in GLM-4.7 on one of eight devices, alone and behind their router.

Knows no other kernel.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import expert_kernels, ops
from glm_jax.fp8 import quantize_rows
from glm_jax.operands import Staged, Workspace
from glm_jax.pallas import all_reduce, grid, route_stage, router
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import stage
from glm_jax.pallas.grouped_down import combine, grouped_down
from glm_jax.pallas.grouped_gate_up import grouped_gate_up
from glm_jax.pallas.quantize import quantize_hidden
from glm_jax.pallas.tiling import TuningConfig
from tests.perf import peers
from tests.perf.measure import Case
from tests.perf.picks import in_use, picks_of
from tests.perf.product_cases import fp8_scales, fp8_values, one_error
from tests.perf.sizes import Sizes

# Picks of so many seeds are drawn; the first, which is timed, has a usual number of experts in use.
_SEEDS = 3
_SCALING = 2.5


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
    x, x_scale, picks, weights, *experts = operands
    first, num_local = jnp.int32(0), experts[0].shape[1]
    plan = stage(x, x_scale, picks, first, num_local, chip=chip, interpret=interpret)
    staged = None
    if not interpret and len(x) <= route_stage.MAX_TOKENS:
        staged = Staged(plan, _workspace(gate_up=grid.make_counter()))
    return _products(
        ops.Rows(None, x, x_scale), picks, weights, staged, experts, layer, chip, interpret
    )


def block_step(
    operands: Any, layer: jax.Array, *, choice: router.Choice, chip: Chip, interpret: bool = False
) -> jax.Array:
    """The router before that, as steps have it."""
    plain, weight, bias, x, x_scale, *experts = operands
    rows, num_local = ops.Rows(plain, x, x_scale), experts[0].shape[1]
    if interpret:
        picks, weights = router.route(
            plain, weight, bias, layer, num_experts_per_tok=choice.num_picks,
            norm_topk_prob=choice.norm_topk_prob,
            routed_scaling_factor=choice.routed_scaling_factor, chip=chip, interpret=True,
        )  # fmt: skip
        staged = None
    else:
        workspace = _workspace(
            routing=route_stage.make_memory(len(plain), plain.shape[1], num_local, chip),
            gate_up=grid.make_counter(),
            first_expert=jnp.int32(0),
        )
        picks, weights, staged = expert_kernels.stage(
            chip, rows, weight, bias, layer, choice, num_local, workspace
        )
    return _products(rows, picks, weights, staged, experts, layer, chip, interpret)


def _workspace(**made: Any) -> Workspace:
    """One of which these kernels need no more than this."""
    nothing: Any = [None] * len(Workspace._fields)
    return Workspace(*nothing)._replace(**made)


def _products(
    rows: ops.Rows, picks: jax.Array, weights: jax.Array, staged: Staged | None, experts: Any,
    layer: jax.Array, chip: Chip, interpret: bool,
) -> jax.Array:  # fmt: skip
    up, up_scale, down, down_scale, *of_shared = experts
    made = expert_kernels.products(
        chip, rows, picks, weights, staged, jnp.int32(0), ((up, up_scale), (down, down_scale)),
        (tuple(of_shared[:2]), tuple(of_shared[2:])), layer, interpret=interpret,
    )  # fmt: skip
    return all_reduce.add_up(all_reduce.Summands(*made), interpret=interpret)


def expert_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """This device's experts, the shared expert with them: its share of them whole, its part of each, and
    its share behind the router."""
    whole = sizes.local_experts, sizes.expert_width
    yield from _expert_cases(sizes, *whole, sizes.tokens, "", chip, interpret)
    parts = sizes.experts, sizes.split_width
    yield from _expert_cases(sizes, *parts, sizes.split_tokens, "split ", chip, interpret)
    for tokens in sizes.tokens:
        if tokens < sizes.prefill or interpret:
            yield _block_case(sizes, tokens, chip, interpret)


def _draw_experts(
    sizes: Sizes, num_local: int, inner: int, key: jax.Array
) -> tuple[jax.Array, ...]:
    layers, width, shared = sizes.heavy_layers, sizes.hidden, sizes.shared_width
    keys = jax.random.split(key, 8)
    up, down = (layers, num_local, 2, inner), (layers, num_local, width)
    shared_up, shared_down = (layers, 2, shared), (layers, width)
    return (
        *(fp8_values(keys[0], (*up, width)), fp8_scales(keys[1], up, width)),
        *(fp8_values(keys[2], (*down, inner)), fp8_scales(keys[3], down, inner)),
        *(fp8_values(keys[4], (*shared_up, width)), fp8_scales(keys[5], shared_up, width)),
        *(fp8_values(keys[6], (*shared_down, shared)), fp8_scales(keys[7], shared_down, shared)),
    )


def _draw_picks(sizes: Sizes, num_local: int, tokens: int, key: jax.Array) -> tuple[jax.Array, ...]:
    """Those of the key's seed, for the libraries beside to pick the same."""
    shape = (tokens, sizes.experts, sizes.picks, num_local)
    every = [picks_of(*shape, seed) for seed in range(_SEEDS)]
    place = jax.random.key_data(key)[-1] % _SEEDS
    return tuple(jnp.asarray(np.stack(found))[place] for found in zip(*every, strict=True))


def _reference(num_local: int, operands: Any, layer: jax.Array) -> jax.Array:
    x, x_scale, picks, weights, up, up_scale, down, down_scale, *of_shared = operands
    rows = ops.Rows(x.astype(jnp.bfloat16), x, x_scale)
    routing = ops.local_routing(picks, weights, 0, num_local)
    routed = ops.experts(rows, routing, up, up_scale, down, down_scale, layer, num_local)
    gate_up = ops.product(rows, of_shared[0], of_shared[1], None, layer)
    hidden = ops.as_rows(ops.gated_silu(gate_up), is_fp8=True)
    shared_out = ops.product(hidden, of_shared[2], of_shared[3], None, layer)
    return routed[0] + shared_out.astype(jnp.float32)


def _work(sizes: Sizes, num_local: int, inner: int, tokens: int) -> tuple[float, float]:
    """Bytes that are moved at least, and operations, with the picks that are timed."""
    width, shared = sizes.hidden, sizes.shared_width
    picks, _ = picks_of(tokens, sizes.experts, sizes.picks, num_local)
    rows, used = float((picks < num_local).sum()), in_use(picks, num_local)
    weights = 3 * width * (used * inner + shared)
    moved = tokens * (width + 2 * width) + rows * (width + 3 * inner + 2 * width)
    return weights + moved, 2 * 3 * width * (rows * inner + tokens * shared)


def _expert_cases(
    sizes: Sizes, num_local: int, inner: int, all_tokens: Sequence[int], name: str, chip: Chip,
    interpret: bool,
) -> Iterator[Case]:  # fmt: skip
    """From the tokens' picks to their sum."""

    def draw(tokens: int, key: jax.Array) -> Any:
        keys = jax.random.split(key)
        x = quantize_rows(jax.random.normal(keys[0], (tokens, sizes.hidden), jnp.bfloat16))
        picks = _draw_picks(sizes, num_local, tokens, key)
        return (*x, *picks, *_draw_experts(sizes, num_local, inner, keys[1]))

    reference = partial(_reference, num_local)
    for tokens in all_tokens:
        num_bytes, operations = _work(sizes, num_local, inner, tokens)
        yield Case(
            kernel="experts",
            shape=f"{name}T={tokens}",
            draw=partial(draw, tokens),
            num_layers=sizes.heavy_layers,
            step=partial(engine_step, chip=chip, interpret=interpret),
            reference=reference,
            errors=one_error,
            # The reference quantizes hidden rows of its own; where they round another way, the sums
            # come to differ by 2e-2 (docs/kernel-log.md).
            tolerance=3e-2,
            bytes=num_bytes,
            operations=operations,
            unit="fp8",
            # A step makes its counter once; here each call has its own, which XLA sets to zero.
            is_timed_alone=True,
            alternatives={"XLA, every expert": reference} if tokens <= 64 and not name else {},
            peers={} if name else peers.experts(tokens),
        )


def _block_case(sizes: Sizes, tokens: int, chip: Chip, interpret: bool) -> Case:
    """From a router's rows to the sum."""
    num_local, inner, width = sizes.local_experts, sizes.expert_width, sizes.hidden
    choice = router.Choice(sizes.experts, sizes.picks, True, _SCALING)

    def draw(key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        # Rows that pick what was drawn.
        weight = jax.random.normal(keys[0], (sizes.experts, width)) * width**-0.5
        picks, _ = _draw_picks(sizes, num_local, tokens, key)
        plain = (2 * weight[picks].sum(1)).astype(jnp.bfloat16)
        stack = jnp.broadcast_to(weight.astype(jnp.bfloat16), (sizes.heavy_layers, *weight.shape))
        bias = jnp.zeros((sizes.heavy_layers, sizes.experts), jnp.float32)
        x = quantize_rows(jax.random.normal(keys[1], (tokens, width), jnp.bfloat16))
        return (plain, stack, bias, *x, *_draw_experts(sizes, num_local, inner, keys[2]))

    def reference(operands: Any, layer: jax.Array) -> jax.Array:
        plain, weight, _, x, x_scale, *experts = operands
        scores = jax.nn.sigmoid(ops.router_logits(plain, weight, layer))
        weights, picks = jax.lax.top_k(scores, sizes.picks)
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20) * _SCALING
        return _reference(num_local, (x, x_scale, picks, weights, *experts), layer)

    num_bytes, operations = _work(sizes, num_local, inner, tokens)
    return Case(
        kernel="router and experts",
        shape=f"T={tokens}",
        draw=draw,
        num_layers=sizes.heavy_layers,
        step=partial(block_step, choice=choice, chip=chip, interpret=interpret),
        reference=reference,
        errors=one_error,
        tolerance=3e-2,
        bytes=num_bytes + 2 * width * (tokens + sizes.experts),
        operations=operations,
        unit="fp8",
        is_float32=True,
        is_timed_alone=True,
        peers=peers.block(tokens),
    )
