"""The converted form of a checkpoint: sharded arrays in chunks, read alone and checked one by one.

Knows no model and writes nothing. The arrays are an Orbax checkpoint of zarr version 3 whose chunks
are plain bytes, each a file; the manifest beside it, written last, says what every chunk must be.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from checkpoints.checksums import crc_of
from checkpoints.direct import read_directly
from checkpoints.layout import Grid, chunk_key
from checkpoints.names import Placement
from checkpoints.reader import DTYPES, CheckpointError, TensorInfo, aligned_empty, fill, rows_shape

FORMAT = "glm-jax-weights-1"
MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "journal.jsonl"  # there while a conversion is not finished
WEIGHTS_NAME = "weights"  # the Orbax checkpoint
SOURCE_NAME = "source"  # what export needs besides: headers, index, where each tensor went
TENSORS_NAME = "tensors.json"


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array of the converted form.

    Attributes:
      dtype: a key of DTYPES.
      grid: its shape and that of its chunks.
      checksums: CRC-32 of each chunk, by its key.
    """

    dtype: str
    grid: Grid
    checksums: dict[str, int]


class Converted:
    """A converted checkpoint, whole as far as names and sizes of files tell.

    Attributes:
      directory: the directory.
      num_devices: for how many devices its chunks were cut.
      arrays: every array by dotted path.
      tensors: every chunk, as if it were a tensor of a checkpoint, by "path/key".
      source_files: by name, the CRC-32 of each file of the original besides its tensors.

    Raises:
      CheckpointError: the conversion is not finished, or a file is missing, broken or cut short.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        manifest = read_manifest(self.directory)
        self.num_devices: int = manifest["num_devices"]
        self.source_files: dict[str, int] = manifest["files"]
        self.arrays = {path: _parse_array(entry) for path, entry in manifest["arrays"].items()}
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path, array in self.arrays.items():
            self._add_array(path, array)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held open between reads: there are more chunks than a process may open files."""

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    @property
    def table(self) -> dict[str, Placement]:
        """Where each chunk lies in its array, by its name in `tensors`."""
        return {
            name: Placement(path, start, (chunk := self.arrays[path].grid.chunk), chunk, "plain")
            for name, (path, start) in self._starts.items()
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a chunk, or rows of its first dimension longer than 1, into a fresh array.

        Safe to call from several threads.

        Raises:
          CheckpointError: the file cannot be read, or, if all of it is read, has another checksum.
        """
        info = self.tensors[name]
        array = aligned_empty(rows_shape(info, rows), DTYPES[info.dtype])
        self.read_into(name, rows, array)
        return array

    def read_into(self, name: str, rows: slice | None, target: np.ndarray) -> None:
        """As read, into a C-contiguous array of the chunk's dtype and of as many elements."""
        info = self.tensors[name]
        raw, first = target.reshape(-1).view(np.uint8), 0
        if rows is not None:
            first = rows.start * (info.nbytes // info.shape[0])
        try:
            done = read_directly(info.file, raw) if rows is None else 0
            descriptor = os.open(info.file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read {info.file}: {error}") from error
        try:
            fill(descriptor, info, raw[done:], first + done)
        finally:
            os.close(descriptor)
        if rows is None:
            self._check(name, crc_of(raw))

    def _check(self, name: str, found: int) -> None:
        path, key = name.rsplit("/", 1)
        expected = self.arrays[path].checksums[key]
        if found != expected:
            raise CheckpointError(
                f"{self.tensors[name].file} is damaged: its bytes have CRC-32 {found:08x} and "
                f"{MANIFEST_NAME} says {expected:08x}; copy the file again, or convert again"
            )

    def _add_array(self, path: str, array: ArrayInfo) -> None:
        folder = self.directory / WEIGHTS_NAME / path
        grid = array.grid
        try:
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        except OSError as error:
            raise CheckpointError(f"cannot list {folder}: {error}; copy it again") from error
        shape = _without_leading_ones(grid.chunk)
        nbytes = DTYPES[array.dtype].itemsize * int(np.prod(shape))
        for index in grid:
            key = chunk_key(index)
            file = folder / key
            if sizes.get(key) != nbytes:
                found = "is missing" if key not in sizes else f"has {sizes[key]} bytes"
                raise CheckpointError(
                    f"{file} {found}; a chunk of {path} has {nbytes} bytes: copy the file again, "
                    "or convert again"
                )
            name = f"{path}/{key}"
            self.tensors[name] = TensorInfo(name, file, array.dtype, shape, 0, nbytes)
            self._starts[name] = (path, grid.start(index))


def is_converted(directory: str | Path) -> bool:
    """Whether the directory is a conversion's, finished or not."""
    return any((Path(directory) / name).exists() for name in (MANIFEST_NAME, JOURNAL_NAME))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished conversion.

    Raises:
      CheckpointError: there is none, or it is damaged or of another format.
    """
    path = directory / MANIFEST_NAME
    try:
        sealed = json.loads(path.read_bytes())
        body, crc = sealed["manifest"], sealed["crc32"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {MANIFEST_NAME}: its conversion is not finished; run the same "
            "convert command again, which goes on where it stopped"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path} is damaged; copy it again, or convert again") from None
    if crc != zlib.crc32(canonical(body)):
        raise CheckpointError(f"{path} is damaged; copy it again, or convert again")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{path} is of format {body['format']!r}, not {FORMAT!r}: convert again from the "
            "original, or export with the version that converted it"
        )
    return body


def canonical(content: Any) -> bytes:
    """JSON that is the same bytes for the same content, which is what checksums are taken of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _parse_array(entry: dict[str, Any]) -> ArrayInfo:
    grid = Grid(tuple(entry["shape"]), tuple(entry["chunk"]))
    return ArrayInfo(entry["dtype"], grid, entry["crc32"])


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """So that rows are counted along the first axis that has several. In (1, 4, 2). Out (4, 2)."""
    first = next((axis for axis, size in enumerate(shape) if size > 1), len(shape) - 1)
    return shape[first:]
