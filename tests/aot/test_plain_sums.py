"""Plain sums over devices, compiled for GPUs that are not here: NCCL's, whatever their size.

XLA's own kernels for small sums need the other devices' memory as ours do.
"""

import os
import re
import subprocess
import sys

import pytest

from glm_jax.aot.topology import missing_wheels

pytestmark = pytest.mark.skipif(
    bool(missing_wheels()), reason=f"needs {', '.join(missing_wheels())}"
)
_COMPILE = """
from functools import partial
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec
from glm_jax.aot.topology import mesh_of, stay_off_devices
from glm_jax.kernels import Kernels
from glm_jax.sharding import all_reduce
from glm_jax.steps import compiler_options
from glm_jax.targets.target import parse_target
stay_off_devices()
mesh, whole = mesh_of(parse_target("h200x8")), PartitionSpec()
rows = jax.ShapeDtypeStruct((8, 5120), jnp.bfloat16)
step = jax.shard_map(all_reduce, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
options = compiler_options(mesh, Kernels(fused_all_reduce={fused}))
print(jax.jit(step, compiler_options=options).lower(rows).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("fused", "expected"), [(True, "TRITON_ONE_SHOT"), (False, "DEFAULT")])
def test_small_sums_are_xlas_kernels_only_where_ours_may_be(fused: bool, expected: str) -> None:
    environment = dict(os.environ)
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        environment.pop(name, None)
    text = subprocess.run(
        [sys.executable, "-c", _COMPILE.format(fused=fused)],
        env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert set(re.findall(r'"KERNEL_STRATEGY_(\w+)"', text)) == {expected}
