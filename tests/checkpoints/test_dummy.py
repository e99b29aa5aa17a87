"""Dummy weights: the right shapes and places, the same on any mesh, and of a sensible size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.dummy import dummy_weights
from glm_jax.model import abstract_weights
from glm_jax.sharding import make_mesh, sharding_for
from tests.checkpoints.samples import BF16, make_config

CONFIG = make_config(hidden_size=256, moe_intermediate_size=64)


def host(weights: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {path: np.asarray(weight) for path, weight in weights.items()}


@pytest.mark.parametrize("is_fp8", [True, False])
def test_every_weight_has_its_shape_dtype_and_place(is_fp8: bool) -> None:
    specs = abstract_weights(make_config(is_fp8=is_fp8), BF16)
    mesh = make_mesh(8)
    weights = dummy_weights(specs, mesh, seed=0)
    assert weights.keys() == specs.keys()
    for path, spec in specs.items():
        assert (weights[path].shape, weights[path].dtype) == (spec.shape, spec.dtype)
        assert weights[path].sharding == sharding_for(spec.axes, mesh)


def test_the_seed_alone_decides_the_values() -> None:
    specs = abstract_weights(CONFIG, BF16)
    one, again, eight, other = (
        host(dummy_weights(specs, make_mesh(num_devices), seed))
        for num_devices, seed in ((1, 3), (1, 3), (8, 3), (1, 4))
    )
    for path in specs:
        assert one[path].tobytes() == again[path].tobytes() == eight[path].tobytes()
        assert one[path].tobytes() != other[path].tobytes()


@pytest.mark.parametrize("is_fp8", [True, False])
def test_linear_outputs_have_about_0_7_times_the_size_of_inputs(is_fp8: bool) -> None:
    config = make_config(is_fp8=is_fp8, hidden_size=256, moe_intermediate_size=64)
    weights = host(dummy_weights(abstract_weights(config, jnp.dtype("float32")), make_mesh(1), 0))
    for path, weight in weights.items():
        if path.endswith("values") and path != "embed_tokens.values":
            values = weight.astype(np.float64)
            if is_fp8 and path != "lm_head.values":
                values *= weights[path.removesuffix("values") + "scale"][..., None]
            assert values.std() * weight.shape[-1] ** 0.5 == pytest.approx(0.7, rel=0.05), path
            assert abs(values.mean()) < 0.1 * values.std()
            rows = values.reshape(-1, values.shape[-1])
            assert np.linalg.matrix_rank(rows[: rows.shape[1]]) == min(rows.shape[1], rows.shape[0])


def test_nothing_is_infinite_and_no_scale_or_norm_is_near_zero() -> None:
    weights = host(dummy_weights(abstract_weights(CONFIG, BF16), make_mesh(1), seed=1))
    for path, weight in weights.items():
        assert np.isfinite(weight.astype(np.float32)).all(), path
        if path.endswith("norm.weight"):
            assert np.abs(weight.astype(np.float32) - 1).max() < 0.5
        if path.endswith("scale"):
            assert weight.min() > 0.5 * weight.mean()


def test_two_weights_of_one_shape_differ() -> None:
    weights = host(dummy_weights(abstract_weights(CONFIG, BF16), make_mesh(1), seed=0))
    assert weights["embed_tokens.values"].shape == weights["lm_head.values"].shape
    normed = [weights[path].tobytes() for path in weights if path.endswith("layernorm.weight")]
    assert normed[0] != normed[1]
