"""Promises of the scheduler, kept without any device."""

from __future__ import annotations

import random

import pytest

from glm_jax.engine.plan import Plan
from glm_jax.engine.scheduler import Scheduler
from glm_jax.engine.sequence import Sequence
from glm_jax.shapes import StepShapes
from tests.engine.attentive import request, small_shapes


def scheduled(scheduler: Scheduler) -> Plan:
    """The next plan; there must be one."""
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.check_integrity()
    return plan


def with_requests(shapes: StepShapes, *sizes: tuple[int, int]) -> tuple[Scheduler, list[Sequence]]:
    """A scheduler that has just got requests of (prompt tokens, new tokens)."""
    scheduler = Scheduler(shapes)
    sequences = [
        scheduler.sequence_for(request(str(i), num_prompt, num_new))
        for i, (num_prompt, num_new) in enumerate(sizes)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler, sequences


def test_a_prompt_longer_than_the_budget_is_prefilled_in_chunks_that_start_at_tiles():
    scheduler, [sequence] = with_requests(small_shapes(), (19, 3))
    plans = [scheduled(scheduler) for _ in range(3)]
    chunks = [chunk for plan in plans for chunk in plan.chunks]
    assert [(c.start, c.num_tokens, c.num_rows) for c in chunks] == [
        (0, 8, 2),
        (8, 8, 2),
        (16, 3, 1),
    ]
    assert [plan.samples for plan in plans] == [(), (), ((0, sequence),)]


def test_several_prompts_share_a_prefill_step_as_rows_of_their_own():
    shapes = small_shapes(num_slots=4, max_prefill_rows=4)
    scheduler, [a, b, c] = with_requests(shapes, (3, 2), (6, 2), (9, 2))
    plan = scheduled(scheduler)
    assert [(k.sequence, k.row, k.num_rows, k.num_tokens) for k in plan.chunks] == [
        (a, 0, 1, 3),
        (b, 1, 2, 6),
        (c, 3, 1, 4),
    ]
    assert plan.samples == ((0, a), (2, b))
    assert plan.num_rows == 4


def test_decode_never_waits_for_two_prefill_steps_in_a_row():
    rng = random.Random(1)
    scheduler, live = with_requests(small_shapes(num_slots=4), (9, 5))
    last_phase = None
    num_alternations = 0
    for number in range(1, 1500):
        if rng.random() < 0.4:
            fresh = scheduler.sequence_for(request(str(number), rng.randint(1, 25), 6))
            scheduler.add(fresh)
            live.append(fresh)
        could_decode = any(s.can_decode for s in live)
        plan = scheduler.schedule()
        scheduler.check_integrity()
        if plan is None:
            last_phase = None
            continue
        if could_decode and last_phase == "prefill":
            assert plan.phase == "decode"
            num_alternations += any(s.slot is not None and s.is_prefilling for s in live)
        last_phase = plan.phase
        for _, sequence in plan.samples:
            scheduler.commit(sequence, 0)
        live = [s for s in live if s.finish_reason is None]
    assert num_alternations > 100


def test_prefill_goes_before_decode_when_its_turn_comes():
    scheduler, _ = with_requests(small_shapes(), (3, 8))
    assert scheduled(scheduler).phase == "prefill"
    assert scheduled(scheduler).phase == "decode"
    scheduler.add(scheduler.sequence_for(request("late", 20, 3)))
    phases = [scheduled(scheduler).phase for _ in range(5)]
    assert phases == ["prefill", "decode", "prefill", "decode", "prefill"]


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_pages():
    scheduler, [a, large, small] = with_requests(
        small_shapes(num_pages=8), (20, 5), (20, 5), (1, 1)
    )
    while (plan := scheduler.schedule()) is not None:
        assert {s for _, s in plan.samples} <= {a}
        scheduler.check_integrity()
    assert a.slot is not None and large.slot is None and small.slot is None
    scheduler.finish(a, "length")
    scheduled(scheduler)
    assert large.slot is not None and small.slot is not None


def test_a_prompt_gets_its_pages_at_once_and_a_completion_one_by_one():
    scheduler, [sequence] = with_requests(small_shapes(), (10, 8))
    num_pages = []
    while scheduler.schedule() is not None:
        scheduler.check_integrity()
        num_pages.append(scheduler.pool.num_used)
    # Two chunks of 8 and 2 tokens; then one position more per decode step, up to 17.
    assert num_pages == [3, 3, 3, 3, 4, 4, 4, 4, 5]
    assert sequence.max_pages == 5


def test_no_step_is_dispatched_past_the_last_token_by_length():
    scheduler, [sequence] = with_requests(small_shapes(), (4, 3))
    assert [scheduled(scheduler).phase for _ in range(3)] == ["prefill", "decode", "decode"]
    assert scheduler.schedule() is None
    assert [scheduler.commit(sequence, 1) for _ in range(3)] == [None, None, "length"]
    assert scheduler.is_idle and scheduler.pool.num_used == 0


def test_a_completion_is_capped_to_the_longest_sequence():
    scheduler = Scheduler(small_shapes(max_seq_len=32))
    sequence = scheduler.sequence_for(request("a", 31, 1000))
    assert sequence.max_new_tokens == 1
    assert sequence.max_pages == 8


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_with_its_numbers():
    scheduler = Scheduler(small_shapes(max_seq_len=32))
    with pytest.raises(ValueError, match="32 tokens, but at most 31 fit"):
        scheduler.sequence_for(request("a", 32, 1))


def test_a_request_larger_than_the_pool_is_refused_with_its_numbers():
    scheduler = Scheduler(small_shapes(num_pages=3))
    scheduler.sequence_for(request("fits", 10, 3))
    with pytest.raises(ValueError, match="prompt of 10 .* 4 new .* needs 4 .* only 3"):
        scheduler.sequence_for(request("a", 10, 4))
