"""Who compiles: what can be loaded decides, as it does for jax."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from glm_jax.pallas import linked


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where NVIDIA's wheels are, with a plugin for CUDA 13."""
    specs = {
        "nvidia": SimpleNamespace(submodule_search_locations=[str(tmp_path)]),
        "jax_cuda13_plugin": SimpleNamespace(),
    }
    monkeypatch.setattr(importlib.util, "find_spec", specs.get)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    return tmp_path / "cu13" / "lib" / "libnvJitLink.so.13"


def test_a_library_that_can_be_loaded_is_used(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linked, "_loads", lambda path: path == str(wheels))
    assert linked.is_linked.__wrapped__()


def test_a_file_that_is_no_library_is_none(wheels: Path) -> None:
    wheels.parent.mkdir(parents=True)
    wheels.write_bytes(b"no library")
    assert not linked.is_linked.__wrapped__()


def test_jax_before_0_12_asks_nobody(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linked, "_loads", lambda path: True)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert wheels and not linked.is_linked.__wrapped__()
