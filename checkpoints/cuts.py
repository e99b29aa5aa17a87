"""Which rows of a tensor are read for whom, and where the pieces of them go.

Knows neither files nor memory: a part is a rectangle of a parameter, whatever stands behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from checkpoints.names import Placement
from checkpoints.reader import TensorInfo


@dataclass(frozen=True, slots=True)
class Part[T]:
    """A rectangle of a parameter, by its first index and size, and what holds it."""

    target: T
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut[T]:
    """A piece of a tensor that one part needs: where it is in the tensor's block, and in the part."""

    target: T
    source: tuple[slice, ...]
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job[T]:
    """A tensor, or rows of it, to read and to cut up.

    Attributes:
      block: the shape that what is read takes, as a rectangle of the parameter.
      rows: the rows to read; None for all.
    """

    info: TensorInfo
    block: tuple[int, ...]
    rows: slice | None
    nbytes: int
    cuts: tuple[Cut[T], ...]

    @property
    def is_one_piece(self) -> bool:
        """Whether all that is read goes to one place, as it is."""
        return len(self.cuts) == 1 and all(
            where == slice(0, size)
            for where, size in zip(self.cuts[0].source, self.block, strict=True)
        )


def cut_up[T](info: TensorInfo, placement: Placement, parts: Iterable[Part[T]]) -> Job[T] | None:
    """What these parts need of a tensor; None if they need nothing."""
    cuts = []
    for part in parts:
        overlap = placement.overlap(part.start, part.shape)
        if overlap is not None:
            start = tuple(where.start for where in overlap.outside)
            cuts.append(Cut(part.target, overlap.inside, start))
    return _narrow(info, placement, cuts) if cuts else None


def _narrow[T](info: TensorInfo, placement: Placement, cuts: list[Cut[T]]) -> Job[T]:
    """Leaves out leading rows and trailing rows that no cut needs.

    In: a tensor [K*H, D] placed as [1, K, H, D], of which the cuts need k in 2..3.
    Out: rows 2H..4H, block [1, 2, H, D], cuts that count k from 0.
    """
    axis = next((i for i, size in enumerate(placement.block) if size > 1), 0)
    size, num_rows = placement.block[axis], info.shape[0]
    low = min(cut.source[axis].start for cut in cuts)
    high = max(cut.source[axis].stop for cut in cuts)
    if (low, high) == (0, size) or num_rows % size:
        return Job(info, placement.block, None, info.nbytes, tuple(cuts))
    step = num_rows // size
    rows = slice(low * step, high * step)
    block = tuple(high - low if i == axis else n for i, n in enumerate(placement.block))
    return Job(
        info,
        block,
        rows,
        info.nbytes // num_rows * (rows.stop - rows.start),
        tuple(Cut(cut.target, _shift(cut.source, axis, low), cut.start) for cut in cuts),
    )


def _shift(source: tuple[slice, ...], axis: int, low: int) -> tuple[slice, ...]:
    return tuple(
        slice(s.start - low, s.stop - low) if i == axis else s for i, s in enumerate(source)
    )
