"""Both halves of an expert in one kernel: the bits of two kernels, and what the compiler makes of it."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from glm_jax.fp8 import FP8, quantize_rows
from glm_jax.pallas import dispatch, grid
from glm_jax.pallas.chip import Chip, chip_in_trace
from glm_jax.pallas.grouped_down import grouped_down
from glm_jax.pallas.grouped_gate_up import grouped_gate_up
from glm_jax.pallas.grouped_mlp import default_configs, grouped_mlp
from glm_jax.sharding import MESH_AXIS
from tests.pallas.compiled import Program, compile_programs, needs_compiler

# Of one of eight devices.
WIDTH, INNER, SHARED, LOCAL, PICKS = 5120, 1536, 192, 20, 8
CALLS = 20


def shapes(num_tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Tokens, picks; then values and scale of gate_up, down, and the same of the shared expert."""
    weights = (LOCAL, 2, INNER, WIDTH), (LOCAL, WIDTH, INNER), (2, SHARED, WIDTH), (WIDTH, SHARED)
    of_weights = [
        jax.ShapeDtypeStruct((1, *shape[: shape_end or None]), dtype)
        for shape in weights
        for shape_end, dtype in ((0, FP8), (-1, jnp.float32))
    ]
    x = jax.ShapeDtypeStruct((num_tokens, WIDTH), jnp.bfloat16)
    return x, jax.ShapeDtypeStruct((num_tokens, PICKS), jnp.int32), *of_weights


def draw(num_tokens: int) -> list[Array]:
    """Random operands; picks are of eight devices' experts."""
    keys = iter(jax.random.split(jax.random.key(num_tokens), 16))
    x, picks, *weights = shapes(num_tokens)
    shuffled = jnp.argsort(jax.random.uniform(next(keys), (num_tokens, 8 * LOCAL)), axis=1)
    # Each token's first pick is here.
    chosen = shuffled[:, : picks.shape[1]].at[:, 0].set(jnp.arange(num_tokens) * 7 % LOCAL)
    drawn = [jax.random.normal(next(keys), x.shape).astype(x.dtype), chosen.astype(jnp.int32)]
    for spec in weights:
        if spec.dtype == FP8:
            drawn.append(jax.random.normal(next(keys), spec.shape).astype(FP8))
        else:
            drawn.append(jax.random.uniform(next(keys), spec.shape, spec.dtype, 0.005, 0.015))
    return drawn


def answers(is_merged: bool, calls: int, x: Array, picks: Array, *weights: Array) -> Any:
    """Rows and shared rows of one call; whether those that follow have the same bits; rows in use."""
    gate_up, down, shared_gate_up, shared_down = zip(weights[::2], weights[1::2], strict=True)
    chip = chip_in_trace()
    assert chip is not None
    values, scale = quantize_rows(x)
    plan = dispatch.stage(values, scale, picks, jnp.int32(0), LOCAL, chip=chip)
    layer, counter = jnp.int32(0), grid.make_counter()

    def call() -> tuple[Array, Array]:
        if is_merged:
            return grouped_mlp(
                values, scale, plan, gate_up, down, shared_gate_up, shared_down, layer, counter,
                chip=chip,
            )  # fmt: skip
        inner, passed = grouped_gate_up(
            values, scale, plan, gate_up[0], gate_up[1], layer, shared_values=shared_gate_up[0],
            shared_scale=shared_gate_up[1], counter=counter, chip=chip,
        )  # fmt: skip
        rows, shared = grouped_down(
            inner[0], inner[1], plan, down[0], down[1], layer, shared_hidden=passed[0], shared_hidden_scale=passed[1],
            shared_values=shared_down[0], shared_scale=shared_down[1], chip=chip,
        )  # fmt: skip
        assert shared is not None
        return rows, shared

    in_use = plan.num_tiles[0] * plan.tile

    def bits() -> tuple[Array, Array]:
        rows, shared = (jax.lax.bitcast_convert_type(out, jnp.int16) for out in call())
        is_used = jnp.arange(len(rows)) < in_use
        return jnp.where(is_used[:, None], rows, 0), shared[: len(x)]

    first = bits()
    others = [bits() for _ in range(calls - 1)]
    same = [
        jnp.all(one == other) for each in others for one, other in zip(first, each, strict=True)
    ]
    return first, jnp.all(jnp.stack([jnp.bool_(True), *same])), in_use


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 37, 64])
def test_one_kernel_has_the_bits_of_two(num_tokens: int) -> None:
    mesh = Mesh(np.array(jax.devices("gpu")[:1]), (MESH_AXIS,))
    operands = draw(num_tokens)

    def run(is_merged: bool, calls: int) -> Any:
        body = jax.shard_map(
            partial(answers, is_merged, calls), mesh=mesh, in_specs=PartitionSpec(),
            out_specs=PartitionSpec(), check_vma=False,
        )  # fmt: skip
        return jax.jit(body)(*operands)

    got, is_same, in_use = run(True, CALLS)
    want, _, _ = run(False, 1)
    assert int(in_use) and bool(is_same)
    for one, other in zip(got, want, strict=True):
        assert np.asarray(other).any()
        assert (np.asarray(one) == np.asarray(other)).all()


def programs(chip: Chip) -> dict[str, Program]:
    """Of one token, whose tiles are smaller, and of as many as the kernel is for."""
    assert chip == chip_in_trace() or chip_in_trace() is None
    return {str(tokens): (partial(answers, True, 1), shapes(tokens)) for tokens in (1, 64)}


@pytest.mark.slow
@needs_compiler
def test_all_ctas_meet_twice_and_nothing_is_spilled() -> None:
    compiled = compile_programs("h200", programs)
    for kernels in compiled.values():
        [kernel] = [kernel for kernel in kernels if kernel.name.startswith("grouped_mlp")]
        assert not kernel.uses_local_memory, str(kernel)
        assert kernel.shared <= 227 * 1024, str(kernel)
        assert len(re.findall(r"atom\.acq_rel\.gpu\.global\.inc\.u32", kernel.ptx)) == 2
        assert re.search(r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", kernel.ptx)


def test_the_second_product_has_the_ring_of_the_first() -> None:
    for tokens in (1, 64):
        first, second = default_configs(8, tokens)
        for name in ("tokens", "rows", "warpgroups", "stages", "step", "store"):
            assert getattr(first, name) == getattr(second, name)
