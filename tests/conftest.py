"""What every test runs under: eight fake CPU devices, strict dtypes and ranks, fixed seeds.

Knows none of our modules. It must run before anything imports JAX, which reads the environment once.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
# Servers that tests start compile the same few steps: once is enough, and enough for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples every time, kept nowhere: a failure here is a failure everywhere.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Draws from the global generators are the same whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def compiled_steps_are_kept() -> Iterator[None]:
    """A command that compiles for other machines turns JAX's cache off: not for the files after it."""
    yield
    if not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
