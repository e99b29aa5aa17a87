"""The environment that a process on GPUs starts with: each variable once, with its reason.

Knows neither JAX nor any step: a step's own compiler options are in steps.py, and what is set here
must be set before JAX starts its devices.
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

# Share of a GPU's memory that JAX takes at the start; the rest is the driver's, NCCL's and the graphs'.
MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Setting:
    """A variable of the environment.

    Attributes:
      names: the variable, and others that mean the same: if one of them is set, it stays.
      value: what it is set to where none of them is.
      reason: why, for who reads docs/operating.md.
    """

    names: tuple[str, ...]
    value: str
    reason: str


SETTINGS = (
    Setting(
        ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        str(MEMORY_SHARE),
        "JAX takes 75 % of a GPU where nothing is said: 28 GB of a B200 that KV pages could have.",
    ),
    Setting(
        ("NCCL_DEBUG",),
        "WARN",
        "What fails between GPUs is said in words, not as an error code alone.",
    ),
    Setting(
        ("TF_CPP_MIN_LOG_LEVEL",),
        "1",
        "XLA's own notes on every start are no news; its warnings and errors stay.",
    ),
)
"""All of them. Not here, because nobody has measured them: XLA's update modes of command buffers,
NCCL's symmetric and user buffers. NVLink multicast (NCCL_NVLS_ENABLE) stays as NCCL chooses."""


def missing(environ: Mapping[str, str]) -> dict[str, str]:
    """What prepare would set: the variables that the environment says nothing of."""
    return {
        setting.names[0]: setting.value
        for setting in SETTINGS
        if not any(name in environ for name in setting.names)
    }


def prepare(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Sets what is missing and returns it; what the user has set stays as it is.

    Has no effect on a CPU, and none on GPUs once JAX has started its devices.
    """
    added = missing(environ)
    environ.update(added)
    return added
