"""Runs one after the other against one server, each with the server's own counters around it.

Knows neither flags nor tables; whoever watches is told of each run as it goes.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import aiohttp

from serving.bench.client import Target, ask, connected
from serving.bench.load import Load, Run, Runner
from serving.bench.observed import observed, read_counters
from serving.bench.prompts import Fields, MakePrompts
from serving.bench.summary import Summary, summarize

_WATCH_SECONDS = 0.2
# The server counts an answer's last token a moment after the client has it.
_SETTLE_SECONDS = 0.2


class UnreachableError(Exception):
    """The server does not say what it serves; the message is for the user."""


class Watcher(Protocol):
    """Is shown runs as they go."""

    def begin(self, load: Load) -> None: ...

    def look(self, run: Run) -> None: ...

    def end(self, summary: Summary) -> None: ...


class Nobody:
    """Does not watch."""

    def begin(self, load: Load) -> None:
        pass

    def look(self, run: Run) -> None:
        pass

    def end(self, summary: Summary) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to measure.

    Attributes:
      loads: the runs, in this order.
      prompts: what to ask, told the number of the run.
      fields: sent with every request.
      slos: see `summarize`.
    """

    target: Target
    loads: Sequence[Load]
    prompts: MakePrompts
    fields: Fields = field(default_factory=dict)
    slos: Mapping[str, float] = field(default_factory=dict)


async def find_model(url: str, api_key: str = "") -> str:
    """The name of the first model that the server offers.

    Raises:
      UnreachableError: it does not tell.
    """
    target = Target(url=url, path="", model="", api_key=api_key, timeout=10, stall_timeout=10)
    try:
        async with connected(target) as session, session.get("/v1/models") as response:
            if response.status != 200:
                raise UnreachableError(f"{url}/v1/models answers {response.status}; name --model")
            return (await response.json())["data"][0]["id"]
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise UnreachableError(f"no server at {url}: {error}") from error
    except (KeyError, IndexError, TypeError):
        raise UnreachableError(f"{url}/v1/models names no model; name --model") from None


async def carry_out(sweep: Sweep, watcher: Watcher) -> list[Summary]:
    """Every run's summary; fewer if one had to be given up, which is then the last.

    A SIGINT or SIGTERM ends the run under way, and the sweep, with what there is.
    """
    summaries: list[Summary] = []
    async with connected(sweep.target) as session:
        for number, load in enumerate(sweep.loads):
            summaries.append(await _one(sweep, session, number, load, watcher))
            if summaries[-1]["given_up"]:
                break
    return summaries


async def _one(
    sweep: Sweep, session: aiohttp.ClientSession, number: int, load: Load, watcher: Watcher
) -> Summary:
    async def send(fields: Fields) -> Any:
        return await ask(session, sweep.target, {**fields, **sweep.fields})

    runner = Runner(load, send, partial(_is_alive, sweep.target), sweep.prompts(number))
    watcher.begin(load)
    watching = asyncio.create_task(_watch(runner.run, watcher))
    try:
        with _interruptible(runner):
            await runner.warm_up()
            await asyncio.sleep(_SETTLE_SECONDS if load.warm_up else 0)
            before = await read_counters(session)
            run = await runner.carry_out()
            await asyncio.sleep(_SETTLE_SECONDS)
            after = await read_counters(session)
    finally:
        watching.cancel()
    summary = {**summarize(run, sweep.slos), "server": observed(before, after)}
    watcher.end(summary)
    return summary


async def _watch(run: Run, watcher: Watcher) -> None:
    while True:
        watcher.look(run)
        await asyncio.sleep(_WATCH_SECONDS)


async def _is_alive(target: Target) -> bool:
    """Whether the server takes connections: asked twice, for one may be a hiccup."""
    fresh = Target(url=target.url, path="", model="", timeout=5, stall_timeout=5)
    for delay in (0.0, 0.5):
        await asyncio.sleep(delay)
        try:
            async with connected(fresh) as session, session.get("/v1/models"):
                return True
        except (aiohttp.ClientError, TimeoutError, OSError):
            continue
    return False


@contextmanager
def _interruptible(runner: Runner) -> Iterator[None]:
    """While it lasts, a signal gives the run up instead of ending the process."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in numbers:
            name = signal.Signals(number).name
            loop.add_signal_handler(number, partial(runner.give_up, name, cancel=True))
    except (ValueError, RuntimeError):  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
