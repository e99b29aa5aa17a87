"""Which sequences run in the next step. Policy only.

Knows neither arrays nor threads: it turns sequences into plans and accounts for slots and pages.

The policy: admission is first come, first served, and strict: nobody overtakes a request that
does not fit yet. Admission reserves the pages of the longest possible outcome, so an admitted
sequence never runs out; pages are allocated when a step first reaches them. Prefill comes before
decode, in chunks that fit one step, but never twice in a row while a sequence could decode.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from glm_jax.engine.pages import PagePool
from glm_jax.engine.request import FinishReason, Request
from glm_jax.engine.sequence import Sequence
from glm_jax.shapes import Phase, StepShapes


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of one prompt that a prefill step covers.

    Attributes:
      sequence: whose prompt.
      row: the first of its rows in the step.
      num_rows: rows it fills; all but the last are full.
      start: position of its first token, a multiple of prefill_tile.
      num_tokens: prompt tokens it covers.
    """

    sequence: Sequence
    row: int
    num_rows: int
    start: int
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether it ends its prompt, so that a token is sampled after it."""
        return self.start + self.num_tokens == self.sequence.prompt.size


@dataclass(frozen=True, slots=True)
class Plan:
    """What the scheduler decided for one step. Valid until the next call to the scheduler.

    Attributes:
      phase: which compiled step runs.
      num_rows: rows the step needs, padding excluded.
      samples: (row, sequence) of every token the step samples, in row order.
      chunks: the prompts' parts, in row order; empty for decode, where `samples` says it all.
    """

    phase: Phase
    num_rows: int
    samples: tuple[tuple[int, Sequence], ...]
    chunks: tuple[Chunk, ...] = ()


class Scheduler:
    """Holds every unfinished sequence and decides, step by step, which of them run.

    All methods but `sequence_for` belong to one thread; the counts may be read from any.
    """

    def __init__(self, shapes: StepShapes) -> None:
        self._shapes = shapes
        self._pool = PagePool(shapes.num_pages)
        self._free_slots = list(reversed(range(shapes.num_slots)))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # by slot, in order of admission
        self._is_decode_next = False

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def num_pages_used(self) -> int:
        """Pages allocated to sequences."""
        return self._pool.num_used

    @property
    def is_idle(self) -> bool:
        """Whether there is no unfinished sequence."""
        return not self._running and not self._waiting

    def sequence_for(self, request: Request) -> Sequence:
        """Makes the record of a request that can be served. Any thread may call it.

        Raises:
          ValueError: the request can never fit, however long it waits.
        """
        shapes = self._shapes
        num_prompt = len(request.prompt)
        if num_prompt >= shapes.max_seq_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, but at most {shapes.max_seq_len - 1} fit: "
                f"prompt and completion share {shapes.max_seq_len} positions; shorten the prompt"
            )
        max_new_tokens = min(request.sampling.max_new_tokens, shapes.max_seq_len - num_prompt)
        # The last token of a completion is delivered but never fed back, so never cached.
        max_pages = self._num_pages(num_prompt + max_new_tokens - 1)
        if max_pages > shapes.num_pages:
            raise ValueError(
                f"a prompt of {num_prompt} tokens with {max_new_tokens} new ones needs "
                f"{max_pages} cache pages of {shapes.page_size} tokens, but there are only "
                f"{shapes.num_pages}; shorten the prompt or lower max_new_tokens"
            )
        return Sequence(
            request=request,
            prompt=np.array(request.prompt, np.int32),
            max_new_tokens=max_new_tokens,
            max_pages=max_pages,
        )

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue."""
        self._waiting.append(sequence)

    def schedule(self) -> Plan | None:
        """Decides the next step, and counts it as dispatched; None when nothing can run now."""
        self._admit()
        prefilling = [s for s in self._running.values() if s.is_prefilling]
        decoding = [s for s in self._running.values() if s.can_decode]
        if prefilling and not (decoding and self._is_decode_next):
            self._is_decode_next = True
            return self._plan_prefill(prefilling)
        if decoding:
            self._is_decode_next = False
            return self._plan_decode(decoding)
        return None

    def commit(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Takes in a sampled token of an unfinished sequence; returns why it was the last."""
        finish_reason = sequence.append(token)
        if finish_reason is not None:
            self.finish(sequence, finish_reason)
        return finish_reason

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends an unfinished sequence, wherever it stands; its slot and pages are free at once.

        A step in flight may still write to them. Whoever gets them next writes in a later step.
        """
        sequence.finish_reason = reason
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        del self._running[sequence.slot]
        self._free_slots.append(sequence.slot)
        self._pool.release(sequence.pages, sequence.max_pages - len(sequence.pages))
        sequence.slot = None
        sequence.pages = []

    def check_integrity(self) -> None:
        """Checks that slots, pages and promises add up.

        Raises:
          AssertionError: they do not.
        """
        running = self._running
        self._pool.check_integrity(s.pages for s in running.values())
        promised = sum(s.max_pages - len(s.pages) for s in running.values())
        assert promised == self._pool.num_reserved, (promised, self._pool.num_reserved)
        slots = sorted([*running, *self._free_slots])
        assert slots == list(range(self._shapes.num_slots)), (list(running), self._free_slots)
        for slot, sequence in running.items():
            assert sequence.slot == slot, (sequence.slot, slot)
            assert len(sequence.pages) == self._num_pages(sequence.length), sequence
            assert sequence.finish_reason is None, sequence
        for sequence in self._waiting:
            assert sequence.slot is None and not sequence.pages, sequence

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            if not self._pool.can_reserve(sequence.max_pages):
                return
            self._waiting.popleft()
            self._pool.reserve(sequence.max_pages)
            sequence.slot = self._free_slots.pop()
            self._running[sequence.slot] = sequence

    def _plan_prefill(self, prefilling: list[Sequence]) -> Plan:
        tile = self._shapes.prefill_tile
        rows_left = self._shapes.prefill_budget // tile
        row = 0
        chunks: list[Chunk] = []
        for sequence in prefilling:
            if not rows_left:
                break
            start = sequence.num_prefilled
            num_tokens = min(sequence.prompt.size - start, rows_left * tile)
            num_rows = -(-num_tokens // tile)
            chunks.append(Chunk(sequence, row, num_rows, start, num_tokens))
            row += num_rows
            rows_left -= num_rows
            sequence.num_prefilled += num_tokens
            sequence.num_dispatched = int(not sequence.is_prefilling)
            self._grow(sequence)
        samples = tuple((c.row + c.num_rows - 1, c.sequence) for c in chunks if c.is_last)
        return Plan("prefill", row, samples, tuple(chunks))

    def _plan_decode(self, decoding: list[Sequence]) -> Plan:
        for sequence in decoding:
            sequence.num_dispatched += 1
            self._grow(sequence)
        return Plan("decode", len(decoding), tuple(enumerate(decoding)))

    def _grow(self, sequence: Sequence) -> None:
        """Allocates what the positions dispatched so far need."""
        num_missing = self._num_pages(sequence.length) - len(sequence.pages)
        if num_missing:
            sequence.pages += self._pool.allocate(num_missing)

    def _num_pages(self, num_positions: int) -> int:
        return -(-num_positions // self._shapes.page_size)
