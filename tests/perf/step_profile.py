"""Where a step's time goes on the device: its kernels by what they are for, and the gaps between them.

Knows no model. JAX's profiler tells every kernel with its start and its end, those of a graph too.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.mosaic.gpu import profiler
from jax.profiler import ProfileData

# The first that matches names the group.
_GROUPS = (
    ("router, sorting", r"router|dispatch"),
    ("experts", r"grouped|gate_up|quantize_hidden|add_up"),
    ("attention", r"attention|kv_write"),
    ("projections", r"dense_matmul"),
    ("norms, sums", r"all_reduce|norm|nccl|AllReduce|ncclDev"),
    ("lm_head", r"gemm|cublas|nvjet|cutlass|dot"),
    ("copies", r"memcpy|Memcpy|memset|Memset|copy"),
)
_REST = "sampler, others of XLA"
_OURS = "_mosaic_gpu_kernel"


class Kernel(NamedTuple):
    """One run of a kernel: nanoseconds of its start and end."""

    name: str
    start: float
    end: float


def profile(step: Callable[[], Any], number: int) -> dict[str, Any]:
    """Runs a step so many times under the profiler.

    Returns:
      Per step, of the first device: "us" from the first kernel to the last, "gaps_us" in which none
      ran, "groups_us" and "kernels" as [name, runs, us], the longest first. A kernel's time is what it
      takes past the end of all that began before: one that begins early waits for those.
    """
    jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready([step() for _ in range(number)])
        files = sorted(Path(directory).rglob("*.xplane.pb"))
        data = ProfileData.from_file(str(files[-1]))
        try:
            kernels = kernels_of(data)
        except ValueError as error:
            print(f"jax.profiler told nothing of the GPU ({error}); CUPTI tells no starts")
            kernels = _times(step, number)
    return summary(kernels, number)


def _times(step: Callable[[], Any], number: int) -> list[Kernel]:
    """The kernels of CUPTI's own list, as if one followed the other."""
    # jax's own wrapper runs a function twice on the same arguments; a step takes them away.
    extension = getattr(profiler, "mosaic_gpu_lib")._mosaic_gpu_ext  # noqa: B009
    extension._cupti_init()
    try:
        jax.block_until_ready([step() for _ in range(number)])
    finally:
        timings = extension._cupti_get_timings(True) or []
    ends = list(accumulate(milliseconds * 1e6 for _, milliseconds in timings))
    return [
        Kernel(name, end - milliseconds * 1e6, end)
        for (name, milliseconds), end in zip(timings, ends, strict=True)
    ]


def kernels_of(data: Any) -> list[Kernel]:
    """What ran on the first device, in order of its start."""
    planes = [plane for plane in data.planes if re.search(r"/device:(GPU|CUDA)", plane.name)]
    if not planes:
        raise ValueError(f"the profile has no GPU's plane: {[plane.name for plane in data.planes]}")
    first = min(planes, key=lambda plane: plane.name)
    kernels = [
        Kernel(event.name, event.start_ns, event.start_ns + event.duration_ns)
        for line in first.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    if not kernels:
        raise ValueError(f"no stream in {first.name}: {[line.name for line in first.lines]}")
    return sorted(kernels, key=lambda kernel: kernel.start)


def group_of(name: str) -> str:
    """What a kernel is for."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name)), _REST)


def summary(kernels: list[Kernel], number: int) -> dict[str, Any]:
    """Per step: see `profile`."""
    groups: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    busy, until = 0.0, kernels[0].start
    for name, start, end in kernels:
        name = name.removesuffix(_OURS)
        own = max(0.0, end - max(start, until))
        groups[group_of(name)] += own / 1e3 / number
        by_name[name][0] += 1
        by_name[name][1] += own / 1e3 / number
        busy, until = busy + own, max(until, end)
    span = until - kernels[0].start
    longest = sorted(by_name.items(), key=lambda item: -item[1][1])[:24]
    return {
        "us": round(span / 1e3 / number, 1),
        "gaps_us": round((span - busy) / 1e3 / number, 1),
        "groups_us": {group: round(us, 1) for group, us in sorted(groups.items())},
        "kernels": [[name, round(runs / number, 1), round(us, 1)] for name, (runs, us) in longest],
    }
