"""Promises about decode steps that bring a row more than one token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_jax.engine.batch import Packer
from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockOutput, MockRunner
from glm_jax.engine.scheduler import Scheduler
from glm_jax.shapes import NO_TOKEN, NUM_TOKENS, OUTPUT_TOKENS, Phase, StepShapes
from tests.engine.attentive import assert_clean, request, run_to_end, small_shapes

SHAPES = small_shapes(num_drafts=2)


class EvenOnly:
    """Lets a completion have even tokens of 1000."""

    def binds(self, index: int) -> bool:
        return True

    def accept(self, token: int) -> None:
        assert token % 2 == 0

    def mask(self) -> NDArray[np.int32]:
        bits = np.zeros(1024, np.uint8)
        bits[:1000:2] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


def engine_of(shapes: StepShapes = SHAPES, hit_rate: float = 1.0) -> Engine:
    return Engine(MockRunner(shapes, 1000, hit_rate=hit_rate), shapes, max_queue=20)


def answers(engine: Engine, *requests) -> dict[str, list[int]]:
    for one in requests:
        engine.submit(one)
    events = run_to_end(engine)
    assert_clean(engine)
    return events.tokens


ALONE = answers(engine_of(replace(SHAPES, num_drafts=0)), request("a", 5, 14))["a"]


@pytest.mark.parametrize("hit_rate", [0.0, 0.5, 1.0])
def test_tokens_do_not_depend_on_how_many_come_at_once(hit_rate: float):
    engine = engine_of(hit_rate=hit_rate)
    assert answers(engine, request("a", 5, 14))["a"] == ALONE


@pytest.mark.parametrize("at", range(1, 8))
def test_what_follows_the_stop_token_in_its_step_is_dropped(at: int):
    stop = ALONE[at]
    asked = request("a", 5, 14, stop=frozenset({stop}))
    engine = engine_of()
    engine.submit(asked)
    events = run_to_end(engine)
    assert events.tokens["a"] == ALONE[: ALONE.index(stop) + 1]
    assert events.order[-1] is events.last["a"] and events.reason("a") == "stop"
    assert_clean(engine)


def test_the_last_step_offers_no_more_than_the_length_has_left():
    engine = engine_of()
    answers(engine, request("a", 5, 6))
    # One token from prefill; then three and two.
    assert engine.stats().num_offered == engine.stats().num_gained == (2, 2, 1)
    assert engine.stats().num_decode_steps == 2
    assert (engine.stats().num_decode_tokens, engine.stats().num_decode_padding) == (5, 1)


def test_a_length_that_may_be_reached_is_waited_for_and_reached():
    engine = engine_of(hit_rate=0.0)
    assert len(answers(engine, request("a", 5, 6))["a"]) == 6
    offered, *guesses = engine.stats().num_gained
    assert offered == 5 and guesses == [0, 0]
    assert engine.stats().num_offered == (5, 3, 1)


@pytest.mark.parametrize("num_pages, gains", [(4, (4, 4)), (3, (4, 1))])
def test_guesses_take_free_pages_and_preempt_nobody(num_pages: int, gains: tuple[int, ...]):
    # Both stand at position 3 of a page of 4; four tokens take one page more.
    shapes = small_shapes(num_slots=2, num_pages=num_pages, num_drafts=3)
    scheduler, packer = Scheduler(shapes), Packer(shapes)
    for id in "ab":
        scheduler.add(scheduler.sequence_for(request(id, 3, 5)))
    assert scheduler.schedule() is not None
    plan = scheduler.schedule()
    scheduler.check_integrity()
    assert plan is not None and plan.phase == "decode" and plan.gains == gains
    assert packer.pack(plan)[:, NUM_TOKENS].tolist() == list(gains)
    assert scheduler.num_preemptions == 0


def test_pages_taken_for_guesses_that_failed_are_there_for_the_next():
    shapes = small_shapes(num_slots=1, num_pages=8, num_drafts=3)
    scheduler = Scheduler(shapes)
    sequence = scheduler.sequence_for(request("a", 3, 20))
    scheduler.add(sequence)
    num_pages = []
    for _ in range(5):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.fall_short(sequence, plan.gains[0] - 1)
        scheduler.commit(sequence, 0)
        scheduler.check_integrity()
        num_pages.append(len(sequence.pages))
    # Positions 3 … 6 after prefill of 3 tokens, each step one further.
    assert num_pages == [1, 2, 2, 3, 3]


def test_a_constrained_sequence_gains_one_token_a_step():
    shapes = replace(SHAPES, vocab_size=1000)
    engine = engine_of(shapes)
    tokens = answers(engine, replace(request("a", 5, 9), constraint=EvenOnly()))["a"]
    assert len(tokens) == 9 and not any(token % 2 for token in tokens)
    assert engine.stats().num_offered == (8, 0, 0)


def test_a_step_that_brings_a_row_nothing_ends_the_engine():
    class Idle(MockRunner):
        def dispatch(self, phase: Phase, batch: NDArray[np.int32]) -> MockOutput:
            output = super().dispatch(phase, batch)
            if phase == "decode":
                output.values[:, OUTPUT_TOKENS] = NO_TOKEN
            return output

    engine = Engine(Idle(SHAPES, 1000), SHAPES, 0)
    engine.submit(request("a", 5, 6))
    with pytest.raises(AssertionError, match="0 tokens for a, not 1 … 3"):
        run_to_end(engine)
    assert not engine.stats().is_alive
