"""Importing the rooms of policy and of the wire loads no JAX, as it is at run time.

Knows only module names. The order of imports between rooms is checked by `lint-imports`.
"""

import subprocess
import sys

import pytest

WITHOUT_JAX = [
    "glm_jax.shapes",
    "glm_jax.engine.request",
    "glm_jax.engine.sequence",
    "glm_jax.engine.pages",
    "glm_jax.engine.scheduler",
    "glm_jax.engine.batch",
    "glm_jax.engine.mock",
    "serving.app",
    "serving.__main__",
]


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_importing_it_alone_loads_no_jax(module: str) -> None:
    program = (
        f"import sys, {module}; print([name for name in ('jax', 'flax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
