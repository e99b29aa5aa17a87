"""The small layers: where they round, what rotary turns, and a vocabulary split over devices."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glm_jax import ops
from glm_jax.layers import Linear, RMSNorm
from glm_jax.model import abstract_weights
from tests.glm_jax.tiny import BF16, F32, bits, compiled, make_arrays, make_config, on_mesh, wide

EPS = 1e-5


def make_norm(weight: np.ndarray, axes: tuple[str, ...] = ("embed",)) -> RMSNorm:
    norm = RMSNorm(weight.shape, axes, EPS, jnp.dtype(weight.dtype), rngs=nnx.Rngs(0))
    norm.weight[...] = jnp.asarray(weight)
    return norm


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rmsnorm_rounds_to_the_activations_before_the_weight(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(40, 64)) * 10.0 ** rng.integers(-3, 3, (40, 1))).astype(dtype)
    weight = (1 + 0.3 * rng.normal(size=64)).astype(dtype)
    exact = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + EPS)
    actual = compiled(make_norm(weight))(x, None)
    assert actual.dtype == dtype
    if dtype == F32:
        np.testing.assert_allclose(actual, exact * wide(weight), rtol=1e-6)
        return
    rounded_first = wide(exact.astype(np.float32).astype(BF16)) * wide(weight)
    expected = rounded_first.astype(np.float32).astype(BF16)
    rounded_last = (exact * wide(weight)).astype(np.float32).astype(BF16)
    assert (bits(expected) != bits(rounded_last)).mean() > 0.1  # the order shows in these numbers
    assert (bits(actual) != bits(expected)).mean() < 0.002  # the square root is not exact


def test_rmsnorm_of_heads_takes_the_layer_asked_for() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(3, 8)).astype(np.float32)
    x = rng.normal(size=(2, 5, 4, 8)).astype(np.float32)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    norm = compiled(make_norm(weight, ("layers", "head_dim")))
    for layer in range(3):
        np.testing.assert_allclose(norm(x, np.int32(layer)), normed * weight[layer], rtol=1e-5)


def test_rmsnorm_of_zeros_is_zeros() -> None:
    norm = compiled(make_norm(np.ones(8, np.float32)))
    np.testing.assert_array_equal(norm(np.zeros((2, 8), np.float32), None), 0)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_a_linear_layer_has_only_the_parameters_it_needs(is_fp8: bool, use_bias: bool) -> None:
    axes = ("layers", "mlp", "embed")
    linear = Linear((2, 6, 4), axes, F32, is_fp8=is_fp8, use_bias=use_bias, rngs=nnx.Rngs(0))
    found = {str(path[0]): param for path, param in nnx.to_flat_state(nnx.state(linear, nnx.Param))}
    names = ["values"] + ["scale"] * is_fp8 + ["bias"] * use_bias
    assert sorted(found) == sorted(names)
    for name, param in found.items():
        assert param.get_metadata("axes") == (axes if name == "values" else axes[:-1])


def turned(x: np.ndarray, positions: np.ndarray, rotary_dim: int, theta: float) -> np.ndarray:
    """Dimension i and i + half as one complex number, turned by its angle; float64."""
    half = rotary_dim // 2
    angle = positions[..., None] * theta ** (-2 * np.arange(half) / rotary_dim)
    pairs = (x[..., :half] + 1j * x[..., half:rotary_dim]) * np.exp(1j * angle)[..., None, :]
    return np.concatenate([pairs.real, pairs.imag, x[..., rotary_dim:]], axis=-1)


def rotation(rotary_dim: int, theta: float) -> Any:
    return compiled(lambda x, positions: ops.rotate(x, positions, rotary_dim, theta))


@pytest.mark.parametrize("rotary_dim", [8, 16])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotary_turns_pairs_half_a_width_apart(rotary_dim: int, theta: float) -> None:
    x = np.random.default_rng(2).normal(size=(2, 7, 3, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 5, 8, 13], [40, 41, 100, 500, 999, 1000, 4095]], np.int32)
    actual = rotation(rotary_dim, theta)(x, positions)
    # An angle of 4095 radians has an error of 2**-13 in float32.
    np.testing.assert_allclose(actual, turned(wide(x), positions, rotary_dim, theta), atol=2e-3)
    np.testing.assert_allclose(
        actual[0], turned(wide(x[0]), positions[0], rotary_dim, theta), atol=1e-5
    )
    np.testing.assert_array_equal(bits(actual[..., rotary_dim:]), bits(x[..., rotary_dim:]))
    np.testing.assert_array_equal(actual[0, 0], x[0, 0])


def test_rotary_products_depend_on_the_distance_alone() -> None:
    q, k = np.random.default_rng(3).normal(size=(2, 1, 1, 16)).astype(np.float32)
    turn = rotation(16, 1e4)

    def product(position: int, distance: int) -> float:
        turned_q = turn(q, np.array([position + distance], np.int32))
        return float((turned_q * turn(k, np.array([position], np.int32))).sum())

    assert product(0, 9) == pytest.approx(product(50, 9), abs=1e-4)
    assert product(0, 9) != pytest.approx(product(0, 8), abs=1e-2)


def test_rotary_rounds_its_sines_to_the_activations() -> None:
    x = np.random.default_rng(4).normal(size=(50, 2, 16)).astype(BF16)
    positions = np.arange(50, dtype=np.int32)
    angle = positions[:, None].astype(np.float32) * 1e4 ** (-np.arange(8, dtype=np.float32) / 8)
    cos, sin = (wide(f(angle).astype(np.float32).astype(BF16))[:, None] for f in (np.cos, np.sin))
    first, second = wide(x)[..., :8], wide(x)[..., 8:]

    def near(value: np.ndarray) -> np.ndarray:
        return wide(value.astype(np.float32).astype(BF16))

    expected = near(near(first * cos) - near(second * sin))
    actual = wide(rotation(16, 1e4)(x, positions))[..., :8]
    assert (actual != expected).mean() < 0.01


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_embedding_of_a_token_is_its_row_of_the_table(num_devices: int) -> None:
    config = make_config()
    table = make_arrays(abstract_weights(config, BF16))["embed_tokens.values"]
    tokens = np.arange(config.vocab_size, dtype=np.int32)[::-1].reshape(4, -1).copy()
    embed = on_mesh(config, BF16, num_devices, lambda model, ids: model.embed_tokens.embed(ids))
    np.testing.assert_array_equal(bits(embed(tokens)), bits(table[tokens]))


def test_logits_have_the_same_bits_on_every_mesh_in_the_order_of_the_vocabulary() -> None:
    config = make_config(vocab_size=256)
    table = make_arrays(abstract_weights(config, BF16))["lm_head.values"]
    x = np.random.default_rng(5).normal(size=(3, config.hidden_size)).astype(BF16)
    one, eight = (on_mesh(config, BF16, n, lambda model, x: model.logits(x))(x) for n in (1, 8))
    np.testing.assert_allclose(one, wide(x) @ wide(table).T, atol=1e-4)
    np.testing.assert_array_equal(bits(one), bits(eight))
