"""What a machine is: its devices, their memory, and the rates that bound a step.

Knows no model and touches no device. Rates are the vendors' peaks; what of them is reached is the
roofline's assumption.
"""

import re
from dataclasses import dataclass
from importlib import resources

_DESCRIBED = re.compile(r"^ *device_memory_size: (\d+)$", re.MULTILINE)
_SPELLING = re.compile(r"(?P<kind>[a-z0-9]+?)(?:x(?P<count>[1-9]\d*))?")
_CPU = "cpu"


class TargetError(ValueError):
    """The target is not one of those described here."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """The vendor's peak rates of one device, without sparsity.

    Attributes:
      hbm: bytes per second.
      link: bytes per second to all peers together, each way.
      fp8: operations per second of an FP8 product that accumulates in float32.
      bf16: the same of bfloat16.
    """

    hbm: float
    link: float
    fp8: float
    bf16: float


# Datasheets: DGX B200, GB200 NVL72, H200, H100 SXM. Theirs with sparsity are halved.
_PEAKS = {
    "b200": Peaks(hbm=8.0e12, link=900e9, fp8=4.5e15, bf16=2.25e15),
    "gb200": Peaks(hbm=8.0e12, link=900e9, fp8=5.0e15, bf16=2.5e15),
    "h200": Peaks(hbm=4.8e12, link=450e9, fp8=1.979e15, bf16=0.989e15),
    "h100": Peaks(hbm=3.35e12, link=450e9, fp8=1.979e15, bf16=0.989e15),
}


@dataclass(frozen=True, slots=True)
class Target:
    """Devices of one kind on one machine.

    Attributes:
      kind: "b200", …, or "cpu": this machine.
      num_devices: how many of them the mesh spans.
      memory: bytes of one device; None for this machine, whose memory is not set aside.
      peaks: None for this machine, which is not planned for.
    """

    kind: str
    num_devices: int
    memory: int | None
    peaks: Peaks | None

    def __str__(self) -> str:
        return f"{self.kind}x{self.num_devices}"

    @property
    def is_cpu(self) -> bool:
        """Whether this is the machine at hand, and not a description of another."""
        return self.kind == _CPU

    @property
    def description(self) -> str:
        """The text XLA reads in place of a device."""
        return _read(self.kind)


def _read(kind: str) -> str:
    return (resources.files(__package__) / f"{kind}.txtpb").read_text(encoding="utf-8")


def parse_target(text: str) -> Target:
    """The target that text names: In "b200x8". Out eight B200. A count that is left out is 1.

    Raises:
      TargetError: there is no such kind of device.
    """
    match = _SPELLING.fullmatch(text)
    kind = match["kind"] if match else text
    count = int(match["count"] or 1) if match else 1
    if kind == _CPU:
        return Target(_CPU, count, None, None)
    if kind not in _PEAKS:
        kinds = ", ".join([*_PEAKS, _CPU])
        raise TargetError(
            f"target {text!r} is not known: it is one of {kinds}, followed by x and the number of "
            "devices, as in b200x8"
        )
    memory = _DESCRIBED.search(_read(kind))
    assert memory is not None, f"{kind}.txtpb does not say how much memory the device has"
    return Target(kind, count, int(memory[1]), _PEAKS[kind])
