"""Turn a converted checkpoint back into the files it was made of, byte for byte.

Knows no model: the headers kept with the conversion say what each file holds, and in which order.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.checksums import crc_of
from checkpoints.converted import SOURCE_NAME, TENSORS_NAME, WEIGHTS_NAME, Converted
from checkpoints.durable import make_directory, write_whole
from checkpoints.layout import chunk_key
from checkpoints.names import Placement
from checkpoints.progress import Progress
from checkpoints.reader import (
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointError,
    TensorInfo,
    parse_raw_header,
)
from checkpoints.shards import copy

_NUM_MAPPED = 16  # chunks that stay mapped: about a gigabyte


def export(source: str | Path, destination: str | Path, *, progress: bool = True) -> None:
    """Writes the original checkpoint again, checking every tensor's checksum on the way.

    A file appears when it is whole, and the one that makes the directory a checkpoint last.

    Args:
      source: the converted checkpoint.
      destination: an empty directory, or none yet.

    Raises:
      CheckpointError: the conversion is damaged, or the destination is not empty or cannot be
        written.
    """
    destination = Path(destination)
    make_directory(destination)
    if any(destination.iterdir()):
        raise CheckpointError(
            f"{destination} is not empty: export to a directory of its own, or, if an export was "
            "cut short there, remove what it left"
        )
    with Converted(source) as converted:
        where = json.loads(original_file(converted, f"{SOURCE_NAME}/{TENSORS_NAME}"))
        reader = _Reader(converted, where["tensors"])
        for name in converted.source_files:
            if not name.startswith(f"{SOURCE_NAME}/"):
                write_whole(destination / name, [original_file(converted, name)])
        shards = sorted(where["files"], key=lambda name: (name == SINGLE_NAME, name))
        headers = {
            name: original_file(converted, f"{SOURCE_NAME}/{name}.header") for name in shards
        }
        infos = {name: parse_raw_header(destination / name, headers[name]) for name in shards}
        total = sum(info.nbytes for shard in infos.values() for info in shard)
        with Progress("exporting", total, shown=progress) as bar:
            for name in shards:
                content = _content(headers[name], infos[name], reader, bar)
                write_whole(destination / name, content)
        index = f"{SOURCE_NAME}/{INDEX_NAME}"
        if index in converted.source_files:
            write_whole(destination / INDEX_NAME, [original_file(converted, index)])


def original_file(converted: Converted, name: str) -> bytes:
    """A small file of the conversion, checked.

    Raises:
      CheckpointError: it cannot be read or is damaged.
    """
    file = converted.directory / name
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}; copy it again") from error
    if zlib.crc32(content) != converted.source_files[name]:
        raise CheckpointError(
            f"{file} is not what was converted: it is damaged or was edited; copy it again"
        )
    return content


def _content(
    header: bytes, infos: list[TensorInfo], reader: _Reader, bar: Progress
) -> Iterator[np.ndarray | bytes]:
    yield header
    for info in infos:
        yield reader.tensor(info)
        bar.advance(info.nbytes)


class _Reader:
    """Puts tensors together from the chunks that hold them."""

    def __init__(self, converted: Converted, tensors: dict[str, Any]) -> None:
        self._converted = converted
        self._tensors = tensors
        self._chunk = lru_cache(_NUM_MAPPED)(self._map_chunk)

    def tensor(self, info: TensorInfo) -> np.ndarray:
        path, start, block, expected = self._tensors[info.name]
        place = Placement(path, tuple(start), tuple(block), info.shape, "plain")
        # Scales were widened to float32, which loses nothing either way.
        tensor = np.ascontiguousarray(self._gather(place).astype(DTYPES[info.dtype], copy=False))
        found = crc_of(tensor)
        if found != expected:
            raise CheckpointError(
                f"{self._converted.directory}: {info.name} comes out with CRC-32 {found:08x}, not "
                f"{expected:08x}: chunks of {path} are damaged; verify names them"
            )
        return tensor

    def _gather(self, place: Placement) -> np.ndarray:
        """The rectangle, a view where one chunk holds all of it."""
        array = self._converted.arrays[place.path]
        pieces = []
        for index in array.grid.over(place.start, place.block):
            overlap = place.overlap(array.grid.start(index), array.grid.chunk)
            assert overlap is not None, "the grid said that they touch"
            pieces.append((overlap.inside, self._chunk(place.path, index)[overlap.outside]))
        if len(pieces) == 1:
            return pieces[0][1]
        block = np.empty(place.block, DTYPES[array.dtype])
        for where, piece in pieces:
            copy(piece, block[where])
        return block

    def _map_chunk(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        array = self._converted.arrays[path]
        file = self._converted.directory / WEIGHTS_NAME / path / chunk_key(index)
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        return np.frombuffer(mapped, DTYPES[array.dtype]).reshape(array.grid.chunk)
