"""Promises of the engine about tokens, order and cancellation, kept on the test's own thread."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.request import (
    TokenEvent,
)
from glm_jax.shapes import SLOT
from tests.engine.attentive import (
    AttentiveRunner,
    assert_clean,
    engine_for,
    expected_answers,
    expected_tokens,
    request,
    run_to_end,
    small_shapes,
)

# --- Tokens and steps -----------------------------------------------------------------------


def test_a_lone_run_is_what_the_oracle_says():
    shapes = small_shapes()
    asked = request("a", 13, 100)
    engine, _ = engine_for(shapes)
    engine.submit(asked)
    events = run_to_end(engine)
    assert events.tokens["a"] == expected_tokens(asked, shapes)
    assert len(events.tokens["a"]) == shapes.max_seq_len - 13
    assert events.reason("a") == "length"
    assert events.answers("a") == expected_answers(asked, shapes)


def test_the_stop_token_is_delivered_and_is_the_last():
    shapes = small_shapes()
    free = expected_tokens(request("a", 5, 20), shapes)
    stop = free[4]
    asked = request("a", 5, 20, stop=frozenset({stop}))
    engine, runner = engine_for(shapes)
    engine.submit(asked)
    events = run_to_end(engine)
    assert events.tokens["a"] == free[: free.index(stop) + 1]
    assert events.order[-1] == events.last["a"]
    assert events.last["a"].token == stop and events.reason("a") == "stop"
    # One surplus step ran and was dropped.
    assert len(runner.phases) == len(events.tokens["a"]) + 1


def test_no_surplus_step_runs_when_the_length_is_known_to_end():
    engine, runner = engine_for(small_shapes())
    engine.submit(request("a", 5, 6))
    run_to_end(engine)
    assert runner.phases == ["prefill"] * 1 + ["decode"] * 5
    stats = engine.stats()
    assert (stats.num_prefill_steps, stats.num_decode_steps) == (1, 5)


def test_all_events_of_a_step_come_in_one_delivery():
    engine, _ = engine_for(small_shapes(max_prefill_rows=8))
    for id in "abc":
        engine.submit(request(id, 5, 6))
    events = run_to_end(engine)
    assert [[e.request_id for e in batch] for batch in events.deliveries] == [["a", "b", "c"]] * 6


def test_first_tokens_come_in_the_order_of_submission():
    engine, _ = engine_for(small_shapes(num_slots=2, num_pages=9))
    ids = [f"r{i}" for i in range(20)]
    for number, id in enumerate(ids):
        engine.submit(request(id, 1 + number * 11 % 23, 4))
    events = run_to_end(engine)
    assert list(events.tokens) == ids


def test_the_host_dispatches_a_step_before_it_reads_the_last_one():
    journal: list[str] = []

    class Pending:
        def __init__(self, number: int, output) -> None:
            self._number, self._output = number, output

        def __array__(self, dtype=None, copy=None):
            journal.append(f"read {self._number}")
            return self._output

    class Lazy:
        def __init__(self, runner: AttentiveRunner) -> None:
            self._runner = runner
            self.score, self.prepare_scores = runner.score, runner.prepare_scores

        def control(self, controls) -> None:
            raise AssertionError

        def dispatch(self, phase, batch) -> Pending:
            number = len(self._runner.phases)
            journal.append(f"dispatch {number}")
            return Pending(number, self._runner.dispatch(phase, batch))

    shapes = small_shapes()
    engine = Engine(Lazy(AttentiveRunner(shapes)), shapes, 0)
    engine.submit(request("a", 3, 3))
    run_to_end(engine)
    assert journal == ["dispatch 0", "dispatch 1", "read 0", "dispatch 2", "read 1", "read 2"]


# --- Cancellation -------------------------------------------------------------------------------


@pytest.mark.parametrize("at_step", range(8))
def test_cancelled_request_frees_its_pages_at_once(at_step: int):
    # Steps 0 to 2 prefill "a", which decodes from step 3 on; "b" waits for the only slot.
    used: list[int] = []

    def before_step(step: int, engine: Engine) -> None:
        if step == at_step:
            engine.cancel("a")
        if step == at_step + 1:
            used.append(engine.stats().num_pages_used)

    shapes = small_shapes(num_slots=1)
    engine, runner = engine_for(shapes, before_step)
    engine.submit(request("a", 20, 12))
    engine.submit(request("b", 2, 2))
    events = run_to_end(engine)
    assert events.reason("a") == "cancelled"
    assert used == [1], "the next step belongs to b, and only b holds a page"
    # Whatever was in flight for "a" in the slot that is now b's, b got its own tokens.
    assert events.tokens["b"] == expected_tokens(request("b", 2, 2), shapes)
    assert len(runner.phases) == at_step + 3
    assert runner.batches[at_step][0, SLOT] == runner.batches[at_step + 1][0, SLOT] == 0
    assert_clean(engine)


def test_a_waiting_request_can_be_cancelled():
    engine, runner = engine_for(
        small_shapes(num_slots=1), lambda step, engine: engine.cancel("b") if step == 2 else None
    )
    for id in "abc":
        engine.submit(request(id, 4, 5))
    events = run_to_end(engine)
    assert events.reason("b") == "cancelled" and "b" not in events.tokens
    assert len(events.tokens["a"]) == len(events.tokens["c"]) == 5
    assert len(runner.phases) == 10


def test_a_request_cancelled_before_the_engine_saw_it_still_gets_its_last_event():
    engine, runner = engine_for(small_shapes())
    engine.submit(request("a"))
    engine.cancel("a")
    assert run_to_end(engine).order == [TokenEvent("a", None, finish_reason="cancelled")]
    assert runner.phases == []


def test_a_surplus_token_is_dropped_when_the_request_is_cancelled():
    def before_step(step: int, engine: Engine) -> None:
        if step == 4:
            engine.cancel("a")

    engine, _ = engine_for(small_shapes(), before_step)
    engine.submit(request("a", 3, 20))
    events = run_to_end(engine)
    # Step 4 was cancelled while in flight, and step 3 was read in the same turn.
    assert len(events.tokens["a"]) == 4
    assert events.order[-1] == TokenEvent("a", None, finish_reason="cancelled")


def test_cancelling_again_or_too_late_or_nobody_does_nothing():
    def before_step(step: int, engine: Engine) -> None:
        engine.cancel("a")
        engine.cancel("a")

    engine, _ = engine_for(small_shapes(), before_step)
    engine.cancel("a")
    engine.cancel("nobody")
    engine.submit(request("a", 3, 3))
    engine.submit(request("b", 3, 3))
    events = run_to_end(engine)
    assert events.reason("a") == "cancelled"
    assert events.reason("b") == "length"
    engine.cancel("a")
    assert_clean(engine)


def test_an_id_can_be_used_again_after_its_last_event():
    shapes = small_shapes()
    engine, _ = engine_for(shapes)
    first, second = request("a", 4, 3), replace(request("b", 6, 5), id="a")
    seen: list[int] = []

    def deliver(events: list[TokenEvent]) -> None:
        seen.extend(event.token for event in events if event.token is not None)
        if any(event.finish_reason for event in events):
            if len(seen) == 3:
                engine.submit(second)
            engine.stop()

    engine.submit(first)
    engine.run(deliver)
    assert seen == expected_tokens(first, shapes) + expected_tokens(
        replace(request("b", 6, 5), id="a"), shapes
    )
