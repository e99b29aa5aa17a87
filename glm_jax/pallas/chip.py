"""Which GPU a step is being traced for, and what of it decides how a kernel is cut.

Knows no kernel. The mesh of the surrounding shard_map says it, whether its devices exist or are only
described to the compiler; so no kernel asks this machine what it has.
"""

from dataclasses import dataclass
from typing import Literal

import jax

Architecture = Literal["sm90", "sm100"]

_ARCHITECTURES: dict[str, Architecture] = {
    "H100": "sm90",
    "H200": "sm90",
    "B200": "sm100",
    "GB200": "sm100",
}


@dataclass(frozen=True, slots=True)
class Chip:
    """A kind of GPU.

    Attributes:
      architecture: which tensor-core instructions it has: wgmma (sm90) or tcgen05 (sm100).
      num_cores: streaming multiprocessors, what a persistent kernel launches.
    """

    architecture: Architecture
    num_cores: int


def chip_in_trace() -> Chip | None:
    """The GPU that the surrounding shard_map's mesh is made of; None on a CPU.

    Raises:
      NotImplementedError: it is a GPU no kernel was written for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "gpu":
        return None
    for name, architecture in _ARCHITECTURES.items():
        if name in device.device_kind.split():
            return Chip(architecture, device.num_cores)
    known = ", ".join(_ARCHITECTURES)
    raise NotImplementedError(
        f"there are no kernels for {device.device_kind}: they are for {known}"
    )
