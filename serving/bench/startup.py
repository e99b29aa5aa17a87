"""How long a server takes to start, cold and warm, by phase.

Knows the server by its command line and its endpoints only.

Cold: nothing compiled yet, and the checkpoint not in the page cache. Warm: what the cold start left
behind is there. The server reports its phases, some of which run side by side; what a client sees
is `listening` (it takes connections), `ready` (it takes requests) and `first_token` (the first
request has been answered), each from the moment the process was made.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from serving.bench.launch import LaunchedServer, launched

Phases = dict[str, float]

_READY_SECONDS = 7200.0
_ANSWER_SECONDS = 600.0


def measure(
    model_dir: Path,
    flags: Sequence[str],
    *,
    num_cold: int,
    num_warm: int,
    on_start: Callable[[str, Phases], object] = lambda kind, phases: None,
) -> dict[str, list[Phases]]:
    """Seconds by phase of every start, under "cold" and "warm".

    Every cold start has a compilation cache of its own; the warm ones use the last one's.

    Args:
      on_start: told of each start as it is done.

    Raises:
      ServerError: the server does not start, or not answer.
    """
    found: dict[str, list[Phases]] = {"cold": [], "warm": []}
    for number in range(num_cold):
        with tempfile.TemporaryDirectory(prefix="glm-bench-") as cache:
            forget_pages(model_dir)
            kinds = ["cold"] + (["warm"] * num_warm if number == num_cold - 1 else [])
            for kind in kinds:
                found[kind].append(_one(model_dir, flags, Path(cache)))
                on_start(kind, found[kind][-1])
    return found


def medians(starts: Sequence[Phases]) -> Phases:
    """The median of each phase over several starts."""
    phases = dict.fromkeys(phase for start in starts for phase in start)
    return {
        phase: float(np.median([start[phase] for start in starts if phase in start]))
        for phase in phases
    }


def _one(model_dir: Path, flags: Sequence[str], cache: Path) -> Phases:
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with launched(model_dir, flags, environment=environment) as server:
        phases = {"listening": server.wait_for("/healthz", _READY_SECONDS)}
        ready = server.wait_for("/readyz", _READY_SECONDS)
        _first_token(server)
        first_token = time.perf_counter() - server.started_at
        phases |= {f"server: {phase}": seconds for phase, seconds in _reported(server)}
        return {**phases, "ready": ready, "first_token": first_token}


def _reported(server: LaunchedServer) -> Iterator[tuple[str, float]]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("startup_seconds"):
                yield sample.labels["phase"], sample.value


def _first_token(server: LaunchedServer) -> None:
    body = json.dumps({"prompt": [100], "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as response:
        response.read()


def forget_pages(directory: Path) -> None:
    """Asks the system to drop a directory's files from its page cache, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
