"""The front end's ceiling: tokens per second that a server streams when its model costs nothing.

Knows the server by its command line and its endpoints only. Server and client each have a core of
their own where there are two, so that neither is measured by the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from serving.bench.client import Target
from serving.bench.launch import launched
from serving.bench.load import Load
from serving.bench.prompts import Fields, Shape, Vocabulary, random_prompts
from serving.bench.summary import Summary
from serving.bench.sweep import Sweep, Watcher, carry_out, find_model

_READY_SECONDS = 120.0


@contextmanager
def cores_apart() -> Iterator[tuple[str, ...]]:
    """Keeps this process to one core; the words before a command that keep it to another.

    Where cores cannot be chosen, nothing is kept anywhere, and there are no words.
    """
    taskset = shutil.which("taskset")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if taskset is None or len(cores) < 2:
        yield ()
        return
    os.sched_setaffinity(0, {cores[-1]})
    try:
        yield (taskset, "-c", str(cores[0]))
    finally:
        os.sched_setaffinity(0, cores)


def mock_flags(concurrency: int, length: int) -> tuple[str, ...]:
    """Flags of a server that answers so many requests at once with no model, as fast as it can."""
    return (
        *("--mock", "--mock-rate", "0", "--log-level", "WARNING"),
        *("--max-concurrency", str(concurrency), "--max-seq-len", str(length)),
        *("--max-prompt-tokens", str(length), "--max-new-tokens", str(length)),
    )


def make_sweep(
    url: str, model: str, model_dir: Path, shape: Shape, concurrency: int, duration: float
) -> Sweep:
    """One run of so many streams at a time, after one of each that only warms up."""

    def prompts(number: int) -> Iterator[Fields]:
        return random_prompts(shape, Vocabulary(model_dir), seed=(number,), is_chat=False)

    return Sweep(
        target=Target(url=url, path="/v1/completions", model=model),
        loads=[Load(duration=duration, concurrency=concurrency, warm_up=concurrency)],
        prompts=prompts,
        fields={"ignore_eos": True, "temperature": 0},
    )


async def measure(
    model_dir: Path, concurrencies: Sequence[int], shape: Shape, duration: float, watcher: Watcher
) -> list[Summary]:
    """A run for each concurrency, each on a server of its own.

    Raises:
      ServerError: the server does not start.
    """
    summaries: list[Summary] = []
    with cores_apart() as prefix:
        for concurrency in concurrencies:
            flags = mock_flags(concurrency, shape.prompt_len + shape.output_len)
            with launched(model_dir, flags, prefix=prefix) as server:
                server.wait_for("/readyz", _READY_SECONDS)
                model = await find_model(server.url)
                sweep = make_sweep(server.url, model, model_dir, shape, concurrency, duration)
                summaries += await carry_out(sweep, watcher)
    return summaries
