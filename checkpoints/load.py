"""Stream a checkpoint into sharded weights; refuse anything unexpected.

Knows no model: names or chunks say where a piece goes, specs say what the weights are, the mesh
where they live. What a device's memory is host memory for is read right into its place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from checkpoints.checks import check_arrays, check_tensors
from checkpoints.converted import Converted, is_converted
from checkpoints.cuts import Job, Part, cut_up
from checkpoints.names import MTP_PREFIX, Placement, placements
from checkpoints.progress import Progress
from checkpoints.reader import DTYPES, Checkpoint, TensorInfo
from checkpoints.shards import Shard, make_shard
from glm_jax.config import ModelConfig
from glm_jax.sharding import WeightSpec, sharding_for

_MAX_QUEUED = 4  # reads that wait for each reader, so that none ever waits for work

MakeShard = Callable[[tuple[int, ...], np.dtype, SingleDeviceSharding], Shard]


class Source(Protocol):
    """Where tensors, or pieces of weights by whatever names, are read from; see Checkpoint."""

    def __iter__(self) -> Iterator[TensorInfo]: ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray: ...

    def read_into(self, name: str, rows: slice | None, target: np.ndarray) -> None: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read.

    Attributes:
      num_readers: reads at a time. A network volume wants many, each of one chunk or tensor.
      max_ahead_bytes: most bytes read ahead, and most on their way to devices; one larger tensor
        may go alone.
    """

    num_readers: int = 4
    max_ahead_bytes: int = 256 << 20


DEFAULT_READING = Reading()


def load_weights(
    directory: str | Path,
    config: ModelConfig,
    specs: Mapping[str, WeightSpec],
    mesh: Mesh,
    progress: bool = True,
    make_shard: MakeShard = make_shard,
    reading: Reading = DEFAULT_READING,
) -> dict[str, jax.Array]:
    """Loads every weight from either form of a checkpoint, each device receiving only its own part.

    Everything is checked against the files' headers before the first weight is read. Host memory
    holds tensors read ahead and pieces on their way to devices, of either never more bytes than
    `reading` says, nor than the largest tensor has in a checkpoint of the published layout.

    Args:
      directory: the checkpoint, published or converted.
      config: what its config.json says.
      specs: every weight's shape, dtype and axes by dotted path, as the model wants them; the MTP
        layer is loaded if its weights are among them.
      mesh: the devices.
      progress: whether to show a progress bar, in bytes.
      make_shard: makes the buffer for a device's part of a weight.

    Returns:
      The weights by dotted path. FP8 values stay FP8, scales are float32, the rest has its spec's dtype.

    Raises:
      CheckpointError: the checkpoint is broken, or does not hold exactly the config's tensors, each
        with its shape and a dtype that fits.
      ValueError: the specs are not those of the config.
    """
    if is_converted(directory):
        with Converted(directory) as converted:
            check_arrays(converted, specs)
            parts = _all_parts(specs, mesh, make_shard)
            _run(converted, _plan(converted, converted.table, parts), progress, reading)
    else:
        with_mtp = any(path.startswith(MTP_PREFIX) for path in specs)
        table = placements(config, with_mtp=with_mtp)
        _check_specs(table, specs)
        with Checkpoint(directory) as checkpoint:
            check_tensors(checkpoint, config, with_mtp=with_mtp)
            parts = _all_parts(specs, mesh, make_shard)
            jobs = _plan(checkpoint, table, parts)
            largest = max(job.nbytes for job in jobs)
            ahead = min(reading.max_ahead_bytes, largest)  # in a small model, too, one tensor
            _run(checkpoint, jobs, progress, replace(reading, max_ahead_bytes=ahead))
    return {path: _join(specs[path], mesh, parts.pop(path)) for path in list(specs)}


_Parts = dict[str, list[Part[Shard]]]


def _all_parts(specs: Mapping[str, WeightSpec], mesh: Mesh, make_shard: MakeShard) -> _Parts:
    return {path: _make_parts(spec, mesh, make_shard) for path, spec in specs.items()}


def _make_parts(spec: WeightSpec, mesh: Mesh, make_shard: MakeShard) -> list[Part[Shard]]:
    parts = []
    sharding = sharding_for(spec.axes, mesh)
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        assert index is not None, "a NamedSharding gives every device an index"
        bounds = [part.indices(size) for part, size in zip(index, spec.shape, strict=True)]
        start = tuple(first for first, _, _ in bounds)
        shape = tuple(last - first for first, last, _ in bounds)
        shard = make_shard(shape, np.dtype(spec.dtype), SingleDeviceSharding(device))
        parts.append(Part(shard, start, shape))
    return parts


def _join(spec: WeightSpec, mesh: Mesh, parts: list[Part[Shard]]) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
        spec.shape, sharding_for(spec.axes, mesh), [part.target.finish() for part in parts]
    )


def _plan(source: Source, table: Mapping[str, Placement], parts: _Parts) -> list[Job[Shard]]:
    """One job for each tensor that some device of this process needs, in the order on disk."""
    jobs = []
    for info in source:
        placement = table.get(info.name)
        if placement is not None and placement.path in parts:
            jobs.append(cut_up(info, placement, parts[placement.path]))
    return [job for job in jobs if job is not None]


def _run(source: Source, jobs: Sequence[Job[Shard]], progress: bool, reading: Reading) -> None:
    """Reads the jobs in order, several at a time, and hands each to its shards."""
    budget = reading.max_ahead_bytes
    total = sum(job.nbytes for job in jobs)
    under_way: deque[tuple[Job[Shard], int, Future[np.ndarray | None]]] = deque()
    held = 0
    with (
        Progress("weights", total, shown=progress) as bar,
        ThreadPoolExecutor(reading.num_readers, "checkpoint-reader") as pool,
    ):
        placer = _Placer(budget)

        def finish_oldest() -> int:
            # A function of its own, so that no name keeps the tensor after it is placed.
            job, nbytes, future = under_way.popleft()
            tensor = future.result()
            if tensor is not None:
                placer.place(job, tensor)
            bar.advance(job.nbytes)
            return nbytes

        for job in jobs:
            memory = _own_memory(job)
            nbytes = job.nbytes if memory is None else 0
            while under_way and (
                held + nbytes > budget or len(under_way) >= _MAX_QUEUED * reading.num_readers
            ):
                held -= finish_oldest()
            under_way.append((job, nbytes, pool.submit(_read, source, job, memory)))
            held += nbytes
        while under_way:
            finish_oldest()
        placer.wait()


def _own_memory(job: Job[Shard]) -> np.ndarray | None:
    """Where the job's one piece belongs, if it can be read right there."""
    if not job.is_one_piece:
        return None
    (cut,) = job.cuts
    return cut.target.memory(cut.start, job.block, DTYPES[job.info.dtype])


def _read(source: Source, job: Job[Shard], memory: np.ndarray | None) -> np.ndarray | None:
    if memory is None:
        return source.read(job.info.name, job.rows)
    source.read_into(job.info.name, job.rows, memory)
    return None


class _Placer:
    """Cuts tensors up for their shards; waits rather than have more than `budget` bytes under way."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._under_way = 0
        self._shards: dict[int, Shard] = {}

    def place(self, job: Job[Shard], tensor: np.ndarray) -> None:
        block = tensor.reshape(job.block)
        for cut in job.cuts:
            piece = block[cut.source]
            if self._under_way + piece.nbytes > self._budget:
                self.wait()
            cut.target.write(piece, cut.start)
            self._under_way += piece.nbytes
            self._shards[id(cut.target)] = cut.target

    def wait(self) -> None:
        for shard in self._shards.values():
            shard.wait()
        self._shards.clear()
        self._under_way = 0


def _check_specs(table: Mapping[str, Placement], specs: Mapping[str, WeightSpec]) -> None:
    sizes: dict[str, int] = {}
    for placement in table.values():
        sizes[placement.path] = sizes.get(placement.path, 0) + math.prod(placement.block)
    wanted = {path: math.prod(spec.shape) for path, spec in specs.items()}
    if sizes != wanted:
        differing = sorted(path for path, _ in sizes.items() ^ wanted.items())
        raise ValueError(
            f"the weights' specs are not those of the config; they differ in {differing}"
        )
