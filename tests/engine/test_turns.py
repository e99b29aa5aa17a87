"""Turns in columns tell each request what events tell it, and cost no object per token."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.engine.request import Request, SamplingParams, TokenEvent, Turn
from glm_jax.engine.scheduler import Scheduler
from glm_jax.shapes import StepShapes
from tests.engine.attentive import (
    VOCAB_SIZE,
    AttentiveRunner,
    assert_clean,
    expected_answers,
    request,
    small_shapes,
)
from tests.engine.schedules import Schedule, check_answers, draw_shapes, draw_visits


def as_events(turn: Turn) -> list[TokenEvent]:
    """The events of a turn, those of its columns too."""
    told = {event.request_id for event in turn.events}
    assert told.isdisjoint(turn.ids), "a request is told of twice"
    assert len(set(turn.ids)) == len(turn.ids)
    columns = zip(turn.ids, turn.tokens, turn.logprobs, strict=True)
    return turn.events + [TokenEvent(*row) for row in columns]


class InColumns(Schedule):
    """Plays visits against an engine that delivers turns."""

    num_in_columns = 0
    num_events = 0

    def play(self):
        self._feed_if_idle()
        self.engine.run_turns(self._take)
        return self.events

    def _take(self, turn: Turn) -> None:
        self.num_in_columns += len(turn.ids)
        self.num_events += len(turn.events)
        self._deliver(as_events(turn))


def test_seeded_schedules_give_each_request_what_it_gets_alone():
    num_in_columns = num_events = 0
    for seed in range(200):
        rng = random.Random(seed)
        shapes = draw_shapes(rng)
        visits = draw_visits(rng, shapes, VOCAB_SIZE)
        schedule = InColumns(
            visits,
            lambda act, its=shapes: Engine(AttentiveRunner(its, act), its, max_queue=100),
        )
        events = schedule.play()
        check_answers(visits, events, lambda asked, its=shapes: expected_answers(asked, its))
        assert_clean(schedule.engine)
        num_in_columns += schedule.num_in_columns
        num_events += schedule.num_events
    assert num_in_columns > num_events > 0


def turns_of(shapes: StepShapes, *requests: Request) -> list[Turn]:
    engine = Engine(MockRunner(shapes, 1000), shapes, max_queue=len(requests))
    for asked in requests:
        engine.submit(asked)
    engine.stop()
    turns: list[Turn] = []
    engine.run_turns(turns.append)
    return turns


def test_only_first_and_last_tokens_are_events():
    shapes = small_shapes(num_slots=3, max_prefill_rows=4)
    turns = turns_of(shapes, *(request(id, 3, 12) for id in "abc"))
    events = [event for turn in turns for event in turn.events]
    assert [(e.request_id, e.finish_reason) for e in events] == [
        *((id, None) for id in "abc"),
        *((id, "length") for id in "abc"),
    ]
    assert sum(len(turn.ids) for turn in turns) == 3 * 10
    # Page ends are among them, and change nothing; so the ids are one object.
    assert len({id(turn.ids) for turn in turns if turn.ids}) == 1


def test_what_has_more_to_tell_stays_an_event():
    shapes = small_shapes(num_slots=2, max_prefill_rows=4)
    plain, asking = request("plain", 3, 9), request("asking", 3, 9)
    asking = replace(asking, sampling=replace(asking.sampling, num_logprobs=3))
    turns = turns_of(shapes, plain, asking)
    told = [e for turn in turns for e in turn.events if e.request_id == "asking"]
    assert len(told) == 9 and all(len(event.top_logprobs) == 3 for event in told)
    assert {id for turn in turns for id in turn.ids} == {"plain"}


class Even:
    """A constraint that lets even tokens pass, and remembers what it accepted."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def binds(self, index: int) -> bool:
        return True

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def mask(self) -> NDArray[np.int32]:
        return np.full(32, 0x55555555, np.int32)


def test_a_constraint_sees_every_token_that_goes_in_columns():
    shapes = replace(small_shapes(num_slots=2, max_prefill_rows=4), vocab_size=1000)
    constraint = Even()
    turns = turns_of(
        shapes, request("free", 3, 9), replace(request("held", 3, 9), constraint=constraint)
    )
    tokens = [e.token for turn in turns for e in as_events(turn) if e.request_id == "held"]
    assert tokens == constraint.accepted and len(tokens) == 9
    assert all(token % 2 == 0 for token in constraint.accepted)


def test_a_stop_token_ends_a_sequence_wherever_it_comes():
    shapes = small_shapes(num_slots=1)
    (answer,) = [
        [event.token for turn in turns_of(shapes, request("a", 3, 12)) for event in as_events(turn)]
    ]
    for length, stop in enumerate(answer, 1):
        assert stop is not None
        if stop in answer[: length - 1]:
            continue
        turns = turns_of(shapes, request("a", 3, 12, stop=frozenset({stop})))
        events = [event for turn in turns for event in as_events(turn)]
        assert [event.token for event in events] == answer[:length]
        assert events[-1].finish_reason == ("stop" if length < 12 else events[-1].finish_reason)


def test_dying_ends_requests_whose_tokens_went_in_columns():
    class Failing(MockRunner):
        def dispatch(self, phase, batch):
            if self._lengths.max() > 8:
                raise RuntimeError("gone")
            return super().dispatch(phase, batch)

    shapes = small_shapes(num_slots=2, max_prefill_rows=4)
    engine = Engine(Failing(shapes, 1000), shapes, max_queue=0)
    engine.submit(request("a", 3, 12))
    turns: list[Turn] = []
    with pytest.raises(RuntimeError, match="gone"):
        engine.run_turns(turns.append)
    assert any(turn.ids for turn in turns)
    assert [event.finish_reason for event in turns[-1].events] == ["error"]


def test_routine_ends_where_something_must_be_looked_at():
    scheduler = Scheduler(small_shapes(num_slots=1))  # pages of 4 tokens
    sampling = SamplingParams(max_new_tokens=7, stop_token_ids=frozenset({5}))
    sequence = scheduler.sequence_for(Request(id="a", prompt=(1, 2, 3), sampling=sampling))
    scheduler.add(sequence)
    samples = [(0, sequence)]
    left = []
    for token in (1, 1, 1, 1, 1, 5):
        assert scheduler.schedule() is not None
        left.append(bool(scheduler.commit_routine(samples, [token])))
        if left[-1]:
            scheduler.commit(sequence, token)
        scheduler.check_integrity()
    # Those that fill a page, the one after, which finds the page written, and the stop token.
    assert left == [True, True, False, False, True, True]
    assert sequence.finish_reason == "stop"
    assert scheduler.commit_routine(samples, [1]) == samples, "surplus is not routine"
    assert sequence.completion == [1, 1, 1, 1, 1, 5]
