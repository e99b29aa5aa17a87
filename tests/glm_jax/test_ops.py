"""The linear operations against float64: right, and the same bits for a row in any company."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import ops
from tests.glm_jax.tiny import BF16, F32, bits, compiled, quantize, wide

# How operands meet, as "activations x weights".
KINDS = ["float32", "bfloat16", "float32 x fp8", "bfloat16 x fp8"]
COMPANIES = (1, 2, 3, 16, 17)  # rows beside each other; 64 are the reference
ONE = 1  # index of the layer under test, neither first nor last of three


@dataclass(frozen=True, slots=True)
class Weight:
    """A stacked weight, its scale if it is FP8, and the real numbers it stands for."""

    values: jax.Array
    scale: jax.Array | None
    real: np.ndarray


def draw(kind: str, *shape: int, seed: int = 0) -> Weight:
    drawn = np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])
    if not kind.endswith("fp8"):
        values = drawn.astype(dtype_of(kind))
        return Weight(jnp.asarray(values), None, wide(values))
    values, scale = quantize(drawn)
    real = wide(values) * wide(scale)[..., None]
    return Weight(jnp.asarray(values), jnp.asarray(scale), real)


def dtype_of(kind: str) -> np.dtype:
    return {"float32": F32, "bfloat16": BF16}[kind.split(" ")[0]]


def rows_of(kind: str, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype_of(kind))


def as_met(x: np.ndarray, kind: str) -> np.ndarray:
    """The activations in float64 as they meet a weight: through FP8 if it is FP8."""
    if not kind.endswith("fp8"):
        return wide(x)
    values, scale = quantize(x.astype(np.float32))
    return wide(values) * wide(scale)[..., None]


def assert_near(actual: np.ndarray, expected: np.ndarray, terms: np.ndarray | float = 0.0) -> None:
    """Within one rounding to the dtype, and float32's rounding of a sum of that many magnitudes."""
    half_unit = float(jnp.finfo(actual.dtype).eps) / 2
    allowed = 1.01 * half_unit * np.abs(expected) + 1e-6 * terms
    assert (np.abs(wide(actual) - expected) <= allowed).all()


def assert_same_in_any_company(
    function: Callable[..., np.ndarray], rows: np.ndarray, axis: int = 0
) -> None:
    """Each of 64 rows gives the same bits alone, first, last, and among others."""
    everything = bits(function(rows))
    for size in COMPANIES:
        for start in (0, 41):
            part = bits(function(rows[start : start + size]))
            np.testing.assert_array_equal(part, everything.take(range(start, start + size), axis))
    np.testing.assert_array_equal(bits(function(rows[::-1].copy())), np.flip(everything, axis))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matmul_is_the_product_of_its_real_operands_rounded_once(kind: str, has_bias: bool) -> None:
    x, weight = rows_of(kind, 5, 96), draw(kind, 3, 4, 10, 96)
    bias = rows_of(kind, 3, 4, 10, seed=2) if has_bias else None
    actual = compiled(ops.matmul)(x, weight.values, weight.scale, bias, ONE)
    assert actual.shape == (5, 4, 10) and actual.dtype == x.dtype
    met = as_met(x, kind)
    expected = np.einsum("tk,hok->tho", met, weight.real[ONE])
    terms = np.einsum("tk,hok->tho", np.abs(met), np.abs(weight.real[ONE]))
    if bias is not None:
        expected, terms = expected + wide(bias[ONE]), terms + np.abs(wide(bias[ONE]))
    assert_near(actual, expected, terms)


@pytest.mark.parametrize("kind", KINDS)
def test_matmul_takes_the_layer_asked_for(kind: str) -> None:
    x, weight = rows_of(kind, 2, 32), draw(kind, 3, 8, 32)
    matmul = compiled(ops.matmul)
    for layer in range(3):
        actual = matmul(x, weight.values, weight.scale, None, np.int32(layer))
        assert_near(actual, as_met(x, kind) @ weight.real[layer].T, terms=10.0)


@pytest.mark.parametrize(("width", "outputs"), [(64, 48), (1024, 24), (16, 1000)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_product_has_the_same_bits_in_any_company(
    kind: str, width: int, outputs: int
) -> None:
    weight = draw(kind, 1, outputs, width)
    matmul = compiled(lambda x: ops.matmul(x, weight.values, weight.scale, None, 0))
    assert_same_in_any_company(matmul, rows_of(kind, 64, width))


@pytest.mark.parametrize("kind", KINDS)
def test_partial_products_are_cut_along_the_input_each_group_by_its_own_scale(kind: str) -> None:
    x, weight = rows_of(kind, 5, 96), draw(kind, 3, 24, 96)
    x[:, :32] *= 100  # one scale for the whole row would lose the other two groups
    actual = compiled(ops.partial_matmul, group_size=32)(x, weight.values, weight.scale, ONE)
    assert actual.shape == (3, 5, 24) and actual.dtype == np.float32
    for group, partial in enumerate(actual):
        columns = slice(32 * group, 32 * group + 32)
        met, real = as_met(x[:, columns], kind), weight.real[ONE, :, columns]
        assert_near(partial, met @ real.T, np.abs(met) @ np.abs(real).T)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_products_do_not_depend_on_the_groups_a_device_holds(kind: str) -> None:
    x, weight = rows_of(kind, 6, 128), draw(kind, 1, 24, 128)
    partials = compiled(ops.partial_matmul, group_size=16)
    together = partials(x, weight.values, weight.scale, 0)
    apart = [
        partials(x[:, columns], weight.values[..., columns], weight.scale, 0)
        for columns in (slice(start, start + 16) for start in range(0, 128, 16))
    ]
    np.testing.assert_array_equal(bits(together), bits(np.concatenate(apart)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_partial_products_have_the_same_bits_in_any_company(kind: str) -> None:
    weight = draw(kind, 1, 48, 128)
    partials = compiled(
        lambda x: ops.partial_matmul(x, weight.values, weight.scale, 0, group_size=32)
    )
    assert_same_in_any_company(partials, rows_of(kind, 64, 128), axis=1)


def test_gated_silu_rounds_the_silu_before_the_product() -> None:
    for dtype in (F32, BF16):
        gate_up = (4 * np.random.default_rng(0).normal(size=(50, 2, 8))).astype(dtype)
        gate, up = wide(gate_up)[:, 0], wide(gate_up)[:, 1]
        silu = gate / (1 + np.exp(-gate))
        actual = compiled(ops.gated_silu)(gate_up)
        assert actual.dtype == dtype and actual.shape == (50, 8)
        if dtype == BF16:
            silu = wide(silu.astype(np.float32).astype(BF16))
        np.testing.assert_allclose(wide(actual), silu * up, rtol=1.01 * 2**-8, atol=1e-30)
        if dtype == F32:
            np.testing.assert_allclose(wide(actual), silu * up, rtol=1e-6)


@dataclass(frozen=True, slots=True)
class Experts:
    """Stacked experts, 3 layers of them, and what one of layer ONE gives for one token."""

    gate_up: Weight
    down: Weight
    kind: str

    def arguments(self) -> tuple[Any, ...]:
        pairs = ((self.gate_up.values, self.gate_up.scale), (self.down.values, self.down.scale))
        return (*pairs[0], *pairs[1])

    def answer(self, x: np.ndarray, expert: int) -> np.ndarray:
        """float64[D] for x[D]; rounded where the activations are kept, not within a product."""
        gate, up = self.gate_up.real[ONE, expert] @ as_met(x, self.kind)
        hidden = (gate / (1 + np.exp(-gate)) * up).astype(np.float32).astype(x.dtype)
        return self.down.real[ONE, expert] @ as_met(hidden, self.kind)


NUM_EXPERTS, WIDTH, INNER, GROUP = 6, 32, 48, 3


def sums_of_experts(x: jax.Array, *arguments: Any) -> jax.Array:
    is_fp8 = arguments[2] is not None  # the scale of gate_up
    return ops.experts(ops.as_rows(x, is_fp8=is_fp8), *arguments, group_size=GROUP)


run_experts = compiled(sums_of_experts)


def make_experts(kind: str) -> Experts:
    gate_up = draw(kind, 3, NUM_EXPERTS, 2, INNER, WIDTH, seed=3)
    return Experts(gate_up, draw(kind, 3, NUM_EXPERTS, WIDTH, INNER, seed=4), kind)


def chosen_at_random(num_tokens: int, among: tuple[int, ...]) -> np.ndarray:
    """Weights of two experts a token, none outside `among`."""
    rng = np.random.default_rng(5)
    routing = np.zeros((num_tokens, NUM_EXPERTS), np.float32)
    for row in routing:
        row[rng.choice(among, 2, replace=False)] = rng.uniform(0.2, 2, 2)
    return routing


def one_by_one(experts: Experts, x: np.ndarray, routing: np.ndarray) -> np.ndarray:
    """Token by token, expert by expert: float64[R, T, D]."""
    out = np.zeros((NUM_EXPERTS // GROUP, *x.shape))
    for token, expert in zip(*np.nonzero(routing), strict=True):
        weight = float(routing[token, expert])
        out[expert // GROUP, token] += weight * experts.answer(x[token], expert)
    return out


# Where an intermediate lies on the edge between two roundings, the oracle may take the other one.
TOLERANCE = {"float32": 1e-6, "bfloat16": 6e-3, "float32 x fp8": 2e-3, "bfloat16 x fp8": 2e-2}


@pytest.mark.parametrize("among", [tuple(range(NUM_EXPERTS)), (0, 5), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_answer_as_if_token_by_token(kind: str, among: tuple[int, ...]) -> None:
    experts, x = make_experts(kind), rows_of(kind, 9, WIDTH)
    routing = chosen_at_random(9, among)
    actual = run_experts(x, routing, *experts.arguments(), ONE)
    expected = one_by_one(experts, x, routing)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[kind]
    for group in range(NUM_EXPERTS // GROUP):  # exact zeros where nothing was chosen
        nobody = ~routing[:, group * GROUP : (group + 1) * GROUP].any(axis=1)
        np.testing.assert_array_equal(actual[group, nobody], 0)


def test_every_token_may_choose_the_same_expert() -> None:
    experts, x = make_experts("float32"), rows_of("float32", 20, WIDTH)
    routing = np.zeros((20, NUM_EXPERTS), np.float32)
    routing[:, 4] = 0.5
    actual = run_experts(x, routing, *experts.arguments(), ONE)
    np.testing.assert_allclose(actual, one_by_one(experts, x, routing), atol=1e-5)


def overflowing(weight: Weight) -> Weight:
    """The same but for experts 2 and 5, whose products are beyond any float."""

    def overflow(array: jax.Array) -> jax.Array:
        return array.at[:, 2].set(1e30).at[:, 5].set(jnp.inf)

    if weight.scale is not None:
        return dataclasses.replace(weight, scale=overflow(weight.scale))
    return dataclasses.replace(weight, values=overflow(weight.values))


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_in_an_expert_nobody_chose_does_not_spread(kind: str) -> None:
    experts, x = make_experts(kind), rows_of(kind, 9, WIDTH)
    routing = chosen_at_random(9, (0, 1, 4))
    calm = run_experts(x, routing, *experts.arguments(), ONE)
    gate_up, down = (overflowing(weight) for weight in (experts.gate_up, experts.down))
    wild = run_experts(x, routing, *Experts(gate_up, down, kind).arguments(), ONE)
    np.testing.assert_array_equal(bits(calm), bits(wild))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_experts_have_the_same_bits_in_any_company(kind: str) -> None:
    experts = make_experts(kind)
    routing = chosen_at_random(64, tuple(range(NUM_EXPERTS)))
    # The routing travels beside its token, so that both are cut and turned alike.
    both = np.concatenate([rows_of(kind, 64, WIDTH), routing.astype(dtype_of(kind))], axis=1)
    run = compiled(
        lambda both: sums_of_experts(
            both[:, :WIDTH], both[:, WIDTH:].astype(jnp.float32), *experts.arguments(), ONE
        )
    )
    assert_same_in_any_company(run, both, axis=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_router_multiplies_at_full_precision(dtype: str) -> None:
    x, weight = rows_of(dtype, 7, 256), draw(dtype, 2, 16, 256)
    logits = compiled(ops.router_logits)(x, weight.values, ONE)
    assert logits.dtype == np.float32
    met, real = wide(x), weight.real[ONE]
    assert_near(logits, met @ real.T, np.abs(met) @ np.abs(real).T)
    router = compiled(lambda x: ops.router_logits(x, weight.values, ONE))
    assert_same_in_any_company(router, rows_of(dtype, 64, 256))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vocab_logits_are_not_rounded_to_the_activations_dtype(dtype: str) -> None:
    x, table = rows_of(dtype, 7, 64), draw(dtype, 100, 64)
    logits = compiled(ops.vocab_logits)(x, table.values)
    assert logits.dtype == np.float32
    assert_near(logits, wide(x) @ table.real.T, np.abs(wide(x)) @ np.abs(table.real).T)
    head = compiled(lambda x: ops.vocab_logits(x, table.values))
    assert_same_in_any_company(head, rows_of(dtype, 64, 64))


def test_products_of_float32_ask_for_full_precision() -> None:
    """On a GPU anything less means TF32, which no CPU run would show."""
    x, weight = jnp.ones((20, 16)), jnp.ones((1, 8, 16))
    text = str(jax.make_jaxpr(lambda: ops.matmul(x, weight, None, None, 0))())
    assert "Precision.HIGHEST" in text
