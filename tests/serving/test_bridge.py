"""Between event loop and engine thread: everything arrives, nothing leaks, death is loud."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import pytest

from glm_jax.engine.request import (
    EngineDeadError,
    EngineDrainingError,
    Request,
    SamplingParams,
    TokenEvent,
    Turn,
)
from serving.bridge import Bridge, Deliver, EngineStartingError, News, Stream, TokenRun
from tests.serving.scripted import END, ScriptedEngine


def request(id: str, max_new_tokens: int = 10) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=frozenset({END}))
    return Request(id=id, prompt=(1,), sampling=sampling)


async def started(engine: ScriptedEngine) -> Bridge:
    bridge = Bridge()
    bridge.start(lambda: engine)
    while bridge.state == "starting":
        await asyncio.sleep(0.001)
    return bridge


async def ended(bridge: Bridge) -> None:
    bridge.stop()
    assert await bridge.ended is None


async def looks(stream: Stream) -> AsyncIterator[list[News]]:
    """What a reader takes, look by look."""
    while True:
        if not (news := stream.take()):
            if stream.is_finished:
                return
            await stream.wait()
            news = stream.take()
        yield news


async def read(bridge: Bridge, id: str) -> list[int | None]:
    with bridge.open(request(id)) as stream:
        return [event.token async for events in looks(stream) for event in only_events(events)]


def only_events(news: list[News]) -> list[TokenEvent]:
    """What a scripted engine told: it has no columns."""
    events = [item for item in news if isinstance(item, TokenEvent)]
    assert len(events) == len(news)
    return events


async def test_streams_get_their_own_events_in_order():
    engine = ScriptedEngine(lambda request: [int(request.id) + i for i in range(5)] + [END])
    bridge = await started(engine)
    answers = await asyncio.gather(*(read(bridge, str(100 * i)) for i in range(20)))
    assert answers == [[100 * i + j for j in range(5)] + [END] for i in range(20)]
    assert bridge.num_streams == 0
    assert engine.cancelled == []
    await ended(bridge)


async def test_leaving_a_stream_early_cancels_its_request_only():
    engine = ScriptedEngine(lambda request: range(50), pause=0.001)
    bridge = await started(engine)
    other = asyncio.ensure_future(read(bridge, "other"))
    with bridge.open(request("left")) as stream:
        async for _ in looks(stream):
            break
    assert engine.cancelled == ["left"]
    assert len(await other) == 10
    assert engine.cancelled == ["left"]
    await ended(bridge)


async def test_a_cancelled_reader_cancels_its_request():
    engine = ScriptedEngine(lambda request: range(50), pause=0.01)
    bridge = await started(engine)
    reader = asyncio.ensure_future(read(bridge, "a"))
    await asyncio.sleep(0.03)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert engine.cancelled == ["a"]
    assert bridge.num_streams == 0
    await ended(bridge)


async def test_a_reader_that_falls_behind_gets_all_that_waited_at_once():
    bridge = await started(ScriptedEngine(lambda request: range(50)))
    with bridge.open(request("a")) as stream:
        await asyncio.sleep(0.05)
        assert [len(events) async for events in looks(stream)] == [10]
    await ended(bridge)


async def test_readers_that_take_long_are_woken_less_often_and_miss_nothing(monkeypatch):
    monkeypatch.setattr("serving.bridge._REST", 100.0)
    bridge = await started(ScriptedEngine(lambda request: range(50), pause=0.001))
    lists = []
    with bridge.open(request("a", 40)) as stream:
        async for events in looks(stream):
            lists.append([event.token for event in only_events(events)])
            busy_until = time.thread_time() + 0.003
            while time.thread_time() < busy_until:
                pass
    assert [token for some in lists for token in some][:-1] == list(range(39))
    assert len(lists) < 8
    await ended(bridge)


class TurnByTurn(ScriptedEngine):
    """Delivers these turns as soon as its requests are there, and then what the test puts in."""

    def __init__(self, turns: list[Turn], num_requests: int) -> None:
        super().__init__(lambda request: [])
        self._turns = turns
        self._num_requests = num_requests

    def run_turns(self, deliver: Deliver) -> None:
        while len(self.requests) < self._num_requests:
            time.sleep(0.001)
        for turn in self._turns:
            deliver(turn)
        while not self._is_stopping:
            time.sleep(0.001)


def columns(ids: tuple[str, ...], *tokens: int) -> Turn:
    return Turn([], ids, tokens, [-token / 4 for token in tokens])


async def test_columns_and_events_reach_their_streams_in_order():
    ab, b = ("a", "b"), ("b",)
    turns = [
        Turn([TokenEvent("a", 1), TokenEvent("b", 11)]),
        columns(ab, 2, 12),
        columns(ab, 3, 13),
        Turn([TokenEvent("c", 21)], ab, (4, 14), (-1.0, -3.5)),
        Turn([TokenEvent("a", 5, finish_reason="stop")], b, (15,), (-3.75,)),
        columns(("c", "b"), 22, 16),
        Turn([TokenEvent("b", 17, finish_reason="length")]),
        Turn([TokenEvent("c", None, finish_reason="cancelled")]),
    ]
    bridge = await started(TurnByTurn(turns, 3))

    async def told(id: str) -> tuple[list[int | None], list[float]]:
        with bridge.open(request(id)) as stream:
            news = [item async for some in looks(stream) for item in some]
        events = [
            event
            for item in news
            for event in ([item] if isinstance(item, TokenEvent) else item.events(id))
        ]
        assert {event.request_id for event in events} == {id}
        return [event.token for event in events], [event.logprob for event in events]

    a, b_, c = await asyncio.gather(*map(told, "abc"))
    assert a == ([1, 2, 3, 4, 5], [0.0, -0.5, -0.75, -1.0, 0.0])
    assert b_ == ([11, 12, 13, 14, 15, 16, 17], [0.0, -3.0, -3.25, -3.5, -3.75, -4.0, 0.0])
    assert c == ([21, 22, None], [0.0, -5.5, 0.0])
    await ended(bridge)


async def test_columns_of_a_stream_that_was_left_go_nowhere():
    ids = ("left", "stays")
    turns = [columns(ids, 1, 11), Turn([TokenEvent("stays", 12, finish_reason="stop")])]
    bridge = await started(TurnByTurn(turns, 2))
    bridge.open(request("left")).close()
    with bridge.open(request("stays")) as stream:
        news = [item async for some in looks(stream) for item in some]
    assert [item if isinstance(item, TokenEvent) else item.tokens for item in news] == [
        (11,),
        TokenEvent("stays", 12, finish_reason="stop"),
    ]
    await ended(bridge)


async def test_what_was_put_down_before_the_engine_died_is_told_first(monkeypatch):
    monkeypatch.setattr("serving.bridge._REST", 1e6)  # so that it lies there

    class Dying(ScriptedEngine):
        def run_turns(self, deliver: Deliver) -> None:
            while not self.requests:
                time.sleep(0.001)
            for token in (1, 2, 3):
                deliver(columns(("a",), token))
                time.sleep(0.02)
            raise RuntimeError("gone")

    bridge = await started(Dying(lambda request: []))
    with bridge.open(request("a")) as stream:
        *runs, last = [item async for some in looks(stream) for item in some]
    assert [run.tokens for run in runs if isinstance(run, TokenRun)] == [(1,), (2, 3)]
    assert isinstance(last, TokenEvent) and last.finish_reason == "error"


async def test_closing_twice_is_closing_once():
    engine = ScriptedEngine(lambda request: range(50), pause=0.01)
    bridge = await started(engine)
    stream = bridge.open(request("a"))
    stream.close()
    stream.close()
    assert engine.cancelled == ["a"]
    await ended(bridge)


async def test_death_of_the_engine_ends_every_stream_with_its_cause(caplog):
    engine = ScriptedEngine(lambda request: range(50), pause=0.01)
    bridge = await started(engine)
    assert bridge.state == "ready"
    with bridge.open(request("a")) as stream, caplog.at_level(logging.CRITICAL):
        engine.fail(RuntimeError("out of memory"))
        *_, (*_, last) = [events async for events in looks(stream)]
    assert isinstance(last, TokenEvent) and last.finish_reason == "error"
    assert last.error is not None
    assert "out of memory" in last.error
    assert isinstance(await bridge.ended, RuntimeError)
    assert bridge.state == "dead"
    assert "the engine died" in caplog.text
    with pytest.raises(EngineDeadError):
        bridge.open(request("b"))


async def test_an_engine_that_cannot_be_built_is_a_dead_one(caplog):
    def build() -> ScriptedEngine:
        raise ValueError("no such checkpoint")

    bridge = Bridge()
    bridge.start(build)
    assert str(await bridge.ended) == "no such checkpoint"
    assert bridge.state == "dead"
    assert "cannot start" in caplog.text


async def test_an_engine_that_just_ends_is_a_dead_one():
    class Ending(ScriptedEngine):
        def run_turns(self, deliver) -> None:
            return

    bridge = Bridge()
    bridge.start(lambda: Ending(lambda request: []))
    assert isinstance(await bridge.ended, EngineDeadError)


async def test_requests_before_the_engine_is_there_are_refused():
    bridge = Bridge()
    assert bridge.state == "starting"
    assert bridge.stats() is None
    with pytest.raises(EngineStartingError):
        bridge.open(request("a"))


async def test_stopping_finishes_what_runs_and_refuses_what_comes():
    bridge = await started(ScriptedEngine(lambda request: range(50), pause=0.005))
    reader = asyncio.ensure_future(read(bridge, "a"))
    await asyncio.sleep(0.01)
    bridge.stop()
    assert bridge.state == "draining"
    with pytest.raises(EngineDrainingError):
        bridge.open(request("b"))
    assert len(await reader) == 10
    assert await bridge.ended is None


async def test_stopping_before_the_engine_is_there_ends_at_once():
    bridge = Bridge()
    bridge.stop()
    assert await bridge.ended is None
