"""What a conversion has finished so far: one line a piece, each on the disk before the next.

Knows nothing of the pieces. A line that a kill cut short is dropped, and so is its piece.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any, Self

from checkpoints.converted import canonical
from checkpoints.durable import explained, sync_directory
from checkpoints.reader import CheckpointError

Record = dict[str, Any]


class Journal:
    """An open journal; a context manager that keeps every other process out meanwhile.

    Attributes:
      records: what was written to it, in order.

    Raises:
      CheckpointError: another process has it open, it cannot be written, or it is another
        conversion's.
    """

    def __init__(self, path: Path, header: Record) -> None:
        with explained(path):
            self._file = path.open("a+b", buffering=0)
            sync_directory(path.parent)
        try:
            self._lock(path)
            self.records = self._read()
            if not self.records:
                self.append(header)
            if self.records.pop(0) != header:
                raise CheckpointError(
                    f"{path.parent} holds an unfinished conversion of other files or for another "
                    "target: remove it, or convert to another directory"
                )
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Record) -> None:
        """Writes a record and brings it to the disk."""
        body = canonical(record)
        with explained(Path(self._file.name)):
            os.write(self._file.fileno(), b"%08x %s\n" % (zlib.crc32(body), body))
            os.fsync(self._file.fileno())
        self.records.append(record)

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is converting to {path.parent}: wait for it, or stop it"
            ) from None

    def _read(self) -> list[Record]:
        """The whole lines; whatever follows the last of them is cut off."""
        self._file.seek(0)
        records, end = [], 0
        for line in self._file.read().splitlines(keepends=True):
            crc, _, body = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(body):
                break
            records.append(json.loads(body))
            end += len(line)
        self._file.truncate(end)
        return records
