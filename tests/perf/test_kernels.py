"""The measurement of kernels: rehearsed on a CPU in every run, made on a GPU where perf is asked for."""

import jax
import pytest

from tests.perf import kernels


@pytest.mark.slow
def test_every_case_is_right_at_tiny_sizes() -> None:
    assert not kernels.rehearse()


def test_a_result_is_a_row_that_names_the_best_alternative() -> None:
    result = {
        "kernel": "norm",
        "shape": "T=64",
        "error": 1e-4,
        "is_right": True,
        "us": 4.0,
        "floor_us": 1.0,
        "small_floor_us": 2.5,
        "alternatives": {"XLA": {"us": 9.0}},
        "peers_us": {"torch": 6.0},
    }
    assert kernels.row(result) == "| norm | T=64 | 1.0e-04 | 4.0 | 1.0 | 25 % | 2.5 | 6.0 (torch) |"
    assert "**wrong**" in kernels.row({**result, "is_right": False})
    assert "no such shape" in kernels.row({**result, "failed": "no such shape"})


@pytest.mark.perf
@pytest.mark.gpu
def test_every_case_is_right_and_timed_on_this_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    assert not [
        result
        for result in kernels.run(only="", seconds=480)["results"]
        if not result.get("is_right")
    ]
