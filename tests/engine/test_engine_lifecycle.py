"""Promises of the engine about refusing, draining, dying, and serving many threads."""

from __future__ import annotations

import threading
import time

import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.engine.request import (
    EngineDeadError,
    EngineDrainingError,
    QueueFullError,
    Request,
    SamplingParams,
    TokenEvent,
)
from tests.engine.attentive import (
    Events,
    assert_clean,
    engine_for,
    request,
    run_to_end,
    small_shapes,
)

# --- Refusals -----------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_takes_requests_again_when_one_ends():
    engine, _ = engine_for(small_shapes(num_slots=2), max_queue=1)
    for id in "abc":
        engine.submit(request(id, 3, 2))
    with pytest.raises(QueueFullError, match="3 requests"):
        engine.submit(request("d"))
    late: list[str] = []

    def deliver(events: list[TokenEvent]) -> None:
        if any(event.finish_reason for event in events) and not late:
            engine.submit(request("d", 3, 2))
            late.append("d")
            engine.stop()

    engine.run(deliver)
    assert late == ["d"]
    assert_clean(engine)


def test_a_live_id_is_refused():
    engine, _ = engine_for(small_shapes())
    engine.submit(request("a"))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.submit(request("a", 9))
    assert len(run_to_end(engine).tokens["a"]) == 6


def test_a_request_that_never_fits_is_refused_at_submit_and_leaves_no_trace():
    engine, _ = engine_for(small_shapes(num_pages=3))
    with pytest.raises(ValueError, match="at most 31 fit"):
        engine.submit(request("a", 40, 1))
    with pytest.raises(ValueError, match="only 3"):
        engine.submit(request("a", 10, 10))
    assert engine.stats().num_waiting == 0
    engine.submit(request("a", 4, 2))
    assert len(run_to_end(engine).tokens["a"]) == 2


@pytest.mark.parametrize("token", [-1, 2**31])
def test_a_prompt_that_holds_no_token_ids_is_refused(token: int):
    with pytest.raises(ValueError, match="token ids"):
        Request(id="a", prompt=(1, token), sampling=SamplingParams(max_new_tokens=1))


def test_a_negative_queue_limit_is_refused():
    with pytest.raises(ValueError, match="max_queue"):
        engine_for(small_shapes(), max_queue=-1)


# --- The end: drain and death -------------------------------------------------------------------


def test_draining_finishes_what_was_accepted_and_refuses_the_rest():
    refused: list[str] = []

    def before_step(step: int, engine: Engine) -> None:
        if step == 1:
            engine.stop()
            engine.stop()
        if step in (2, 9):
            assert engine.draining
            with pytest.raises(EngineDrainingError):
                engine.submit(request("late"))
            refused.append("late")

    engine, _ = engine_for(small_shapes(num_slots=1), before_step)
    for id in "abc":
        engine.submit(request(id, 4, 5))
    assert not engine.draining
    events = Events()
    engine.run(events)
    assert [events.reason(id) for id in "abc"] == ["length"] * 3
    assert refused == ["late", "late"]
    assert engine.stats().is_alive
    assert_clean(engine)


def test_a_failing_step_fails_every_request_and_then_the_engine():
    def before_step(step: int, engine: Engine) -> None:
        if step == 3:
            engine.cancel("c")
        if step == 4:
            engine.submit(request("inbox"))
            raise RuntimeError("out of device memory")

    engine, _ = engine_for(small_shapes(num_slots=2), before_step)
    for id in "abcd":
        engine.submit(request(id, 4, 9))
    events = Events()
    with pytest.raises(RuntimeError, match="out of device memory"):
        engine.run(events)
    assert set(events.last) == {*"abcd", "inbox"}
    assert {event.finish_reason for event in events.last.values()} == {"error"}
    assert {e.error for e in events.last.values()} == {"RuntimeError: out of device memory"}
    assert not engine.stats().is_alive
    with pytest.raises(EngineDeadError, match="RuntimeError: out of device memory"):
        engine.submit(request("late"))
    assert_clean(engine)


def test_a_result_that_cannot_be_read_fails_the_same_way():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise OSError("device lost")

    class BrokenRunner:
        def control(self, controls) -> None:
            raise AssertionError

        def dispatch(self, phase, batch) -> Broken:
            return Broken()

        def score(self, batch, targets) -> Broken:
            raise AssertionError

        def prepare_scores(self) -> None:
            raise AssertionError

    shapes = small_shapes(num_slots=1)
    engine = Engine(BrokenRunner(), shapes, 10)
    engine.submit(request("a"))
    engine.submit(request("b"))
    events = Events()
    with pytest.raises(OSError, match="device lost"):
        engine.run(events)
    assert [event.error for event in events.order] == ["OSError: device lost"] * 2
    assert not engine.stats().is_alive
    assert_clean(engine)


# --- Threads ------------------------------------------------------------------------------------


class Running:
    """An engine on a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events = Events()
        self.thread = threading.Thread(target=engine.run, args=(self.events,))

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()

    def wait_for(self, id: str) -> None:
        deadline = time.monotonic() + 20
        while id not in self.events.last:
            assert time.monotonic() < deadline, f"{id} never ended"
            time.sleep(0.001)


def test_an_idle_engine_sleeps_and_wakes_for_each_message():
    shapes = small_shapes()
    engine = Engine(MockRunner(shapes, 100), shapes, 10)
    with Running(engine) as running:
        busy = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - busy < 0.02
        for id in "abc":
            engine.submit(request(id, 4, 3))
            running.wait_for(id)
    assert_clean(engine)


def test_submitting_and_cancelling_from_many_threads_loses_no_request():
    shapes = small_shapes(num_slots=3)
    engine = Engine(MockRunner(shapes, 100, seconds_per_step=0.0002), shapes, max_queue=1000)

    def client(number: int) -> None:
        for i in range(25):
            id = f"{number}/{i}"
            engine.submit(request(id, 1 + i % 9, 5))
            if i % 3 == 0:
                engine.cancel(id)

    with Running(engine) as running:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    assert len(running.events.last) == 100
    for id, event in running.events.last.items():
        assert event.finish_reason == "cancelled" or len(running.events.tokens[id]) == 5
    assert_clean(engine)
