"""Which wheels compile for GPUs that are not there."""

from importlib.metadata import PackageNotFoundError

import pytest

from glm_jax.aot import topology

CUDA_12 = {"jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"}
CUDA_13 = {"jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"}


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        (CUDA_12, set()),
        (CUDA_13, set()),
        (CUDA_12 - {"jax-cuda12-pjrt"}, {"jax-cuda12-pjrt"}),
        (CUDA_13 - {"nvidia-cuda-nvcc"}, CUDA_12),
        (set(), CUDA_12),
    ],
)
def test_the_wheels_of_either_cuda_are_enough(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], missing: set[str]
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(topology, "version", version)
    assert set(topology.missing_wheels()) == missing
