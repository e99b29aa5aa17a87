"""How far a long run over bytes is: a bar on a terminal, a line of the log now and then elsewhere.

Knows no files.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


def has_bars() -> bool:
    """Whether a bar may be drawn: on a terminal that nobody wants to have lines alone.

    TQDM_DISABLE, which tqdm itself reads when it is imported, may be set later than that.
    """
    return sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")


class Progress:
    """A context manager that is told of bytes and shows their rate and what time is left.

    Args:
      what: is done with the bytes, for the reader.
      total: bytes in all.
      done: bytes that an earlier run has done.
      shown: whether anything is shown.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, shown: bool = True) -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._start = self._last = time.monotonic()
        is_bar = shown and has_bars()
        self._lines = shown and not is_bar
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            desc=what,
            disable=not is_bar,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._lines and kind is None:
            self._say()

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        self._done += nbytes
        self._bar.update(nbytes)
        if self._lines and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._say()

    def _say(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._before) / seconds
        left = (self._total - self._done) / rate if rate else float("inf")
        logger.info(
            "%s: %.3f of %.3f GB, %.3f GB/s, %.0f s left",
            self._what,
            self._done / 1e9,
            self._total / 1e9,
            rate / 1e9,
            left,
        )
