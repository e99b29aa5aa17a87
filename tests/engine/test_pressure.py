"""Promises about what happens when there are fewer pages or slots than wanted, or no time left."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.engine.request import Request, TokenEvent
from glm_jax.engine.scheduler import Scheduler
from glm_jax.engine.sequence import Sequence
from glm_jax.shapes import SLOT, StepShapes
from tests.engine.attentive import (
    Events,
    assert_clean,
    engine_for,
    expected_answers,
    request,
    run_to_end,
    small_shapes,
)


def with_priority(id: str, priority: int, num_prompt: int = 5, num_new: int = 6) -> Request:
    return replace(request(id, num_prompt, num_new), priority=priority)


def admitted(scheduler: Scheduler, *requests: Request) -> list[Sequence]:
    sequences = [scheduler.sequence_for(one) for one in requests]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


# --- Preemption ---------------------------------------------------------------------------------


def test_more_requests_run_than_their_worst_cases_would_allow():
    # Each may take 8 pages in the end, and the pool has 12.
    engine, runner = engine_for(small_shapes(num_slots=4, num_pages=12, max_prefill_rows=8))
    for id in "abcd":
        engine.submit(request(id, 4, 28))
    run_to_end(engine)
    assert len(set(runner.batches[1][:, SLOT])) == 4


@pytest.mark.parametrize("num_pages", [8, 9, 11, 14])
def test_a_preempted_stream_has_no_seam(num_pages: int):
    shapes = small_shapes(num_slots=4, num_pages=num_pages, max_prefill_rows=8)
    asked = [request(id, 3 + ord(id) % 3, 27) for id in "abcd"]
    engine, _ = engine_for(shapes)
    for one in asked:
        engine.submit(one)
    events = run_to_end(engine)
    for one in asked:
        assert events.answers(one.id) == expected_answers(one, shapes)
    assert engine.stats().num_preemptions > 0
    assert_clean(engine)


def test_the_newest_is_preempted_and_the_oldest_never():
    shapes = small_shapes(num_slots=4, num_pages=8, max_prefill_rows=8)
    scheduler = Scheduler(shapes)
    sequences = admitted(scheduler, *(request(id, 3, 28) for id in "abcd"))
    lost: list[str] = []
    while not all(sequence.finish_reason for sequence in sequences):
        before = [sequence for sequence in sequences if sequence.slot is not None]
        plan = scheduler.schedule()
        scheduler.check_integrity()
        lost += [s.request.id for s in reversed(before) if s.slot is None]
        for _, sequence in plan.samples if plan else ():
            scheduler.commit(sequence, 0)
    assert lost[:3] == ["d", "c", "b"] and "a" not in lost


def test_a_token_in_flight_of_a_preempted_sequence_is_delivered_not_computed_again():
    shapes = small_shapes(num_slots=2, num_pages=8)
    scheduler = Scheduler(shapes)
    old, new = admitted(scheduler, request("old", 10, 14), request("new", 10, 14))
    in_flight: tuple[tuple[int, Sequence], ...] = ()
    while True:
        plan = scheduler.schedule()
        assert plan is not None
        if scheduler.num_preemptions:
            break
        for _, sequence in in_flight:
            scheduler.commit(sequence, 7)
        in_flight = plan.samples
    assert new.slot is None and new.num_in_flight == 1
    assert any(sequence is new for _, sequence in in_flight)
    scheduler.finish(old, "cancelled")
    assert scheduler.schedule() is None, "there is room, but it is not known yet where to go on"
    # The turn goes on: the step before is read only now.
    num_delivered = len(new.completion)
    scheduler.commit(new, 7)
    assert (len(new.completion), new.num_in_flight) == (num_delivered + 1, 0)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.check_integrity()
    [chunk] = plan.chunks
    assert chunk.sequence is new and chunk.is_last
    # What it had computed rests in the cache but for the last, partly filled page.
    assert chunk.start % shapes.page_size == 0 and chunk.start > 0
    assert chunk.start + chunk.num_tokens == new.num_tokens == 10 + len(new.completion)


def test_a_preempted_request_can_be_cancelled_while_it_waits():
    def before_step(step: int, engine: Engine) -> None:
        if engine.stats().num_preemptions and not engine.stats().num_waiting == 0:
            engine.cancel("b")

    shapes = small_shapes(num_slots=2, num_pages=8)
    engine, _ = engine_for(shapes, before_step)
    for id in "ab":
        engine.submit(request(id, 10, 20))
    events = run_to_end(engine)
    assert events.reason("b") == "cancelled"
    assert events.answers("a") == expected_answers(request("a", 10, 20), shapes)
    assert_clean(engine)


class Counting:
    """A constraint that keeps every token odd or even by its place."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def binds(self, index: int) -> bool:
        return True

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def mask(self) -> np.ndarray:
        bits = np.zeros(64, np.uint8)
        bits[len(self.accepted) % 2 :: 2] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


def test_a_constraint_goes_through_a_preemption():
    shapes = replace(small_shapes(num_slots=2, num_pages=8), vocab_size=64)
    engine = Engine(MockRunner(shapes, 64), shapes, 10, integrity_interval=1)
    constraints = {id: Counting() for id in "ab"}
    for id, constraint in constraints.items():
        engine.submit(replace(request(id, 10, 20), constraint=constraint))
    events = run_to_end(engine)
    assert engine.stats().num_preemptions > 0
    for id, constraint in constraints.items():
        assert events.tokens[id] == constraint.accepted
        assert [token % 2 for token in constraint.accepted] == [0, 1] * 10


# --- Priorities ---------------------------------------------------------------------------------


def test_the_lower_priority_number_goes_first_and_equals_go_in_order():
    engine, _ = engine_for(small_shapes(num_slots=1))
    for id, priority in (("a", 2), ("b", 1), ("c", 0), ("d", 1), ("e", 0), ("f", -3)):
        engine.submit(with_priority(id, priority))
    assert list(run_to_end(engine).tokens) == ["f", "c", "e", "b", "d", "a"]


def test_an_urgent_request_takes_the_slot_of_the_newest_of_the_least_urgent():
    shapes = small_shapes(num_slots=3)
    asked = [with_priority(id, p, 5, 20) for id, p in (("a", 1), ("b", 2), ("c", 2), ("d", 0))]

    def before_step(step: int, engine: Engine) -> None:
        if step == 9:
            engine.submit(asked[3])

    engine, _ = engine_for(shapes, before_step)
    for one in asked[:3]:
        engine.submit(one)
    events = Events()

    def deliver(batch: list[TokenEvent]) -> None:
        events(batch)
        if len(events.last) == 4:
            engine.stop()

    engine.run(deliver)
    assert engine.stats().num_preemptions == 1
    ends = [event.request_id for event in events.order if event.finish_reason]
    assert ends[-1] == "c"
    for one in asked:
        assert events.answers(one.id) == expected_answers(one, shapes)


def test_equals_never_take_each_others_places():
    scheduler = Scheduler(small_shapes(num_slots=1))
    first, second = admitted(scheduler, request("a", 5, 20), request("b", 5, 20))
    for _ in range(8):
        scheduler.schedule()
    assert first.slot == 0 and second.slot is None and scheduler.num_preemptions == 0


def test_an_urgent_request_without_room_drives_out_the_least_urgent_until_it_fits():
    scheduler = Scheduler(small_shapes(num_slots=4, num_pages=12, max_prefill_rows=8))
    a, b, c = admitted(scheduler, *(with_priority(id, 1, 12, 3) for id in "abc"))
    scheduler.schedule()
    [urgent] = admitted(scheduler, with_priority("urgent", 0, 20, 3))
    scheduler.schedule()
    scheduler.check_integrity()
    assert urgent.slot is not None and a.slot is not None
    assert b.slot is None and c.slot is None


# --- Deadlines ----------------------------------------------------------------------------------


def test_a_request_that_has_not_begun_by_its_deadline_ends_and_says_why():
    past = time.monotonic() - 1
    engine, _ = engine_for(small_shapes(num_slots=1))
    engine.submit(request("a", 5, 20))
    engine.submit(replace(request("b"), deadline=past))
    engine.submit(request("c"))
    events = run_to_end(engine)
    assert events.reason("b") == "timeout" and "b" not in events.tokens
    assert "deadline" in str(events.last["b"].error)
    assert events.reason("a") == events.reason("c") == "length"
    assert engine.stats().num_timeouts == 1
    assert_clean(engine)


def test_a_request_that_has_begun_may_go_on_past_its_deadline_even_if_preempted():
    shapes = small_shapes(num_slots=1)
    soon = time.monotonic() + 0.2
    asked = replace(request("a", 5, 20), deadline=soon, priority=1)

    def before_step(step: int, engine: Engine) -> None:
        if step == 5:
            time.sleep(max(0.0, soon - time.monotonic()))
            engine.submit(request("urgent"))

    engine, _ = engine_for(shapes, before_step)
    engine.submit(asked)
    events = Events()

    def deliver(batch: list[TokenEvent]) -> None:
        events(batch)
        if len(events.last) == 2:
            engine.stop()

    engine.run(deliver)
    assert engine.stats().num_preemptions == 1
    assert events.answers("a") == expected_answers(asked, shapes)


# --- The account, on duty -----------------------------------------------------------------------


def test_the_account_is_checked_as_often_as_asked_and_a_wrong_one_is_the_end(
    monkeypatch: pytest.MonkeyPatch,
):
    shapes = small_shapes()
    engine = Engine(MockRunner(shapes, 50), shapes, 10, integrity_interval=4)
    engine.submit(request("a", 5, 20))
    run_to_end(engine)
    stats = engine.stats()
    num_steps = stats.num_prefill_steps + stats.num_decode_steps
    assert stats.num_integrity_checks == (num_steps + 1) // 4
    assert stats.integrity_seconds > 0

    engine = Engine(MockRunner(shapes, 50), shapes, 10, integrity_interval=4)
    engine.submit(request("a", 5, 20))
    monkeypatch.setattr(engine, "_packer", _Stealing(engine, shapes))
    events = Events()
    with pytest.raises(AssertionError):
        engine.run(events)
    assert events.reason("a") == "error" and not engine.stats().is_alive


class _Stealing:
    """Packs as the engine does, and loses a page on the way."""

    def __init__(self, engine: Engine, shapes: StepShapes) -> None:
        self._engine, self._packer = engine, engine._packer

    def __getattr__(self, name: str):
        return getattr(self._packer, name)

    def pack(self, plan):
        batch = self._packer.pack(plan)
        self._engine._scheduler.pool._empty.pop()
        return batch


def test_what_steps_pad_is_counted():
    shapes = small_shapes(num_slots=3, max_prefill_rows=4)
    engine, _ = engine_for(shapes)
    engine.submit(request("a", 9, 5))
    engine.submit(request("b", 2, 5))
    run_to_end(engine)
    stats = engine.stats()
    assert (stats.num_prefill_tokens, stats.num_prefill_padding) == (11, 4 * 4 - 11)
    assert (stats.num_decode_tokens, stats.num_decode_padding) == (8, 3 * 4 - 8)
