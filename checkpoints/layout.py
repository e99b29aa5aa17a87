"""How an array lies in a converted checkpoint: a grid of chunks, none of which two devices share.

Knows neither files nor devices: only shapes, and along which axes devices share an array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A chunk is read, checked and written as one: enough bytes that a disk or a network streams, few
# enough that several at once are no burden.
MAX_CHUNK_BYTES = 64 << 20
CHUNK_PREFIX = "c"  # of zarr's chunk keys: c.0.1.0


@dataclass(frozen=True, slots=True)
class Grid:
    """An array's shape and the shape of its chunks, which tile it exactly."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(size // part for size, part in zip(self.shape, self.chunk, strict=True))

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """The index of every chunk, the first axis outermost."""
        return itertools.product(*map(range, self.counts))

    def start(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """A chunk's first index in the array."""
        return tuple(i * size for i, size in zip(index, self.chunk, strict=True))

    def over(self, start: tuple[int, ...], block: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The indices of the chunks that a rectangle touches."""
        ranges = [
            range(first // size, (first + count - 1) // size + 1)
            for first, count, size in zip(start, block, self.chunk, strict=True)
        ]
        return itertools.product(*ranges)


def chunk_key(index: tuple[int, ...]) -> str:
    """In (0, 3, 0). Out "c.0.3.0": the file's name beside zarr.json."""
    return ".".join([CHUNK_PREFIX, *map(str, index)])


def grid_for(
    shape: tuple[int, ...],
    is_shared: Sequence[bool],
    itemsize: int,
    num_devices: int,
    max_bytes: int = MAX_CHUNK_BYTES,
) -> Grid:
    """The largest chunks of at most max_bytes that are contiguous in one device's part.

    In: [89, 160, 2, 1536, 5120] of FP8 for eight devices that share the second axis.
    Out: [1, 4, 2, 1536, 5120], 63 MB; a device's part is 89 x 5 of them.

    Args:
      is_shared: of each axis, whether the devices divide it among them.
    """
    part = [
        size // num_devices if shared else size
        for size, shared in zip(shape, is_shared, strict=True)
    ]
    for axis, size in enumerate(part):
        row_bytes = itemsize * math.prod(part[axis + 1 :])
        if size * row_bytes <= max_bytes:
            break
        fitting = max(1, max_bytes // row_bytes)
        part[axis] = next(n for n in range(fitting, 0, -1) if size % n == 0)
    return Grid(shape, tuple(part))
