"""Whether what is compiled here is compiled to be linked, where ptxas ignores setmaxnreg.

Knows no kernel. From 0.12 on, jax compiles by nvJitLink where it can load that library of CUDA's; without
it, as where programs are compiled for GPUs that are not there, by ptxas, as it did before.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

import jax


@functools.cache
def is_linked() -> bool:
    """Loads the library as jax's plugin does: of NVIDIA's wheels, or from where the system has it."""
    if jax.__version_info__ < (0, 12):
        return False
    return any(_loads(path) for version in _cuda_versions() for path in _places(version))


def _cuda_versions() -> list[int]:
    """CUDA's, for which there is a plugin; without any, nothing is compiled by this process."""
    return [
        version for version in (13, 12) if importlib.util.find_spec(f"jax_cuda{version}_plugin")
    ]


def _places(version: int) -> list[str]:
    name = f"libnvJitLink.so.{version}"
    nvidia = importlib.util.find_spec("nvidia")
    folders = (nvidia.submodule_search_locations or []) if nvidia is not None else []
    of_version = "cu13" if version == 13 else "nvjitlink"
    return [str(Path(folder) / of_version / "lib" / name) for folder in folders] + [name]


def _loads(path: str) -> bool:
    try:
        ctypes.CDLL(path)
    except OSError:
        return False
    return True
