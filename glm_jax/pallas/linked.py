"""Whether what is compiled here is compiled to be linked, where ptxas ignores setmaxnreg.

Knows no kernel. From 0.12 on, jax compiles by nvJitLink where that library of CUDA's can be loaded; without
it, as where programs are compiled for GPUs that are not there, by ptxas, as it did before.
"""

import ctypes.util
import functools
import importlib.util
from pathlib import Path

import jax


@functools.cache
def is_linked() -> bool:
    if jax.__version_info__ < (0, 12):
        return False
    nvidia = importlib.util.find_spec("nvidia")
    folders = (nvidia.submodule_search_locations or []) if nvidia is not None else []
    if any(True for folder in folders for _ in Path(folder).glob("*/lib/libnvJitLink.so*")):
        return True
    return ctypes.util.find_library("nvJitLink") is not None
