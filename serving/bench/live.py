"""A sweep as it goes: a progress bar for a terminal.

Knows neither servers nor what becomes of the numbers.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from serving.bench.load import Load, Run
from serving.bench.report import point_name
from serving.bench.summary import Summary


class ProgressBar:
    """A bar that fills with the run's time, and the counts so far beside it."""

    def __init__(self, console: Console, num_runs: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[counts]}"),
            console=console,
            transient=True,
        )
        self._num_runs = num_runs
        self._num_begun = 0
        self._task = self._progress.add_task("", counts="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, load: Load) -> None:
        self._num_begun += 1
        name = point_name({"request_rate": load.rate, "concurrency": load.concurrency})
        self._progress.reset(
            self._task,
            total=load.duration,
            description=f"run {self._num_begun} of {self._num_runs}, {name}",
            counts="warming up",
        )

    def look(self, run: Run) -> None:
        if not run.started_at:
            return
        passed = time.perf_counter() - run.started_at
        errors = sum(sample.error is not None for sample in run.samples)
        tokens = sum(sample.completion_tokens for sample in run.samples)
        counts = f"{len(run.samples) - errors} answers, {tokens / max(passed, 1e-3):,.0f} tok/s"
        if errors:
            counts += f", {errors} errors"
        if passed > run.load.duration:
            counts += f", {run.num_running} still to end"
        self._progress.update(self._task, completed=min(passed, run.load.duration), counts=counts)

    def end(self, summary: Summary) -> None:
        line = (
            f"{point_name(summary)}: {summary['completed']} answers, "
            f"{summary['output_throughput']:,.1f} output tok/s"
        )
        self._progress.console.print(line, highlight=False)
