"""Whatever else happens, a request gets what it gets alone: five hundred schedules."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.engine.engine import Engine
from glm_jax.shapes import StepShapes
from tests.engine.attentive import (
    VOCAB_SIZE,
    AttentiveRunner,
    assert_clean,
    expected_answers,
    request,
    small_shapes,
)
from tests.engine.schedules import Schedule, Visit, check_answers, draw_shapes, draw_visits


def played(shapes: StepShapes, visits: list[Visit]) -> Engine:
    """The engine after a schedule in which every request got the answer of a lone run."""
    schedule = Schedule(
        visits, lambda act: Engine(AttentiveRunner(shapes, act), shapes, max_queue=100)
    )
    events = schedule.play()
    check_answers(visits, events, lambda asked: expected_answers(asked, shapes))
    assert_clean(schedule.engine)
    return schedule.engine


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_five_hundred_seeded_schedules_give_each_request_what_it_gets_alone(num_drafts: int):
    seen = Counter[str]()
    for seed in range(500):
        rng = random.Random(seed)
        shapes = draw_shapes(rng, num_drafts)
        stats = played(shapes, draw_visits(rng, shapes, VOCAB_SIZE)).stats()
        seen["preempted"] += stats.num_preemptions > 0
        seen["preempted often"] += stats.num_preemptions > 3
        seen["hit"] += stats.num_cached_tokens > 0
        seen["evicted"] += stats.num_evicted > 0
        offered, gained = sum(stats.num_offered[1:]), sum(stats.num_gained[1:])
        seen["several"] += gained > 0
        seen["fell short"] += gained < offered
    # What a schedule is for must happen in many of them.
    assert seen["preempted"] > 150 and seen["preempted often"] > 20, seen
    assert seen["hit"] > 150 and seen["evicted"] > 200, seen
    assert (seen["several"] > 400 and seen["fell short"] > 400) == (num_drafts > 0), seen


any_shapes = st.builds(
    small_shapes,
    num_slots=st.integers(1, 4),
    num_pages=st.integers(8, 20),
    page_size=st.sampled_from([4, 5, 8]),
    prefill_tile=st.sampled_from([2, 4, 8]),
    max_prefill_rows=st.integers(1, 5),
    num_drafts=st.integers(0, 3),
)


@st.composite
def any_visits(draw: st.DrawFn) -> list[Visit]:
    number = draw(st.integers(1, 12))
    return [
        Visit(
            at_step=draw(st.integers(0, 40)),
            request=request(
                f"request {i}",
                draw(st.integers(1, 31)),
                draw(st.integers(1, 40)),
                stop=draw(st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=8)),
            ),
            cancel_after=draw(st.none() | st.integers(0, 12)),
        )
        for i in range(number)
    ]


@settings(max_examples=100)
@given(any_shapes, any_visits())
def test_schedules_that_hypothesis_looks_for_find_no_other_answer(
    shapes: StepShapes, visits: list[Visit]
):
    played(shapes, visits)
