"""Samples packed into rows of one length, in an order that the seed alone decides.

Knows tokens and which of them are learned, not what they say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from checkpoints.nano_training.rendering import Sample

# More would fill the rows a little better and take quadratically longer.
_OPEN_ROWS = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """Training data, R rows of T tokens, padded with zeros.

    Attributes:
      tokens: int32[R, T].
      segments: int32[R, T], which sample of its row a token belongs to, from 1; 0 is padding.
      positions: int32[R, T], where in its sample a token stands.
      learned: bool[R, T], tokens that the ones before them are to predict.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    learned: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: np.ndarray) -> Rows:
        """Some of the rows."""
        return Rows(
            self.tokens[indices],
            self.segments[indices],
            self.positions[indices],
            self.learned[indices],
        )


def pack(samples: Iterable[Sample], length: int) -> Rows:
    """Puts each sample into the fullest open row that has room; none is split.

    Samples longer than a row are left out.
    """
    rows: list[list[Sample]] = []
    room: dict[int, int] = {}  # of the open rows
    for sample in samples:
        size = len(sample.tokens)
        if size > length:
            continue
        fitting = [row for row in room if room[row] >= size]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
        else:
            row = len(rows)
            rows.append([])
            room[row] = length
        rows[row].append(sample)
        room[row] -= size
        if len(room) > _OPEN_ROWS:
            del room[min(room, key=lambda row: room[row])]
    return _to_arrays(rows, length)


def _to_arrays(rows: list[list[Sample]], length: int) -> Rows:
    shape = (len(rows), length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    learned = np.zeros(shape, bool)
    for row, samples in enumerate(rows):
        start = 0
        for number, sample in enumerate(samples, 1):
            where = (row, slice(start, start + len(sample.tokens)))
            tokens[where] = sample.tokens
            segments[where] = number
            positions[where] = np.arange(len(sample.tokens))
            learned[where] = sample.learned
            start += len(sample.tokens)
    return Rows(tokens, segments, positions, learned)
