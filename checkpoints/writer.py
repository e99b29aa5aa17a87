"""Write a checkpoint in the published layout, from the parameter tree or any other tensors.

Knows nothing of what the tensors mean beyond their names. Files appear under their final names only
when they are complete, the index last, so that nothing half-written is taken for a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, TensorSpec, serialize_file

from checkpoints.names import Placement, placements
from checkpoints.reader import DTYPES, INDEX_NAME, MTP_NAME, SINGLE_NAME, CheckpointError
from checkpoints.shards import copy
from glm_jax.config import ModelConfig

GIB = 1 << 30


def tensors_from_weights(
    config: ModelConfig, weights: Mapping[str, jax.Array | np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The exact reverse of loading: the checkpoint's tensors, one at a time, in its order.

    From CPU devices nothing is copied but the tensor in hand; from others the host gets a copy of
    every weight.

    Args:
      config: the model's.
      weights: the parameter tree by dotted path, on whatever devices.

    Yields:
      Checkpoint names and arrays in the weights' own dtypes; scales as [out, 1].

    Raises:
      ValueError: the weights are not those of the config.
    """
    table = placements(config)
    paths = {placement.path for placement in table.values()}
    if paths != weights.keys():
        raise ValueError(
            f"these are not the config's weights; they differ in {sorted(paths ^ weights.keys())}"
        )
    parts = {path: _host_parts(weight) for path, weight in weights.items()}
    for name, placement in table.items():
        yield name, _gather(name, placement, parts[placement.path]).reshape(placement.shape)


def write_checkpoint(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = 4 * GIB,
) -> None:
    """Writes config.json, shards of safetensors and their index.

    A checkpoint already there is replaced: its index goes first, so that a write cut short leaves
    a directory that no loader accepts. Host memory holds one shard at a time.

    Args:
      directory: made if it does not exist.
      config: the content of config.json.
      tensors: names and arrays, in the order of the shards.
      max_shard_bytes: most bytes of tensors in one shard; a larger tensor gets a shard to itself.

    Raises:
      CheckpointError: the disk does not take it.
      ValueError: there is no tensor, a name comes twice, or a dtype has no place in a checkpoint.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partials: list[tuple[Path, list[str]]] = []
    names: set[str] = set()
    total = 0
    try:
        for shard in _shards(tensors, max_shard_bytes):
            repeated = names & shard.keys()
            if repeated:
                raise ValueError(f"{sorted(repeated)[0]} comes twice")
            names |= shard.keys()
            total += sum(array.nbytes for array in shard.values())
            path = directory / f".{len(partials) + 1:05d}.safetensors.partial"
            partials.append((path, list(shard)))
            _write_shard(path, shard)
        if not partials:
            raise ValueError("there are no tensors to write")
        _publish(directory, config, partials, total)
    finally:
        for path, _ in partials:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Part:
    """A device's part of a weight, as host memory, and its first index in the whole."""

    start: tuple[int, ...]
    array: np.ndarray


def _host_parts(weight: jax.Array | np.ndarray) -> list[_Part]:
    if isinstance(weight, np.ndarray):
        return [_Part((0,) * weight.ndim, weight)]
    return [
        _Part(tuple(part.start or 0 for part in shard.index), np.asarray(shard.data))
        for shard in weight.addressable_shards
        if shard.replica_id == 0
    ]


def _gather(name: str, placement: Placement, parts: list[_Part]) -> np.ndarray:
    """The block of a placement, a view where one part holds all of it."""
    overlaps = [(part.array, placement.overlap(part.start, part.array.shape)) for part in parts]
    pieces = [(array[o.outside], o.inside) for array, o in overlaps if o is not None]
    if sum(piece.size for piece, _ in pieces) != math.prod(placement.block):
        raise ValueError(f"{placement.path} is too small to hold {name}")
    if len(pieces) == 1:
        return pieces[0][0]
    block = np.empty(placement.block, pieces[0][0].dtype)
    for piece, where in pieces:
        copy(piece, block[where])
    return block


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    held = 0
    for name, array in tensors:
        if shard and held + array.nbytes > max_bytes:
            yield shard
            shard, held = {}, 0
        if name in shard:
            raise ValueError(f"{name} comes twice")
        if array.dtype not in DTYPES.values():
            raise ValueError(f"{name} is {array.dtype}; a checkpoint holds {', '.join(DTYPES)}")
        shard[name] = np.ascontiguousarray(array)
        held += array.nbytes
    if shard:
        yield shard


def _write_shard(path: Path, shard: Mapping[str, np.ndarray]) -> None:
    # The library's own NumPy functions refuse FP8; raw memory it takes.
    specs = {
        name: TensorSpec(
            dtype=array.dtype.name,
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in shard.items()
    }
    path.touch()  # with the user's umask; the library alone makes files nobody else can read
    mode = path.stat().st_mode
    try:
        serialize_file(specs, path, {"format": "pt"})
    except SafetensorError as error:  # the disk's, in the words of the library
        advice = "free some space, or write elsewhere, and run the same command again"
        raise CheckpointError(f"cannot write {path}: {error}; {advice}") from error
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _publish(
    directory: Path, config: Mapping[str, Any], partials: list[tuple[Path, list[str]]], total: int
) -> None:
    """Removes the checkpoint that was there and gives the new one its names, the index last."""
    (directory / INDEX_NAME).unlink(missing_ok=True)
    for old in (SINGLE_NAME, MTP_NAME):
        (directory / old).unlink(missing_ok=True)
    for old in directory.glob("model-*-of-*.safetensors"):
        old.unlink()
    _write_json(directory / "config.json", config)
    weight_map = {}
    for number, (path, names) in enumerate(partials, start=1):
        file = f"model-{number:05d}-of-{len(partials):05d}.safetensors"
        path.replace(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / INDEX_NAME, index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial_path = path.with_name(f".{path.name}.partial")
    with partial_path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial_path.replace(path)
