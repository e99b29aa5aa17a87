"""Where the compiler for absent GPUs is not installed, nothing that asks it is collected."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from glm_jax.aot.topology import missing_wheels

collect_ignore = ["test_gates.py", "test_inspect.py"] if missing_wheels() else []


@pytest.fixture(scope="module")
def without_compilation_cache() -> Iterator[None]:
    """What is compiled for devices that are not here cannot be read back from a cache, and what is
    read back cannot be written to an engine."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
