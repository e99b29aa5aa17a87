"""The experts' shapes in GLM-4.7 on one of eight devices: as decode steps run them, from a layer's rows
to the next layer's, and in prefill from the picks to their sum.

Knows no other kernel.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import expert_kernels, ops
from glm_jax.fp8 import quantize_rows
from glm_jax.kernels import Kernels
from glm_jax.pallas import all_reduce, norm
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import stage
from glm_jax.pallas.grouped_down import combine, grouped_down
from glm_jax.pallas.grouped_gate_up import grouped_gate_up
from glm_jax.pallas.quantize import quantize_hidden
from glm_jax.pallas.tiling import TuningConfig
from tests.perf import peers
from tests.perf.measure import Case, Part
from tests.perf.picks import in_use, picks_of
from tests.perf.product_cases import fp8_scales, fp8_values, one_error
from tests.perf.sizes import Sizes
from tests.perf.small_cases import EPS, norm_errors, normed

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


def prefill_step(
    operands: Any, layer: jax.Array, *, chip: Chip, interpret: bool = False
) -> jax.Array:
    """The same as prefill steps do it: their choice of kernels, and their sum."""
    x, x_scale, picks, weights, *experts = operands
    up, up_scale, down, down_scale, *of_shared = experts
    made = expert_kernels.products(
        chip, ops.Rows(None, x, x_scale), picks, weights, None, jnp.int32(0),
        ((up, up_scale), (down, down_scale)), (tuple(of_shared[:2]), tuple(of_shared[2:])), layer,
        interpret=interpret,
    )  # fmt: skip
    return all_reduce.add_up(all_reduce.Summands(*made), interpret=interpret)


class Block(NamedTuple):
    """A layer's operands from the norm after attention on.

    Attributes:
      residual, x: what follows is added to, and the same normed, for the router; values, scale: quantized.
      router, bias: of all experts; up … shared_down_scale: of those here, and of the shared one.
      norm: weights of the norm that begins the next layer.
      memory: what a step's kernels share, or None where they are interpreted.
    """

    residual: jax.Array
    x: jax.Array
    values: jax.Array
    scale: jax.Array
    router: jax.Array
    bias: jax.Array
    norm: jax.Array
    up: jax.Array
    up_scale: jax.Array
    down: jax.Array
    down_scale: jax.Array
    shared_up: jax.Array
    shared_up_scale: jax.Array
    shared_down: jax.Array
    shared_down_scale: jax.Array
    memory: Any


def block_step(
    operands: Any, layer: jax.Array, *, kernels: Kernels, choice: dict[str, Any]
) -> norm.NormedRows:
    """Router, experts and the sum before the next norm, kernel for kernel as steps run them."""
    on = Block(*operands)
    rows, num_local = ops.Rows(on.x, on.values, on.scale), on.up.shape[1]
    if on.memory is None:
        workspace, staged = None, None
        picks, weights, _ = kernels.route(on.x, on.router, on.bias, layer, **choice)
    else:
        workspace = on.memory._replace(first_expert=jnp.int32(0), is_fused=True)
        picks, weights, _, staged = kernels.stage(
            rows, on.router, on.bias, layer, num_local, workspace, **choice
        )
    pending = kernels.experts(
        rows, picks, weights, ((on.up, on.up_scale), (on.down, on.down_scale)),
        ((on.shared_up, on.shared_up_scale), (on.shared_down, on.shared_down_scale)), layer,
        group_size=num_local, shared_group_size=on.shared_down.shape[-1], staged=staged,
    )  # fmt: skip
    (residual, made), _ = kernels.sum_add_norm(
        pending, on.residual, on.norm, layer, eps=EPS, is_fp8=True, workspace=workspace
    )
    assert made.plain is not None and made.values is not None and made.scale is not None
    return norm.NormedRows(residual, made.plain, made.values, made.scale)


def expert_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """This device's share of the experts whole, and its part of each; the shared expert with them."""
    whole = sizes.local_experts, sizes.expert_width
    for tokens in sizes.tokens:
        if tokens < sizes.prefill or interpret:
            yield _block_case(sizes, *whole, tokens, "", chip, interpret)
    for tokens in sizes.split_tokens:
        parts = sizes.experts, sizes.split_width
        yield _block_case(sizes, *parts, tokens, "split ", chip, interpret)
    yield from on_picks(sizes, (sizes.prefill,), chip, interpret)


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


def on_picks(
    sizes: Sizes, all_tokens: Sequence[int], chip: Chip, interpret: bool
) -> Iterator[Case]:
    """From the tokens' picks to their sum."""
    num_local, inner = sizes.local_experts, sizes.expert_width

    def draw(tokens: int, key: jax.Array) -> Any:
        keys = jax.random.split(key)
        x = quantize_rows(jax.random.normal(keys[0], (tokens, sizes.hidden), jnp.bfloat16))
        picks = _draw_picks(sizes, num_local, tokens, key)
        return (*x, *picks, *_draw_experts(sizes, num_local, inner, keys[1]))

    for tokens in all_tokens:
        num_bytes, operations = _work(sizes, num_local, inner, tokens)
        yield Case(
            kernel="experts",
            shape=f"T={tokens}",
            draw=partial(draw, tokens),
            num_layers=sizes.heavy_layers,
            step=partial(prefill_step, chip=chip, interpret=interpret),
            reference=partial(_reference, num_local),
            errors=one_error,
            # The reference quantizes hidden rows of its own; where they round another way, the sums
            # come to differ by 2e-2 (docs/kernel-log.md).
            tolerance=3e-2,
            bytes=num_bytes,
            operations=operations,
            unit="fp8",
            phase="prefill",
            is_timed_alone=True,
        )


def _block_case(
    sizes: Sizes, num_local: int, inner: int, tokens: int, name: str, chip: Chip, interpret: bool
) -> Case:
    """From the rows after a layer's attention to those that the next one's begins with."""
    width, layers = sizes.hidden, sizes.heavy_layers
    kernels = Kernels(interpreted=chip if interpret else None)
    choice = {
        "num_experts_per_tok": sizes.picks,
        "norm_topk_prob": True,
        "routed_scaling_factor": _SCALING,
    }

    def draw(key: jax.Array) -> Any:
        keys = jax.random.split(key, 5)
        # Rows that pick what was drawn.
        router = jax.random.normal(keys[0], (sizes.experts, width)) * width**-0.5
        picks, _ = _draw_picks(sizes, num_local, tokens, key)
        x = (2 * router[picks].sum(1)).astype(jnp.bfloat16)
        # Smaller than what is added to it, which it would hide.
        residual = jax.random.normal(keys[1], (tokens, width), jnp.bfloat16) / 16
        memory = kernels.workspace(tokens, width, num_local)
        if memory is not None:
            memory = memory._replace(first_expert=None, is_fused=None)
            memory = jax.tree.map(jax.freeze, memory)
        return Block(
            residual, x, *quantize_rows(jax.random.normal(keys[2], x.shape, jnp.bfloat16)),
            jnp.broadcast_to(router.astype(jnp.bfloat16), (layers, *router.shape)),
            jnp.zeros((layers, sizes.experts), jnp.float32),
            1 + jax.random.normal(keys[3], (layers, width), jnp.bfloat16) / 4,
            *_draw_experts(sizes, num_local, inner, keys[4]),
            memory=memory,
        )  # fmt: skip

    def reference(operands: Any, layer: jax.Array) -> norm.NormedRows:
        on = Block(*operands)
        scores = jax.nn.sigmoid(ops.router_logits(on.x, on.router, layer))
        weights, picks = jax.lax.top_k(scores, sizes.picks)
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20) * _SCALING
        experts = operands[Block._fields.index("up") : -1]
        added = _reference(num_local, (on.values, on.scale, picks, weights, *experts), layer)
        return normed(on.residual, added.astype(jnp.bfloat16), on.norm, layer)

    products, operations = _work(sizes, num_local, inner, tokens)
    picks, _ = picks_of(tokens, sizes.experts, sizes.picks, num_local)
    rows = float((picks < num_local).sum())
    routing = 2 * width * (tokens + sizes.experts) + 8 * tokens * sizes.picks
    summing = width * (2 * rows + tokens * (2 + 2 + 2 + 2 + 1)) + 2 * width
    return Case(
        kernel="router … norm",
        shape=f"{name}T={tokens}",
        draw=draw,
        num_layers=layers,
        step=partial(block_step, kernels=kernels, choice=choice),
        reference=reference,
        errors=norm_errors,
        # As below, of the experts' part.
        tolerance=3e-2,
        bytes=routing + products + summing,
        operations=operations,
        unit="fp8",
        is_float32=True,
        # No step loads the other layout yet.
        phase="" if name else "decode",
        written=() if interpret else (Block._fields.index("memory"),),
        parts=(
            Part("router, picks, sorting", r"rout|dispatch|stage", "router|align", routing),
            Part("gate_up, quantization, down", "grouped|quantize_hidden", "gate_up|quantize$|down",
                 products),
            Part("sum, residual, norm, quantization", "norm|add_up", "combine", summing),
        ),
        peers={} if name else peers.block(tokens),
    )  # fmt: skip
