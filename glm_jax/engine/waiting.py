"""Who waits, in which order, and until when.

Knows neither slots nor pages: what it holds has none.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from glm_jax.engine.sequence import Sequence

by_rank = attrgetter("rank")


class Waiting:
    """Sequences in order of rank: by priority, and by arrival among equals."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._num_deadlines = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def first(self) -> Sequence | None:
        """The next to be admitted."""
        return self._sequences[0] if self._sequences else None

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in its place."""
        insort(self._sequences, sequence, key=by_rank)
        self._num_deadlines += sequence.request.deadline is not None

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands."""
        self._sequences.remove(sequence)
        self._num_deadlines -= sequence.request.deadline is not None

    def overdue(self, now: float) -> list[Sequence]:
        """Those that should have been admitted before `now`, in seconds of time.monotonic().

        One that was admitted and preempted is not: its answer has begun.
        """
        if not self._num_deadlines:
            return []
        return [
            sequence
            for sequence in self._sequences
            if sequence.request.deadline is not None
            and sequence.request.deadline <= now
            and sequence.num_cached is None
        ]
