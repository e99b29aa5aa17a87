"""Stream a checkpoint into sharded weights; refuse anything unexpected.

Knows no model: names say where a tensor goes, specs say what the weights are, the mesh where they
live. Beside the weights, host memory never holds more than twice the largest tensor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from tqdm import tqdm

from checkpoints.names import Placement, compare, placements
from checkpoints.reader import Checkpoint, CheckpointError, TensorInfo
from checkpoints.shards import Shard, make_shard
from glm_jax.config import ModelConfig
from glm_jax.sharding import WeightSpec, sharding_for

_NUM_READERS = 4
# Most bytes read ahead, and most on their way to devices; one larger tensor may go alone.
_MAX_BUDGET = 256 << 20
_NUM_SHOWN = 5  # faults spelled out in an error; the rest are counted

MakeShard = Callable[[tuple[int, ...], np.dtype, SingleDeviceSharding], Shard]


def load_weights(
    directory: str | Path,
    config: ModelConfig,
    specs: Mapping[str, WeightSpec],
    mesh: Mesh,
    progress: bool = True,
    make_shard: MakeShard = make_shard,
) -> dict[str, jax.Array]:
    """Loads every weight, each device receiving only its own part.

    Everything is checked against the files' headers before the first weight is read. Host memory
    holds tensors read ahead and pieces on their way to devices, of either never more bytes than
    the largest tensor has.

    Args:
      directory: the checkpoint.
      config: what its config.json says.
      specs: every weight's shape, dtype and axes by dotted path, as the model wants them.
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
    table = placements(config)
    _check_specs(table, specs)
    with Checkpoint(directory) as checkpoint:
        _check_quantization(checkpoint, config, table)
        _check_names(checkpoint, config)
        _check_tensors(checkpoint, config, table)
        parts = {path: _make_parts(spec, mesh, make_shard) for path, spec in specs.items()}
        jobs = _plan(checkpoint, table, parts)
        _run(checkpoint, jobs, progress)
    return {path: _join(specs[path], mesh, parts.pop(path)) for path in list(specs)}


@dataclass(frozen=True, slots=True)
class _Part:
    """A shard, and its first index and size in the whole weight."""

    shard: Shard
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A piece of a tensor that one part needs: where it is in the tensor's block, and in the part."""

    shard: Shard
    source: tuple[slice, ...]
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """A tensor, or rows of it, to read and to cut up.

    Attributes:
      block: the shape that what is read takes, as a rectangle of the parameter.
      rows: the rows to read; None for all.
    """

    info: TensorInfo
    block: tuple[int, ...]
    rows: slice | None
    nbytes: int
    cuts: tuple[_Cut, ...]


def _make_parts(spec: WeightSpec, mesh: Mesh, make_shard: MakeShard) -> list[_Part]:
    parts = []
    sharding = sharding_for(spec.axes, mesh)
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        assert index is not None, "a NamedSharding gives every device an index"
        bounds = [part.indices(size) for part, size in zip(index, spec.shape, strict=True)]
        start = tuple(first for first, _, _ in bounds)
        shape = tuple(last - first for first, last, _ in bounds)
        shard = make_shard(shape, np.dtype(spec.dtype), SingleDeviceSharding(device))
        parts.append(_Part(shard, start, shape))
    return parts


def _join(spec: WeightSpec, mesh: Mesh, parts: list[_Part]) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
        spec.shape, sharding_for(spec.axes, mesh), [part.shard.finish() for part in parts]
    )


def _plan(
    checkpoint: Checkpoint, table: Mapping[str, Placement], parts: Mapping[str, list[_Part]]
) -> list[_Job]:
    """One job for each tensor that some device of this process needs, in the order on disk."""
    jobs = []
    for info in checkpoint:
        placement = table.get(info.name)
        if placement is not None:
            cuts = []
            for part in parts[placement.path]:
                overlap = placement.overlap(part.start, part.shape)
                if overlap is not None:
                    start = tuple(where.start for where in overlap.outside)
                    cuts.append(_Cut(part.shard, overlap.inside, start))
            if cuts:
                jobs.append(_narrow(info, placement, cuts))
    return jobs


def _narrow(info: TensorInfo, placement: Placement, cuts: list[_Cut]) -> _Job:
    """Leaves out leading rows and trailing rows that no cut needs.

    In: a tensor [K*H, D] placed as [1, K, H, D], of which the cuts need k in 2..3.
    Out: rows 2H..4H, block [1, 2, H, D], cuts that count k from 0.
    """
    axis = next((i for i, size in enumerate(placement.block) if size > 1), 0)
    size, num_rows = placement.block[axis], info.shape[0]
    low = min(cut.source[axis].start for cut in cuts)
    high = max(cut.source[axis].stop for cut in cuts)
    if (low, high) == (0, size) or num_rows % size:
        return _Job(info, placement.block, None, info.nbytes, tuple(cuts))
    step = num_rows // size
    rows = slice(low * step, high * step)
    block = tuple(high - low if i == axis else n for i, n in enumerate(placement.block))
    return _Job(
        info,
        block,
        rows,
        info.nbytes // num_rows * (rows.stop - rows.start),
        tuple(_Cut(cut.shard, _shift(cut.source, axis, low), cut.start) for cut in cuts),
    )


def _shift(source: tuple[slice, ...], axis: int, low: int) -> tuple[slice, ...]:
    return tuple(
        slice(s.start - low, s.stop - low) if i == axis else s for i, s in enumerate(source)
    )


def _run(checkpoint: Checkpoint, jobs: Sequence[_Job], progress: bool) -> None:
    """Reads the jobs in order, several at a time, and hands each to its shards."""
    largest = max(job.nbytes for job in jobs)
    budget = min(_MAX_BUDGET, largest)  # so that in a small model, too, it is at most one tensor
    total = sum(job.nbytes for job in jobs)
    reading: deque[tuple[_Job, Future[np.ndarray]]] = deque()
    held = 0
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar,
        ThreadPoolExecutor(_NUM_READERS, "checkpoint-reader") as pool,
    ):
        placer = _Placer(budget)

        def finish_oldest() -> int:
            # A function of its own, so that no name keeps the tensor after it is placed.
            job, future = reading.popleft()
            placer.place(job, future.result())
            bar.update(job.nbytes)
            return job.nbytes

        for job in jobs:
            while reading and held + job.nbytes > budget:
                held -= finish_oldest()
            reading.append((job, pool.submit(checkpoint.read, job.info.name, job.rows)))
            held += job.nbytes
        while reading:
            finish_oldest()
        placer.wait()


class _Placer:
    """Cuts tensors up for their shards; waits rather than have more than `budget` bytes under way."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._under_way = 0
        self._shards: dict[int, Shard] = {}

    def place(self, job: _Job, tensor: np.ndarray) -> None:
        block = tensor.reshape(job.block)
        for cut in job.cuts:
            piece = block[cut.source]
            if self._under_way + piece.nbytes > self._budget:
                self.wait()
            cut.shard.write(piece, cut.start)
            self._under_way += piece.nbytes
            self._shards[id(cut.shard)] = cut.shard

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


def _check_quantization(
    checkpoint: Checkpoint, config: ModelConfig, table: Mapping[str, Placement]
) -> None:
    for info in checkpoint:
        placement = table.get(info.name)
        if placement is None or placement.kind != "values":
            continue
        if info.dtype == "F8_E4M3" and not config.is_fp8:
            raise CheckpointError(
                f"{info.file}: {info.name} is FP8, but config.json has no quantization_config: "
                "use the config.json that belongs to the FP8 checkpoint"
            )
        if info.dtype != "F8_E4M3" and config.is_fp8:
            raise CheckpointError(
                f"{info.file}: {info.name} is {info.dtype}, but config.json's quantization_config "
                "says that it is FP8: use the config.json that belongs to this checkpoint"
            )


def _check_names(checkpoint: Checkpoint, config: ModelConfig) -> None:
    missing, unexpected = compare(config, checkpoint.tensors)
    faults = []
    if missing:
        faults.append(f"{_count(missing)} missing: {_first(missing)}")
    if unexpected:
        faults.append(f"{_count(unexpected)} unexpected: {_first(unexpected)}")
    if faults:
        raise CheckpointError(
            f"{checkpoint.directory} does not hold the tensors that its config.json describes. "
            f"{'. '.join(faults)}. Check that the download is complete and of one revision"
        )


def _check_tensors(
    checkpoint: Checkpoint, config: ModelConfig, table: Mapping[str, Placement]
) -> None:
    faults = []
    for info in checkpoint:
        placement = table.get(info.name)
        if placement is None:
            continue
        shapes, dtypes = [placement.shape], ["BF16", "F16", "F32"]
        if placement.kind == "values" and config.is_fp8:
            dtypes = ["F8_E4M3"]
        if placement.kind == "scale":
            shapes.append(placement.shape[:1])
            dtypes = ["F32", "BF16"]
        if info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            faults.append(f"{info.name} has shape {list(info.shape)}, expected {wanted}")
        if info.dtype not in dtypes:
            faults.append(f"{info.name} is {info.dtype}, expected {' or '.join(dtypes)}")
    if faults:
        raise CheckpointError(
            f"{checkpoint.directory} does not fit its config.json: {_first(faults, '; ')}. "
            "Check that both come from the same model"
        )


def _count(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _first(items: Sequence[str], separator: str = ", ") -> str:
    rest = len(items) - _NUM_SHOWN
    shown = separator.join(items[:_NUM_SHOWN])
    return f"{shown} and {rest} more" if rest > 0 else shown
