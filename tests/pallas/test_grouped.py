"""The experts' products as kernels, interpreted on a CPU, against plain products of the same rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.fp8 import FP8, quantize_rows
from glm_jax.ops import gated_silu
from glm_jax.pallas.chip import Architecture, Chip
from glm_jax.pallas.dispatch import Dispatch, dispatch, stage
from glm_jax.pallas.grouped_down import combine, grouped_down
from glm_jax.pallas.grouped_gate_up import grouped_gate_up
from glm_jax.pallas.quantize import quantize_hidden
from glm_jax.pallas.tiling import TuningConfig

ARCHITECTURES: tuple[Architecture, ...] = ("sm90", "sm100")


class Weights(NamedTuple):
    gate_up: jax.Array
    gate_up_scale: jax.Array
    down: jax.Array
    down_scale: jax.Array


def random_weights(seed: int, leading: tuple[int, ...], width: int, inner: int) -> Weights:
    keys = jax.random.split(jax.random.key(seed), 4)
    return Weights(
        jax.random.normal(keys[0], (*leading, 2, inner, width)).astype(FP8),
        jax.random.uniform(keys[1], (*leading, 2, inner), minval=0.01, maxval=0.1),
        jax.random.normal(keys[2], (*leading, width, inner)).astype(FP8),
        jax.random.uniform(keys[3], (*leading, width), minval=0.01, maxval=0.1),
    )


def random_tokens(seed: int, num_tokens: int, width: int) -> tuple[jax.Array, jax.Array]:
    return quantize_rows(jax.random.normal(jax.random.key(seed), (num_tokens, width)))


def scaled(values: jax.Array, scale: jax.Array) -> np.ndarray:
    return np.asarray(values, np.float32) * np.asarray(scale)


def expected_hidden(tokens: np.ndarray, gate_up: jax.Array, scale: jax.Array) -> np.ndarray:
    products = [tokens @ scaled(gate_up[half], scale[half][:, None]).T for half in range(2)]
    rounded = jnp.stack([jnp.asarray(product, jnp.bfloat16) for product in products], axis=1)
    return np.asarray(gated_silu(rounded), np.float32)


def assert_close(out: np.ndarray, expected: np.ndarray, steps: int) -> None:
    """Within so many of bfloat16's steps, one for each rounding that float32's order may tip."""
    largest = np.abs(expected).max()
    np.testing.assert_allclose(out, expected, rtol=steps * 2**-8, atol=1e-4 * largest)


class Case(NamedTuple):
    """Experts `first` ... of all; `elsewhere` and unpicked ones hold no numbers at all."""

    picks: np.ndarray
    first: int
    num_local: int
    width: int
    inner: int
    shared_inner: int


CASES = {
    "several experts, one without tokens": Case(
        np.array([[0, 3], [4, 3], [5, 4], [3, 1], [4, 0]], np.int32), 3, 4, 192, 128, 64
    ),
    "all tokens on one expert, over two tiles": Case(
        np.tile(np.array([[1, 9]], np.int32), (18, 1)), 0, 2, 128, 192, 192
    ),
    "one token": Case(np.array([[2, 0]], np.int32), 0, 3, 256, 64, 128),
}


def run(case: Case, architecture: Architecture, *, is_staged: bool) -> None:
    num_tokens = len(case.picks)
    chip, layer = Chip(architecture, 5), jnp.int32(1)
    weights = random_weights(1, (2, case.num_local), case.width, case.inner)
    shared = random_weights(2, (2,), case.width, case.shared_inner)
    x, x_scale = random_tokens(3, num_tokens, case.width)
    routing = jax.random.uniform(jax.random.key(4), case.picks.shape, minval=0.1)
    picks, first = jnp.asarray(case.picks), jnp.int32(case.first)
    idle = [e for e in range(case.num_local) if not (case.picks == case.first + e).any()]
    poisoned = weights._replace(
        gate_up=weights.gate_up.at[0].set(jnp.nan).at[1, jnp.array(idle, int)].set(jnp.nan),
        down=weights.down.at[0].set(jnp.nan).at[1, jnp.array(idle, int)].set(jnp.nan),
    )
    if is_staged:
        plan = stage(x, x_scale, picks, first, case.num_local, chip=chip, interpret=True)
    else:
        plan = dispatch(picks, first, case.num_local)
    hidden, shared_hidden = grouped_gate_up(
        x, x_scale, plan, poisoned.gate_up, poisoned.gate_up_scale, layer,
        shared_values=shared.gate_up, shared_scale=shared.gate_up_scale,
        chip=chip, interpret=True,
    )  # fmt: skip
    assert shared_hidden is not None
    tokens = scaled(x, x_scale)
    want_shared = expected_hidden(tokens, shared.gate_up[1], shared.gate_up_scale[1])
    assert_close(np.asarray(shared_hidden, np.float32), want_shared, 3)
    quantized, shared_quantized = quantize_hidden(hidden, shared_hidden, plan, interpret=True)
    assert shared_quantized is not None
    rows, shared_rows = grouped_down(
        *quantized, plan, poisoned.down, poisoned.down_scale, layer,
        shared_hidden=shared_quantized[0], shared_hidden_scale=shared_quantized[1],
        shared_values=shared.down, shared_scale=shared.down_scale, chip=chip, interpret=True,
    )  # fmt: skip
    out = combine(rows, shared_rows, plan.rows, routing)
    want = scaled(*shared_quantized) @ scaled(shared.down[1], shared.down_scale[1][:, None]).T
    want = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float32)
    hidden_rows, inner_rows = np.asarray(hidden, np.float32), scaled(*quantized)
    for token, choice in np.ndindex(*case.picks.shape):
        expert = case.picks[token, choice] - case.first
        row = int(plan.rows[token, choice])
        if not 0 <= expert < case.num_local:
            assert row == len(hidden_rows)
            continue
        want_hidden = expected_hidden(
            tokens[token : token + 1], weights.gate_up[1, expert], weights.gate_up_scale[1, expert]
        )
        assert_close(hidden_rows[row], want_hidden[0], 3)
        down = scaled(weights.down[1, expert], weights.down_scale[1, expert][:, None])
        product = np.asarray(jnp.asarray(inner_rows[row] @ down.T, jnp.bfloat16), np.float32)
        want[token] += product * float(routing[token, choice])
    assert_close(np.asarray(out), want, 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_experts_meet_the_products_of_their_own_tokens(
    architecture: Architecture, name: str
) -> None:
    run(CASES[name], architecture, is_staged=False)


def test_rows_staged_by_the_kernel_serve_as_well() -> None:
    case = CASES["all tokens on one expert, over two tiles"]
    run(case, "sm90", is_staged=True)


def test_ways_to_cut_the_work_make_the_same_bits() -> None:
    x, x_scale = random_tokens(0, 40, 384)
    weights, shared = random_weights(1, (1, 3), 384, 64), random_weights(2, (1,), 384, 192)
    picks = jax.random.randint(jax.random.key(3), (40, 1), 0, 3)
    plan = dispatch(picks, jnp.int32(0), 3, tile=32)
    in_use = int(plan.num_tiles[0]) * 32

    def hidden(config: TuningConfig) -> list[np.ndarray]:
        outs = grouped_gate_up(
            x, x_scale, plan, weights.gate_up, weights.gate_up_scale, jnp.int32(0),
            shared_values=shared.gate_up, shared_scale=shared.gate_up_scale,
            chip=Chip("sm90", 4), config=config, interpret=True,
        )  # fmt: skip
        return [np.asarray(outs[0])[:in_use], np.asarray(outs[1])]

    def answers(config: TuningConfig) -> list[np.ndarray]:
        # Routed rows have K of 384, the shared expert's of 192: tiles of three steps and of two.
        rows = random_tokens(4, plan.tokens.shape[0], 384)
        outs = grouped_down(
            *rows, plan, weights.gate_up[:, :, 0], weights.gate_up_scale[:, :, 0], jnp.int32(0),
            shared_hidden=x[:, :192], shared_hidden_scale=x_scale,
            shared_values=shared.gate_up[:, 0, :64, :192], shared_scale=shared.gate_up_scale[:, 0, :64],
            chip=Chip("sm90", 2), config=config, interpret=True,
        )  # fmt: skip
        return [np.asarray(outs[0])[:in_use], np.asarray(outs[1])]

    plain = TuningConfig(tokens=32, rows=64, stages=3)
    wide = TuningConfig(tokens=32, rows=64, stages=2, step=256)
    by_warp = TuningConfig(tokens=32, rows=64, stages=3, ctas_per_sm=2, is_fed_by_warp=True)
    turns = TuningConfig(tokens=32, rows=64, warpgroups=2, stages=2, takes_turns=True, store=16)
    stacked = TuningConfig(tokens=32, rows=64, stages=3, fill=32, is_stacked=True)
    cut = TuningConfig(tokens=32, rows=64, stages=3, fill=64, last_cuts=4)
    cut_stack = TuningConfig(tokens=32, rows=64, stages=3, fill=32, is_stacked=True, last_cuts=2)
    for run_of, others in (
        (hidden, (wide, by_warp, turns, stacked, cut, cut_stack)),
        (answers, (wide, by_warp, turns)),
    ):
        expected = run_of(plain)
        for config in others:
            for out, want in zip(run_of(config), expected, strict=True):
                np.testing.assert_array_equal(out, want)


def test_no_local_expert_is_picked() -> None:
    x, x_scale = random_tokens(0, 3, 128)
    weights = random_weights(1, (1, 2), 128, 64)
    plan = dispatch(jnp.zeros((3, 1), jnp.int32), jnp.int32(4), 2)
    hidden, _ = grouped_gate_up(
        x, x_scale, plan, weights.gate_up, weights.gate_up_scale, jnp.int32(0),
        chip=Chip("sm90", 2), interpret=True,
    )  # fmt: skip
    rows = jnp.full((hidden.shape[0], 128), jnp.nan, jnp.bfloat16)
    out = combine(rows, None, plan.rows, jnp.ones((3, 1)))
    np.testing.assert_array_equal(np.asarray(out), 0.0)


def test_the_tile_of_the_rows_is_the_tile_of_the_kernel() -> None:
    x, x_scale = random_tokens(0, 3, 128)
    weights = random_weights(1, (1, 2), 128, 64)
    plan = dispatch(jnp.zeros((3, 1), jnp.int32), jnp.int32(0), 2, tile=16)
    with pytest.raises(ValueError, match="tiles of 16 rows"):
        grouped_gate_up(
            x, x_scale, plan, weights.gate_up, weights.gate_up_scale, jnp.int32(0),
            chip=Chip("sm90", 2), config=TuningConfig(tokens=32, rows=64), interpret=True,
        )  # fmt: skip


@pytest.mark.parametrize(("seed", "width", "shared_width"), [(0, 384, 192), (1, 64, 128)])
def test_hidden_rows_are_quantized_to_the_bit(seed: int, width: int, shared_width: int) -> None:
    keys = jax.random.split(jax.random.key(seed), 2)
    hidden = jax.random.normal(keys[0], (32, width)).astype(jnp.bfloat16)
    shared = jax.random.normal(keys[1], (5, shared_width)).astype(jnp.bfloat16)
    hidden, shared = hidden.at[3].set(0), shared.at[4].multiply(1e-38)
    plan = Dispatch(
        jnp.zeros(32, jnp.int32), jnp.zeros((5, 1), jnp.int32), jnp.zeros(2, jnp.int32),
        jnp.ones(1, jnp.int32),
    )  # fmt: skip
    (values, scale), shared_pair = quantize_hidden(hidden, shared, plan, interpret=True)
    assert shared_pair is not None
    want, want_scale = quantize_rows(hidden[:16])
    want_shared, want_shared_scale = quantize_rows(shared)
    for out, expected in [
        (values[:16], want), (scale[:16], want_scale),
        (shared_pair[0], want_shared), (shared_pair[1], want_shared_scale),
    ]:  # fmt: skip
        assert out.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
