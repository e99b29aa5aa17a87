"""Lazy, ranged reads from a sharded safetensors checkpoint.

Knows no model: tensors are names, dtypes, shapes and byte ranges. Nothing is mapped into memory, so
what stays resident is what a caller keeps.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# GLM-4.7 keeps its MTP layer in a file of its own that an index may leave out.
MTP_NAME = "mtp.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}

_LENGTH_BYTES = 8  # a file begins with its header's length, little-endian
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# XLA's CPU client uses host memory in place when it is aligned so; otherwise it copies.
_ALIGNMENT = 64
_MAPPED_BYTES = 64 << 10


class CheckpointError(ValueError):
    """The files of a checkpoint are broken, incomplete, or not what the config describes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies on disk.

    Attributes:
      name: its name in the checkpoint.
      file: the file that holds it.
      dtype: safetensors' name of its element type, a key of DTYPES.
      shape: its shape.
      offset: its first byte, counted from the start of the file.
      nbytes: its length in bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """An open checkpoint directory; a context manager that closes its files.

    Attributes:
      directory: the directory.
      tensors: every tensor by name, in the order of files and of offsets within a file.

    Raises:
      CheckpointError: there is no checkpoint in the directory, a file or header is broken, a tensor
        the index names is not in its file, or two files hold the same tensor.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._descriptors: dict[Path, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        weight_map = _read_index(self.directory)
        try:
            for file in _files(self.directory, weight_map):
                self._add_file(file)
            self._check_index(weight_map)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    def close(self) -> None:
        """Closes the files; reads after it raise KeyError."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or rows of its first dimension, into a fresh array.

        Safe to call from several threads.

        Args:
          name: a key of `tensors`.
          rows: which rows, as slice(start, stop); None reads all.

        Raises:
          CheckpointError: the file ends early or cannot be read.
        """
        info = self.tensors[name]
        array = aligned_empty(rows_shape(info, rows), DTYPES[info.dtype])
        self.read_into(name, rows, array)
        return array

    def read_into(self, name: str, rows: slice | None, target: np.ndarray) -> None:
        """As read, into a C-contiguous array of the tensor's dtype and of as many elements."""
        info = self.tensors[name]
        skipped = rows.start * (info.nbytes // info.shape[0]) if rows is not None else 0
        fill(self._descriptors[info.file], info, target, info.offset + skipped)

    def _add_file(self, file: Path) -> None:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            raise CheckpointError(
                f"{file} is missing though {INDEX_NAME} names it: download it"
            ) from None
        except OSError as error:
            raise CheckpointError(f"cannot open {file}: {error}") from error
        self._descriptors[file] = descriptor
        for info in _read_header(file, descriptor):
            if info.name in self.tensors:
                raise CheckpointError(
                    f"{info.name} is in both {self.tensors[info.name].file} and {file}: "
                    "remove the file that does not belong to this checkpoint"
                )
            self.tensors[info.name] = info

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            path = self.directory / file
            if name not in self.tensors:
                raise CheckpointError(
                    f"{path} lacks tensor {name}, which {INDEX_NAME} says it holds: download the "
                    "file and the index again, from the same revision"
                )
            if self.tensors[name].file != path:
                raise CheckpointError(
                    f"{INDEX_NAME} says tensor {name} is in {path}, but {self.tensors[name].file} "
                    "holds it: download the index again"
                )


def rows_shape(info: TensorInfo, rows: slice | None) -> tuple[int, ...]:
    """The shape of some rows of a tensor; None is all of them."""
    return info.shape if rows is None else (rows.stop - rows.start, *info.shape[1:])


def fill(descriptor: int, info: TensorInfo, target: np.ndarray, offset: int) -> None:
    """Reads as many bytes of an open file as a C-contiguous array has.

    Raises:
      CheckpointError: the file ends early or cannot be read.
    """
    raw, done = target.reshape(-1).view(np.uint8), 0
    while done < raw.nbytes:
        try:
            count = os.preadv(descriptor, [raw[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot read {info.name}: {error}") from error
        if count == 0:
            raise CheckpointError(
                f"{info.file} ended while {info.name} was being read: the file has shrunk since "
                "it was opened; do not write to a checkpoint that is being loaded"
            )
        done += count


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array whose memory a CPU device can use in place.

    A large one is a mapping of its own, gone with its last reference: an allocator that serves
    several threads would keep many times the largest tensor for later.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= _MAPPED_BYTES:
        raw = np.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        return raw.view(dtype).reshape(shape)
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + nbytes].view(dtype).reshape(shape)


def _read_index(directory: Path) -> dict[str, str]:
    """The index's weight_map, tensor name -> file name; empty where there is no index."""
    path = directory / INDEX_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; download it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map object; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{path} puts tensor {name} into {file!r}: expected the name of a file beside it"
            )
    return weight_map


def _files(directory: Path, weight_map: dict[str, str]) -> list[Path]:
    names = sorted(set(weight_map.values())) or [SINGLE_NAME]
    if not weight_map and not (directory / SINGLE_NAME).exists():
        raise CheckpointError(
            f"{directory} holds no checkpoint: expected {INDEX_NAME} or {SINGLE_NAME} in it"
        )
    if MTP_NAME not in names and (directory / MTP_NAME).exists():
        names.append(MTP_NAME)
    return [directory / name for name in names]


def raw_header(file: Path) -> bytes:
    """All bytes of a file before its first tensor's."""
    with file.open("rb") as opened:
        prefix = opened.read(_LENGTH_BYTES)
        return prefix + opened.read(struct.unpack("<Q", prefix)[0])


def parse_raw_header(file: Path, raw: bytes) -> list[TensorInfo]:
    """The tensors that a file beginning with this raw header has, in the order of their bytes.

    Raises:
      CheckpointError: the header is broken.
    """
    return _parse_header(file, raw[_LENGTH_BYTES:], len(raw))


def _read_header(file: Path, descriptor: int) -> list[TensorInfo]:
    """The tensors of one file in the order of their bytes, which must tile it exactly."""
    file_bytes = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, _LENGTH_BYTES, 0)
    if len(prefix) < _LENGTH_BYTES:
        raise CheckpointError(
            f"{file} is truncated: {file_bytes} bytes do not hold a header; download it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    first = _LENGTH_BYTES + length
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} is not a safetensors file: its header would be {length} bytes long; "
            "if it is a Git LFS pointer, fetch the file it points to"
        )
    if first > file_bytes:
        raise CheckpointError(
            f"{file} is truncated: its header takes {first} bytes and the file has {file_bytes}; "
            "download it again"
        )
    tensors = _parse_header(file, os.pread(descriptor, length, _LENGTH_BYTES), first)
    end = first
    for info in tensors:
        if info.offset != end:
            fault = "overlaps the tensor before it" if info.offset < end else "leaves a gap"
            raise CheckpointError(
                f"{file}: tensor {info.name} begins at byte {info.offset} and {fault}, which ends "
                f"at {end}: the header is broken; download the file again"
            )
        end += info.nbytes
        if end > file_bytes:
            raise CheckpointError(
                f"{file} is truncated: tensor {info.name} ends at byte {end} and the file has "
                f"{file_bytes} bytes; download it again"
            )
    if end != file_bytes:
        raise CheckpointError(
            f"{file} has {file_bytes} bytes but its tensors end at byte {end}: "
            "the file is broken; download it again"
        )
    return tensors


def _parse_header(file: Path, raw: bytes, first: int) -> list[TensorInfo]:
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _unique(file, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{file} has a broken header, not valid JSON: {error}; download it again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a broken header: not an object; download it again")
    header.pop("__metadata__", None)
    tensors = [_parse_entry(file, name, entry, first) for name, entry in header.items()]
    # Empty tensors share their offset with a neighbor, so length breaks the tie.
    return sorted(tensors, key=lambda info: (info.offset, info.nbytes))


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{file}: its header names {twice} twice; download the file again")
    return unique


def _parse_entry(file: Path, name: str, entry: Any, first: int) -> TensorInfo:
    def broken(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name} {what}; download the file again")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise broken(f"has a broken header entry: {entry!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_counts(shape):
        raise broken(f"has shape {shape!r}, which is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(f"has data_offsets {offsets!r}, which are not a range of bytes")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {dtype!r}; only {', '.join(DTYPES)} can be read"
        )
    nbytes = offsets[1] - offsets[0]
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != expected:
        raise broken(f"spans {nbytes} bytes, but {dtype} {shape} takes {expected}")
    return TensorInfo(name, file, dtype, tuple(shape), first + offsets[0], nbytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
