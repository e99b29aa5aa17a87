"""Files that appear whole or not at all, also when the machine stops in between.

Knows nothing of what is in them. Errors of the disk become CheckpointErrors that say what to do.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from checkpoints.reader import CheckpointError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def write_whole(path: Path, content: Iterable[np.ndarray | bytes]) -> None:
    """Writes a file, brings it to the disk, and only then gives it its name.

    Args:
      path: replaced if it exists.
      content: the file's bytes, in C-contiguous pieces.

    Raises:
      CheckpointError: the disk is full or may not be written; nothing stands under the name then
        that did not before.
    """
    partial = partial_path(path)
    with explained(path):
        try:
            with partial.open("wb", buffering=0) as file:
                for piece in content:
                    _write_all(file.fileno(), piece)
                os.fsync(file.fileno())
            partial.replace(path)
            sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def make_directory(path: Path) -> None:
    """Makes a directory and those above it, and brings their entries to the disk.

    Raises:
      CheckpointError: it cannot be made.
    """
    if path.is_dir():
        return
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        sync_directory(path.parent)


def check_space(directory: Path, nbytes: int) -> None:
    """Says beforehand that a disk has no room.

    Args:
      directory: where so many bytes are still to be written.

    Raises:
      CheckpointError: fewer are free.
    """
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise CheckpointError(
            f"cannot write {directory}: {nbytes / 1e9:.3f} GB are still to be written and "
            f"{free / 1e9:.3f} GB are free; free some space and run the same command again"
        )


def sync_directory(path: Path) -> None:
    """Brings a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError of writing into one that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = "free some space, or write elsewhere, and run the same command again"
        elif error.errno in _FORBIDDEN:
            advice = "write to a directory that is yours, or have this one's permissions changed"
        else:
            advice = "see to the disk and run the same command again"
        raise CheckpointError(f"cannot write {path}: {error.strerror}; {advice}") from error


def _write_all(descriptor: int, piece: np.ndarray | bytes) -> None:
    raw = memoryview(piece if isinstance(piece, bytes) else piece.reshape(-1).view(np.uint8))
    while raw:
        raw = raw[os.write(descriptor, raw) :]
