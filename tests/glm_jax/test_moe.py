"""Routing as published, and expert layers that give the same bits on every mesh."""

from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.config import ModelConfig
from glm_jax.model import abstract_weights
from glm_jax.moe import Routing
from glm_jax.ops import as_rows
from glm_jax.sharding import sum_partials
from tests.glm_jax.tiny import BF16, F32, bits, make_arrays, make_config, on_mesh, wide

LAYERS: dict[str, Any] = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
GATE = "layers.moe.gate"


def hidden_states(count: int, width: int, dtype: np.dtype, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(dtype)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def route(config: ModelConfig, dtype: np.dtype, x: np.ndarray, layer: int, **changed: Any) -> Any:
    """The router's answer; `changed` are weights of the gate in place of the random ones."""

    def body(model: Any, x: jax.Array, *arrays: jax.Array) -> Routing:
        gate = model.layers.moe.gate
        for name, array in zip(changed, arrays, strict=True):
            getattr(gate, name)[...] = array
        return gate(x, layer)

    return on_mesh(config, dtype, 1, body)(x, *changed.values())


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tokens_go_to_the_best_by_score_plus_correction_weighed_by_score_alone(
    dtype: np.dtype, norm_topk_prob: bool
) -> None:
    config = make_config(norm_topk_prob=norm_topk_prob, **LAYERS)
    weights = make_arrays(abstract_weights(config, dtype))
    x = hidden_states(50, config.hidden_size, dtype)
    for layer in range(2):
        actual = route(config, dtype, x, layer)
        scores = sigmoid(wide(x) @ wide(weights[f"{GATE}.weight"])[layer].T)
        corrected = scores + wide(weights[f"{GATE}.e_score_correction_bias"])[layer]
        best = np.argsort(-corrected, axis=-1)[:, : config.num_experts_per_tok]
        assert (best != np.argsort(-scores, axis=-1)[:, :3]).any()  # the correction shows
        np.testing.assert_array_equal(actual.experts, best)
        expected = np.take_along_axis(scores, best, axis=-1)
        if norm_topk_prob:
            expected = expected / expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(actual.weights, 2.5 * expected, rtol=1e-5)
        np.testing.assert_allclose(actual.scores, scores, rtol=1e-5)
        assert actual.weights.dtype == actual.scores.dtype == np.float32


def test_a_large_correction_decides_the_choice_and_leaves_the_weight_alone() -> None:
    config = make_config(norm_topk_prob=False, routed_scaling_factor=1.0, **LAYERS)
    x = hidden_states(20, config.hidden_size, F32)
    correction = np.zeros((2, config.n_routed_experts), np.float32)
    correction[:, [2, 9, 4]] = [300.0, 200.0, 100.0]
    actual = route(config, F32, x, 0, e_score_correction_bias=correction)
    np.testing.assert_array_equal(actual.experts, np.tile([2, 9, 4], (20, 1)))
    np.testing.assert_array_equal(actual.weights, actual.scores[:, [2, 9, 4]])


def test_scores_that_vanish_give_no_nan() -> None:
    config = make_config(**LAYERS)
    x = np.ones((4, config.hidden_size), np.float32)
    weight = np.full((2, config.n_routed_experts, config.hidden_size), -1e3, np.float32)
    actual = route(config, F32, x, 0, weight=weight)
    assert np.isfinite(actual.weights).all()


def moe_layer(model: Any, x: jax.Array) -> jax.Array:
    partials, _ = model.layers.moe(as_rows(x, is_fp8=model.layers.is_fp8), 1)
    return sum_partials(partials, x.dtype)


def dense_layer(model: Any, x: jax.Array) -> jax.Array:
    rows = as_rows(x, is_fp8=model.layers.is_fp8)
    return sum_partials(model.layers.dense_mlp(rows, 0), x.dtype)


def gated(gate_up: np.ndarray, down: np.ndarray, x: np.ndarray) -> np.ndarray:
    gate, up = (x @ matrix.T for matrix in gate_up)
    return (gate * sigmoid(gate) * up) @ down.T


@pytest.mark.parametrize("n_shared_experts", [1, 2])
def test_a_token_gets_its_experts_weighed_and_the_shared_one_as_it_is(
    n_shared_experts: int,
) -> None:
    config = make_config(n_shared_experts=n_shared_experts, **LAYERS)
    weights = {k: wide(v) for k, v in make_arrays(abstract_weights(config, F32)).items()}
    x = hidden_states(30, config.hidden_size, F32)
    routing = route(config, F32, x, 1)

    def mlp(place: str, index: Any) -> tuple[np.ndarray, np.ndarray]:
        names = (f"layers.moe.{place}.{name}.values" for name in ("gate_up_proj", "down_proj"))
        gate_up, down = (weights[name][index] for name in names)
        return gate_up, down

    expected = gated(*mlp("shared_experts", 1), wide(x))
    for token, (experts, shares) in enumerate(zip(routing.experts, routing.weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            expected[token] += share * gated(*mlp("experts", (1, expert)), wide(x[token]))
    actual = on_mesh(config, F32, 8, moe_layer)(x)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_the_dense_mlp_is_its_three_products() -> None:
    config = make_config(**LAYERS)
    weights = make_arrays(abstract_weights(config, F32))
    names = (f"layers.dense_mlp.{name}.values" for name in ("gate_up_proj", "down_proj"))
    gate_up, down = (wide(weights[name])[0] for name in names)
    x = hidden_states(5, config.hidden_size, F32)
    actual = on_mesh(config, F32, 8, dense_layer)(x)
    np.testing.assert_allclose(actual, gated(gate_up, down, wide(x)), atol=1e-5)


@pytest.mark.parametrize("layer", [moe_layer, dense_layer])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_expert_and_dense_layers_have_the_same_bits_on_every_mesh(layer: Any, is_fp8: bool) -> None:
    config = make_config(is_fp8=is_fp8, hidden_size=128, **LAYERS)
    x = hidden_states(60, config.hidden_size, BF16)
    one, two, eight = (bits(on_mesh(config, BF16, n, layer)(x)) for n in (1, 2, 8))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, eight)


def test_a_token_is_routed_the_same_in_any_company() -> None:
    config = make_config(**LAYERS)
    x = hidden_states(40, config.hidden_size, BF16)
    moe = on_mesh(config, BF16, 8, moe_layer)
    together = bits(moe(x))
    for part in (slice(0, 1), slice(7, 10), slice(20, 40)):
        np.testing.assert_array_equal(bits(moe(x[part])), together[part])
