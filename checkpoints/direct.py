"""Reads of whole files past the page cache, unless they are in it.

Knows no tensors. A file that is not cached comes straight from the disk into its place, which spares
the processor a copy: seen on two cores and a virtual disk (2026-11-24), as fast as through the cache
while a core was free, 2.5 times as fast under a load of 17. One that is cached, as after a restart,
comes from there. Mappings were five times slower than either.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

_BLOCK_BYTES = 4096  # direct reads start, end and land at multiples of it
_MIN_BYTES = 1 << 20
# What file systems answer that have no direct reads, or none at this place.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


def read_directly(file: Path, raw: np.ndarray) -> int:
    """Reads a file's beginning, as far as direct reads go, into bytes; returns how many it read.

    The rest, which may be all, is for an ordinary read: the end that fills no block, and everything
    where the file is small, cached, or on a file system without direct reads.

    Args:
      raw: uint8, contiguous, as long as the file.

    Raises:
      OSError: the file cannot be read.
    """
    direct = getattr(os, "O_DIRECT", None)
    wanted = raw.size // _BLOCK_BYTES * _BLOCK_BYTES
    if direct is None or raw.size < _MIN_BYTES or raw.ctypes.data % _BLOCK_BYTES:
        return 0
    try:
        descriptor = os.open(file, os.O_RDONLY | direct)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return 0
        raise
    try:
        if _is_cached(file, wanted - _BLOCK_BYTES):
            return 0
        done = 0
        while done < wanted:
            count = os.preadv(descriptor, [raw[done:wanted]], done)
            done += count
            if count == 0 or done % _BLOCK_BYTES:
                break
        return done
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return 0
        raise
    finally:
        os.close(descriptor)


def _is_cached(file: Path, last: int) -> bool:
    """Whether the first block and the one that begins at byte `last` are in the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    block = bytearray(_BLOCK_BYTES)
    try:
        return all(os.preadv(descriptor, [block], at, os.RWF_NOWAIT) for at in (0, last))
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
