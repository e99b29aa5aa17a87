"""Direct reads: the same bytes as ordinary ones, past the cache only where that can be."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from checkpoints import direct
from checkpoints.direct import read_directly
from checkpoints.reader import aligned_empty

BYTES = np.dtype(np.uint8)
SIZE = (1 << 20) + 5000  # a megabyte, a block, and a bit of one


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chunk"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return path


def test_a_file_that_is_not_cached_is_read_up_to_its_last_whole_block(file: Path) -> None:
    raw = aligned_empty((SIZE,), BYTES)
    done = read_directly(file, raw)
    assert done in (0, SIZE // 4096 * 4096)  # 0 on a file system without direct reads
    assert raw[:done].tobytes() == file.read_bytes()[:done]
    assert read_directly(file, raw) == 0  # cached now, by the line above


def test_memory_that_is_not_aligned_is_left_to_ordinary_reads(file: Path) -> None:
    assert read_directly(file, aligned_empty((SIZE + 8,), BYTES)[8:]) == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_reads_is_left_to_ordinary_ones(
    file: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(direct.os, "preadv", refuse)
    assert read_directly(file, aligned_empty((SIZE,), BYTES)) == 0


def test_a_disk_that_fails_is_not_hidden(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(direct.os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_directly(file, aligned_empty((SIZE,), BYTES))
