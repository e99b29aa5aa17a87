"""Kernels whose CTAs wait for each other give the bits of the kernels that they stand in for.

Only a GPU has the counters that they wait by: elsewhere the same bodies are tested as kernels apart.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from glm_jax.fp8 import FP8, quantize_rows
from glm_jax.pallas import dispatch, grid, route_stage, router
from glm_jax.pallas.chip import chip_in_trace
from glm_jax.pallas.grouped_down import grouped_down
from glm_jax.pallas.grouped_gate_up import grouped_gate_up
from glm_jax.pallas.quantize import quantize_hidden
from glm_jax.sharding import MESH_AXIS

pytestmark = pytest.mark.gpu

WIDTH, EXPERTS, LOCAL, FIRST, INNER, SHARED, REPEATS = 512, 32, 8, 8, 256, 192, 20


def run(body: Callable[..., Any], *operands: Array) -> Any:
    mesh = Mesh(np.array(jax.devices("gpu")[:1]), (MESH_AXIS,))
    whole = PartitionSpec()
    step = jax.shard_map(body, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return jax.jit(step)(*operands)


def repeated(call: Callable[[], Any]) -> Any:
    """The last of several calls, which find their counter as the one before left it."""
    first = call()
    return lax.fori_loop(
        0, REPEATS, lambda _, before: jax.tree.map(lambda new, _: new, call(), before), first
    )


def assert_same_bits(one: Array, other: Array) -> None:
    np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.mark.parametrize("num_tokens", [1, 37, 256])
def test_routing_and_sorting(num_tokens: int) -> None:
    keys = jax.random.split(jax.random.key(num_tokens), 3)
    x = jax.random.normal(keys[0], (num_tokens, WIDTH)).astype(jnp.bfloat16)
    weight = jax.random.normal(keys[1], (2, EXPERTS, WIDTH)).astype(jnp.bfloat16) / 16
    bias = jax.random.normal(keys[2], (2, EXPERTS)) / 8
    choice = router.Choice(EXPERTS, 8, norm_topk_prob=True, routed_scaling_factor=2.5)
    local = route_stage.Local(jnp.int32(FIRST), LOCAL)

    def merged(*operands: Array) -> Any:
        quantized = quantize_rows(operands[0])
        x, weight, bias = operands
        chip = chip_in_trace()
        assert chip is not None
        memory = route_stage.make_memory(num_tokens, WIDTH, LOCAL, chip)
        return repeated(
            lambda: route_stage.route_and_stage(
                x,
                quantized,
                weight,
                bias,
                jnp.int32(0),
                choice,
                local,
                memory,
                chip=chip,
                shift=1,
            )  # fmt: skip
        )

    def apart(x: Array, weight: Array, bias: Array) -> Any:
        on: Any = {"chip": chip_in_trace()}
        picks, weights = router.route(
            x, weight, bias, jnp.int32(1), num_experts_per_tok=8, norm_topk_prob=True,
            routed_scaling_factor=2.5, **on,
        )  # fmt: skip
        return picks, weights, dispatch.stage(*quantize_rows(x), picks, local.first, LOCAL, **on)

    (picks, weights, plan), (picks_apart, weights_apart, wanted) = (
        run(body, x, weight, bias) for body in (merged, apart)
    )
    num_tiles = int(wanted.num_tiles[0])
    # What only fills a tile, of either, is nobody's.
    rows = wanted.rows[wanted.rows < len(wanted.tokens)]
    assert wanted.values is not None and wanted.scale is not None
    for one, other in (
        (picks, picks_apart), (weights, weights_apart), (plan.rows, wanted.rows),
        (plan.num_tiles, wanted.num_tiles),
        (plan.tile_experts[:num_tiles], wanted.tile_experts[:num_tiles]),
        (plan.tokens[rows], wanted.tokens[rows]),
        (plan.values[rows], wanted.values[rows]),
        (plan.scale[rows], wanted.scale[rows]),
    ):  # fmt: skip
        assert_same_bits(one, other)


@pytest.mark.parametrize("num_tokens", [1, 37, 256])
def test_quantization_and_down(num_tokens: int) -> None:
    keys = jax.random.split(jax.random.key(num_tokens), 6)
    x = jax.random.normal(keys[0], (num_tokens, WIDTH)).astype(jnp.bfloat16)
    gate_up = jax.random.normal(keys[1], (1, LOCAL, 2, INNER, WIDTH)).astype(FP8)
    shared = jax.random.normal(keys[2], (1, 2, SHARED, WIDTH)).astype(FP8)
    down = jax.random.normal(keys[4], (1, LOCAL, WIDTH, INNER)).astype(FP8)
    shared_down = jax.random.normal(keys[5], (1, WIDTH, SHARED)).astype(FP8)
    # Each token's last pick is local, the others are of any device.
    picks = jnp.argsort(jax.random.uniform(keys[3], (num_tokens, LOCAL)), axis=1)[:, :4]
    picks = (picks + jnp.array([0, 16, 24, FIRST])[None]).astype(jnp.int32)

    def body(is_merged: bool, x: Array, picks: Array, *weights: Array) -> Any:
        (gate_up, shared, down, shared_down), layer = weights, jnp.int32(0)
        on: Any = {"chip": chip_in_trace()}
        quantized = quantize_rows(x)
        plan = dispatch.stage(*quantized, picks, jnp.int32(FIRST), LOCAL, **on)
        counter = grid.make_counter() if is_merged else None

        def products() -> Any:
            rows, passed = grouped_gate_up(
                *quantized, plan, gate_up, jnp.full(gate_up.shape[:-1], 0.01), layer,
                shared_values=shared, shared_scale=jnp.full(shared.shape[:-1], 0.01),
                counter=counter, **on,
            )  # fmt: skip
            routed, passed = (
                ((rows, None), (passed, None)) if is_merged else quantize_hidden(rows, passed, plan)
            )
            assert passed is not None
            return grouped_down(
                *routed, plan, down, jnp.full(down.shape[:-1], 0.01), layer,
                shared_hidden=passed[0], shared_hidden_scale=passed[1], shared_values=shared_down,
                shared_scale=jnp.full(shared_down.shape[:-1], 0.01), counter=counter, **on,
            )  # fmt: skip

        return repeated(products) if is_merged else products(), plan.num_tiles * plan.tile

    operands = x, picks, gate_up, shared, down, shared_down
    (routed, passed), _ = run(lambda *operands: body(True, *operands), *operands)
    (want, want_passed), in_use = run(lambda *operands: body(False, *operands), *operands)
    num_rows = int(in_use[0])
    assert num_rows
    assert_same_bits(routed[:num_rows], want[:num_rows])
    assert_same_bits(passed[:num_tokens], want_passed)
