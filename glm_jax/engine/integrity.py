"""Whether slots, pages and progress add up.

Knows no policy: it looks at what the scheduler holds and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from glm_jax.engine.pages import PagePool
from glm_jax.engine.sequence import Sequence
from glm_jax.engine.waiting import by_rank
from glm_jax.shapes import StepShapes


def check_integrity(
    running: list[Sequence],
    waiting: list[Sequence],
    free_slots: Many[int],
    pool: PagePool,
    shapes: StepShapes,
) -> None:
    """Checks the account of all unfinished sequences.

    Raises:
      AssertionError: it does not add up.
    """
    pool.check_integrity([s.pages for s in running])
    slots = sorted([*(s.slot for s in running if s.slot is not None), *free_slots])
    assert slots == list(range(shapes.num_slots)), (running, free_slots)
    assert running == sorted(running, key=by_rank), running
    for sequence in running:
        _check_running(sequence, shapes)
    assert waiting == sorted(waiting, key=by_rank), waiting
    for sequence in waiting:
        assert sequence.slot is None and not sequence.pages, sequence
        assert sequence.routine_until == 0, sequence
        assert sequence.finish_reason is None, sequence


def _check_running(sequence: Sequence, shapes: StepShapes) -> None:
    page_size, num_pages = shapes.page_size, len(sequence.pages)
    assert sequence.slot is not None, sequence
    target = sequence.num_to_prefill if sequence.is_prefilling else sequence.length
    # Two steps may have fallen short of what pages were taken for.
    most = target + 2 * (shapes.tokens_per_step - 1)
    assert num_pages >= -(-target // page_size), sequence
    assert num_pages <= -(-most // page_size), sequence
    assert num_pages <= sequence.max_pages, sequence
    assert sequence.has_room_until == num_pages * page_size - sequence.num_prompt + 1, sequence
    assert sequence.num_published <= len(sequence.keys), sequence
    assert sequence.num_published * page_size <= sequence.length, sequence
    # Routine ends before the next page is full, and before the last token.
    assert len(sequence.keys) == sequence.num_tokens // page_size, sequence
    assert sequence.routine_until < sequence.max_new_tokens, sequence
    assert sequence.finish_reason is None, sequence
