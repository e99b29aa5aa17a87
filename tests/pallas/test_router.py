"""The router's kernels against the layer's own arithmetic."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array

from glm_jax import ops
from glm_jax.pallas import router
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.router import TuningConfig, route

CHIPS = {"sm90": Chip("sm90", 4), "sm100": Chip("sm100", 4)}
SPLIT = TuningConfig(16, is_split=True, stages=2)
WHOLE = TuningConfig(32, is_split=False, stages=2)
SCALING = 2.5


def route_reference(
    x: Array, weight: Array, bias: Array, layer: int, num_picks: int, norm: bool = True
) -> tuple[Array, Array]:
    """What moe.Router does."""
    scores = jax.nn.sigmoid(ops.router_logits(x, weight, layer))
    _, experts = lax.top_k(scores + bias[layer][None], num_picks)
    weights = jnp.take_along_axis(scores, experts, axis=1)
    if norm:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return experts, weights * SCALING


def draw(
    seed: int, num_tokens: int, width: int, num_experts: int, num_layers: int = 2
) -> tuple[Array, Array, Array]:
    """x, weight and bias; the bias is as large as differences of scores are."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (num_tokens, width), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (num_layers, num_experts, width), jnp.bfloat16)
    bias = jax.random.normal(keys[2], (num_layers, num_experts), jnp.float32) / 4
    return x, weight * jnp.bfloat16(width**-0.5), bias


def run(
    architecture: str,
    x: Array,
    weight: Array,
    bias: Array,
    layer: int,
    num_picks: int,
    config: TuningConfig | None = None,
    norm: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    kernel = partial(
        route,
        num_experts_per_tok=num_picks,
        norm_topk_prob=norm,
        routed_scaling_factor=SCALING,
        chip=CHIPS[architecture],
        config=config,
        interpret=True,
    )
    experts, weights = jax.jit(kernel)(x, weight, bias, jnp.int32(layer))
    return np.asarray(experts), np.asarray(weights)


@pytest.mark.parametrize(("seed", "config"), [(0, SPLIT), (1, WHOLE)], ids=["split", "whole"])
@pytest.mark.parametrize("architecture", CHIPS)
def test_picks_and_weighs_as_the_layer_does(
    architecture: str, seed: int, config: TuningConfig
) -> None:
    x, weight, bias = draw(seed, 3, 512, 40)
    experts, weights = run(architecture, x, weight, bias, 1, 8, config)
    expected, expected_weights = route_reference(x, weight, bias, 1, 8)
    np.testing.assert_array_equal(experts, expected)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


def test_picks_any_number_with_raw_weights_over_several_tiles_of_tokens() -> None:
    x, weight, bias = draw(2, 67, 256, 16)
    experts, weights = run("sm90", x, weight, bias, 0, 3, norm=False)
    expected, expected_weights = route_reference(x, weight, bias, 0, 3, norm=False)
    np.testing.assert_array_equal(experts, expected)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


@pytest.mark.parametrize(("num_experts", "first"), [(48, 5), (136, 60)])
@pytest.mark.parametrize("is_many", [False, True])
def test_the_lower_index_wins_among_equal_scores(
    num_experts: int, first: int, is_many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_many:
        monkeypatch.setattr(router, "_MOST_WAITING", 0)
    x, weight, bias = draw(0, 2, 256, num_experts)
    weight = weight.at[0, first:].set(weight[0, first])
    bias = bias.at[0].set(jnp.where(jnp.arange(num_experts) < first, -1.0, 0.125))
    experts, weights = run("sm90", x, weight, bias, 0, 8)
    np.testing.assert_array_equal(experts, np.arange(first, first + 8)[None].repeat(2, axis=0))
    np.testing.assert_allclose(weights, SCALING / 8, rtol=1e-5)


@pytest.mark.parametrize("most_waiting", [0, 1024])
def test_picks_of_many_and_of_few_tokens_are_the_same(
    most_waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_MOST_WAITING", most_waiting)
    x, weight, bias = draw(4, 3, 256, 160)
    experts, weights = run("sm90", x, weight, bias, 1, 8)
    expected, expected_weights = route_reference(x, weight, bias, 1, 8)
    np.testing.assert_array_equal(experts, expected)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


def test_a_tokens_bits_depend_neither_on_other_tokens_nor_on_how_the_work_is_cut() -> None:
    x, weight, bias = draw(1, 5, 512, 32)
    # As wide as the whole: a CPU's products of interpretation may add another way for other widths.
    split = TuningConfig(WHOLE.experts, is_split=True, stages=2)
    experts, weights = run("sm90", x, weight, bias, 0, 8, split)
    for config in (split, WHOLE):
        alone, weights_alone = run("sm90", x[3:4], weight, bias, 0, 8, config)
        np.testing.assert_array_equal(alone[0], experts[3])
        np.testing.assert_array_equal(weights_alone[0], weights[3])


def test_what_is_not_a_number_still_picks_experts_that_exist() -> None:
    x, weight, bias = draw(0, 2, 256, 24)
    experts, _ = run("sm90", x.at[1].set(jnp.nan), weight, bias, 0, 8)
    assert ((experts >= 0) & (experts < 24)).all()
    np.testing.assert_array_equal(experts[0], route_reference(x, weight, bias, 0, 8)[0][0])


def test_shapes_that_are_not_supported_are_named() -> None:
    x, weight, bias = draw(0, 2, 384, 24)
    with pytest.raises(NotImplementedError, match="width=384"):
        run("sm90", x, weight, bias, 0, 8)
    x, weight, bias = draw(0, 2, 256, 8)
    with pytest.raises(ValueError, match="num_experts_per_tok=9"):
        run("sm90", x, weight, bias, 0, 9)
    with pytest.raises(ValueError, match="experts=24"):
        TuningConfig(24, is_split=True, stages=2)
