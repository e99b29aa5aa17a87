"""When requests are sent: so many at a time, or so many a second; for a time; then until the last ends.

Knows neither prompts nor what the times mean.

A run never hangs: every request has its limits, and a server that is gone, or answers nothing but
errors, ends the run early, with the reason. What had been sent until then is in the result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.bench.client import Sample
from serving.bench.prompts import Fields

Ask = Callable[[Fields], Awaitable[Sample]]

# So many failures in a row, and never a success between them, end a run.
_HOPELESS_FAILURES = 50
_LONGEST_PAUSE = 1.0
_LAG_INTERVAL = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How a run asks.

    Attributes:
      duration: seconds in which requests start.
      concurrency: requests at a time; with a rate, at most so many (None: no limit).
      rate: requests per second; None: a new one whenever one ends.
      burstiness: of the gaps between requests at a rate, which are gamma distributed with this
        shape: 1 is a Poisson process, below 1 burstier, above 1 more even.
      ramp: seconds over which a load begins: workers start spread over them, or the rate grows.
      ramp_rate: requests per second that a growing rate begins with.
      is_ramp_exponential: whether it grows by the same factor, and not by the same step.
      num_requests: end after so many even if there is time left.
      warm_up: requests sent first, that are not counted.
      seed: of the gaps.
    """

    duration: float
    concurrency: int | None = 32
    rate: float | None = None
    burstiness: float = 1.0
    ramp: float = 0.0
    ramp_rate: float = 1.0
    is_ramp_exponential: bool = False
    num_requests: int | None = None
    warm_up: int = 0
    seed: int = 0

    def rate_at(self, seconds: float) -> float:
        """Requests per second, so many seconds after the start."""
        assert self.rate is not None
        if seconds >= self.ramp:
            return self.rate
        progress = seconds / self.ramp
        if self.is_ramp_exponential:
            return self.ramp_rate * (self.rate / self.ramp_rate) ** progress
        return self.ramp_rate + (self.rate - self.ramp_rate) * progress

    def arrivals(self) -> Iterator[float]:
        """When requests come at the rate, in seconds from the start; the same for the same seed."""
        draw = np.random.default_rng((self.seed, 7))
        due = 0.0
        while True:
            scale = 1 / (self.rate_at(due) * self.burstiness)
            due += float(draw.gamma(self.burstiness, scale))
            if due > self.duration:
                return
            yield due


@dataclass(slots=True)
class Run:
    """What a run saw; times are of time.perf_counter().

    Attributes:
      samples: every request that was sent, but for the warm-up's.
      started_at, ended_at: from the first request's start to the last one's end.
      given_up: why the run ended early; None if it did not.
      cpu_seconds: what the client's process computed during the run.
      lags: by how many seconds a timer of the client's came late, many times during the run.
      num_running: requests under way now.
    """

    load: Load
    samples: list[Sample] = field(default_factory=list)
    started_at: float = 0.0
    ended_at: float = 0.0
    given_up: str | None = None
    cpu_seconds: float = 0.0
    lags: list[float] = field(default_factory=list)
    num_running: int = 0


class Runner:
    """Carries out one run.

    Args:
      ask: sends one request; it never raises.
      is_alive: whether the server takes connections.
      prompts: what to ask, without end.
    """

    def __init__(
        self,
        load: Load,
        ask: Ask,
        is_alive: Callable[[], Awaitable[bool]],
        prompts: Iterator[Fields],
    ) -> None:
        self.run = Run(load)
        self._ask = ask
        self._is_alive = is_alive
        self._prompts = prompts
        self._num_begun = 0
        self._failures_in_row = 0
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Future[Any]] = set()

    def give_up(self, reason: str, *, cancel: bool = False) -> None:
        """Starts no more requests; with `cancel`, ends those under way too."""
        if self.run.given_up is None:
            self.run.given_up = reason
        self._stopping.set()
        if cancel:
            for task in self._tasks:
                task.cancel()

    async def carry_out(self) -> Run:
        """Asks until the time is over, and waits for the last answer."""
        run = self.run
        lag_meter = asyncio.create_task(self._measure_lag())
        cpu = time.process_time()
        run.started_at = time.perf_counter()
        if run.given_up is None:
            await (self._closed_loop() if run.load.rate is None else self._open_loop())
        run.ended_at = max([sample.ended_at for sample in run.samples], default=run.started_at)
        run.cpu_seconds = time.process_time() - cpu
        lag_meter.cancel()
        return run

    async def warm_up(self) -> None:
        """Asks the load's warm-up, in waves; if all of a wave fails, the run is given up."""
        load = self.run.load
        at_once = load.concurrency or 8
        left = load.warm_up
        while left > 0 and not self._stopping.is_set():
            size = min(left, at_once)
            wave = [asyncio.ensure_future(self._ask(next(self._prompts))) for _ in range(size)]
            self._tasks.update(wave)
            failed = [sample for sample in await asyncio.gather(*wave) if sample.error]
            self._tasks.difference_update(wave)
            if len(failed) == size:
                self.give_up(f"the warm-up failed: {failed[0].error}: {failed[0].detail}")
            left -= size

    async def _closed_loop(self) -> None:
        load = self.run.load
        number = load.concurrency or 1
        gap = load.ramp / number
        for index in range(number):
            self._spawn(self._worker(index * gap))
        await self._all_done()

    async def _worker(self, delay: float) -> None:
        await self._pause(delay)
        while self._may_begin():
            await self._one()
            if self._failures_in_row:
                # A server that refuses at once is not to be hammered.
                await self._pause(min(_LONGEST_PAUSE, 0.02 * 2 ** min(self._failures_in_row, 9)))

    async def _open_loop(self) -> None:
        load = self.run.load
        limit = asyncio.Semaphore(load.concurrency) if load.concurrency else None
        for arrival in load.arrivals():
            due = self.run.started_at + arrival
            await self._pause(due - time.perf_counter())
            if not self._may_begin():
                break
            self._spawn(self._arrival(due, limit))
        await self._all_done()

    async def _arrival(self, due: float, limit: asyncio.Semaphore | None) -> None:
        if limit is None:
            return await self._one()
        async with limit:
            # One that was held back past the end is still asked: it did arrive in time.
            if not self._stopping.is_set():
                await self._one(held_seconds=max(0.0, time.perf_counter() - due))

    def _may_begin(self) -> bool:
        load = self.run.load
        if self._stopping.is_set() or time.perf_counter() >= self.run.started_at + load.duration:
            return False
        return load.num_requests is None or self._num_begun < load.num_requests

    async def _one(self, held_seconds: float = 0.0) -> None:
        self._num_begun += 1
        self.run.num_running += 1
        sample = await self._ask(next(self._prompts))
        self.run.num_running -= 1
        sample.held_seconds = held_seconds
        self.run.samples.append(sample)
        if sample.error is None:
            self._failures_in_row = 0
        elif not self._stopping.is_set():
            await self._judge(sample)

    async def _judge(self, failed: Sample) -> None:
        """Ends the run if the server is gone, or nothing but failures come."""
        self._failures_in_row += 1
        if failed.error in ("refused", "disconnected") and not await self._is_alive():
            self.give_up(f"the server takes no connections any more ({failed.detail})")
        limit = max(_HOPELESS_FAILURES, 2 * (self.run.load.concurrency or 0))
        if self._failures_in_row >= limit:
            self.give_up(
                f"{self._failures_in_row} requests failed in a row, the last one: "
                f"{failed.error}: {failed.detail}"
            )

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _all_done(self) -> None:
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks)
            for task in done:
                if not task.cancelled():
                    task.result()

    async def _pause(self, seconds: float) -> None:
        """Waits, but not beyond the moment when the run is given up."""
        if seconds <= 0:
            return
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            pass

    async def _measure_lag(self) -> None:
        while True:
            due = time.perf_counter() + _LAG_INTERVAL
            await asyncio.sleep(_LAG_INTERVAL)
            self.run.lags.append(max(0.0, time.perf_counter() - due))
