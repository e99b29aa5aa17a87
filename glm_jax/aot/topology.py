"""The mesh of a target: its real devices, or ones that exist only for the compiler.

Knows no model. Compiling for GPUs that are not there takes the wheels of the extra `aot`.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from glm_jax.sharding import MESH_AXIS, make_mesh
from glm_jax.targets.target import Target, TargetError

# Those of the extra `aot`, and what does as well: the plugin must be that of the machine to come.
_WHEELS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
_WHEELS_13 = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


def missing_wheels() -> list[str]:
    """The packages of the extra `aot` that are not installed; none where those of CUDA 13 are."""
    missing = [name for name in _WHEELS if not _is_installed(name)]
    return missing if missing and not all(map(_is_installed, _WHEELS_13)) else []


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def mesh_here(target: Target) -> Mesh:
    """The mesh of the target's own devices, in this machine: what is compiled for it is tuned on it.

    Raises:
      TargetError: this machine has other devices, or fewer.
    """
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # what a cache gave cannot be written out
    if target.is_cpu:
        return mesh_of(target)
    here = jax.devices()
    kind = str(target).partition("x")[0]
    if kind.upper() not in here[0].device_kind.upper().split():
        raise TargetError(
            f"this machine has {len(here)} x {here[0].device_kind}, which is not {target}; without "
            "--on-devices no GPU is needed"
        )
    try:
        return make_mesh(target.num_devices)
    except ValueError as error:
        raise TargetError(f"target {target}: {error}") from error


def stay_off_devices() -> None:
    """Keeps JAX from taking this machine's GPUs: a compilation for others needs none of them.

    To be called before anything asks JAX for its devices.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for devices that are not here cannot be read back from a cache.
    jax.config.update("jax_enable_compilation_cache", False)
    # The compiler's notes on what a description leaves out are for those who write XLA.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def mesh_of(target: Target) -> Mesh:
    """The mesh to compile for; the devices of another machine can be compiled for, not used.

    Raises:
      TargetError: this machine has fewer devices, or the compiler's wheels are not installed.
    """
    if target.is_cpu:
        try:
            return make_mesh(target.num_devices)
        except ValueError as error:
            raise TargetError(f"target {target}: {error}") from error
    if missing := missing_wheels():
        raise TargetError(
            f"compiling for {target} without its devices needs {', '.join(missing)}: install the "
            "extra aot (make env EXTRAS=aot)"
        )
    topology = topologies.get_topology_desc(
        str(target),
        platform="cuda",
        target_config=target.description,
        topology=f"1x1x{target.num_devices}",
    )
    return Mesh(np.array(topology.devices), (MESH_AXIS,))
