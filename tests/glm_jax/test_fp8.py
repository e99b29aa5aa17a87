"""FP8 rows: each by its own scale, never NaN, never further off than e4m3fn must be."""

import numpy as np
import pytest

from glm_jax.fp8 import FP8_MAX, quantize_rows
from tests.glm_jax.tiny import BF16, FP8, compiled, wide

quantize = compiled(quantize_rows)


def round_trip(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values * scale in float64, and the scale."""
    values, scale = quantize(x)
    assert values.dtype == FP8 and scale.dtype == np.float32
    assert scale.shape == (*x.shape[:-1], 1)
    return wide(values) * wide(scale), scale


def test_a_row_of_zeros_stays_zeros() -> None:
    x = np.zeros((2, 4), np.float32)
    x[1] = [1, -2, 0, 3]
    back, scale = round_trip(x)
    np.testing.assert_array_equal(back[0], 0)
    assert scale[0] == 1
    assert back[1, 2] == 0


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_each_row_has_its_own_scale_and_its_largest_survives(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5, 3, 64)) * 10.0 ** rng.integers(-12, 12, (5, 3, 1))).astype(dtype)
    back, scale = round_trip(x)
    largest = np.abs(wide(x)).max(-1)
    np.testing.assert_allclose(wide(scale)[..., 0], largest / FP8_MAX, rtol=1e-6)
    np.testing.assert_allclose(np.abs(back).max(-1), largest, rtol=1e-6)


def test_no_value_is_further_off_than_e4m3fn_must_be() -> None:
    x = np.random.default_rng(1).normal(size=(8, 512)).astype(np.float32)
    back, scale = round_trip(x)
    # Three mantissa bits: half of 2**-3 of the value, or half the least subnormal, 2**-9.
    allowed = np.maximum(np.abs(wide(x)) * 2**-4, wide(scale) * 2**-10) * (1 + 1e-6)
    assert (np.abs(back - wide(x)) <= allowed).all()


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 1e-37, 1e-35, 1.0, 448.0, 3.4e38])
def test_no_finite_row_gives_nan(largest: float) -> None:
    rng = np.random.default_rng(2)
    x = (rng.uniform(-1, 1, (16, 32)) * largest).astype(np.float32)
    x[:, 0], x[:, 1], x[:, 2] = largest, -largest, 0
    back, _ = round_trip(x)
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, x, atol=largest / 16 + 1e-35)


def test_the_largest_magnitudes_saturate_at_448() -> None:
    # Some, divided by their own 448th part, come out a little above 448.
    x = np.random.default_rng(3).uniform(0.5, 2, (4096, 1)).astype(np.float32)
    values, _ = quantize(x)
    np.testing.assert_array_equal(wide(values), FP8_MAX)
