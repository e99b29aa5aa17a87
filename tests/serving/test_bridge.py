"""Between event loop and engine thread: everything arrives, nothing leaks, death is loud."""

import asyncio
import logging
import time

import pytest

from glm_jax.engine.request import EngineDeadError, EngineDrainingError, Request, SamplingParams
from serving.bridge import Bridge, EngineStartingError
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


async def read(bridge: Bridge, id: str) -> list[int | None]:
    with bridge.open(request(id)) as stream:
        return [event.token async for events in stream for event in events]


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
        async for _ in stream:
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
        assert [len(events) async for events in stream] == [10]
    await ended(bridge)


async def test_readers_that_take_long_are_woken_less_often_and_miss_nothing(monkeypatch):
    monkeypatch.setattr("serving.bridge._REST", 100.0)
    bridge = await started(ScriptedEngine(lambda request: range(50), pause=0.001))
    lists = []
    with bridge.open(request("a", 40)) as stream:
        async for events in stream:
            lists.append([event.token for event in events])
            busy_until = time.thread_time() + 0.003
            while time.thread_time() < busy_until:
                pass
    assert [token for some in lists for token in some][:-1] == list(range(39))
    assert len(lists) < 8
    await ended(bridge)


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
        *_, (*_, last) = [events async for events in stream]
    assert last.finish_reason == "error"
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
        def run(self, deliver) -> None:
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
