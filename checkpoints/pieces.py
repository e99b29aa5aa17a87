"""The pieces of a conversion: which chunks are made together, of which rows of which tensors.

Knows no files' contents: headers in, a plan out. The same headers and devices give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from checkpoints.cuts import Job, Part, cut_up
from checkpoints.layout import MAX_CHUNK_BYTES, Grid, chunk_key, grid_for
from checkpoints.names import MTP_PREFIX, Placement, placements
from checkpoints.reader import DTYPES, Checkpoint, CheckpointError, TensorInfo
from glm_jax.config import ModelConfig
from glm_jax.sharding import WeightSpec, partition_spec

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """An array that is to be written.

    Attributes:
      dtype: a key of DTYPES. It holds the original's values exactly, so that export gives them back.
      grid: its shape and that of its chunks.
    """

    dtype: str
    grid: Grid


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks of one array that share tensors, and are therefore made at once.

    Attributes:
      path: the array's.
      indices: of the chunks.
      jobs: what is read for them; a cut's target counts the indices.
      nbytes: of the chunks.
    """

    path: str
    indices: tuple[Index, ...]
    jobs: tuple[Job[int], ...]
    nbytes: int

    @property
    def name(self) -> str:
        """Its own, within the plan."""
        return f"{self.path}/{chunk_key(self.indices[0])}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a conversion is to do.

    Attributes:
      table: where each tensor of the original goes.
      targets: the arrays by path.
      pieces: in the order of the original's bytes.
    """

    table: dict[str, Placement]
    targets: dict[str, Target]
    pieces: list[Piece]


def plan_conversion(
    checkpoint: Checkpoint,
    config: ModelConfig,
    specs: Mapping[str, WeightSpec],
    num_devices: int,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> Plan:
    """The plan for a checkpoint whose tensors are those of its config.

    A tensor that the model has no place for, as the copies of the embedding in the MTP layer, becomes
    an array of its own.
    """
    known = placements(config, with_mtp=any(path.startswith(MTP_PREFIX) for path in specs))
    table = {info.name: known.get(info.name) or _by_itself(info) for info in checkpoint}
    shared = partial(grid_for, num_devices=num_devices, max_bytes=max_chunk_bytes)
    targets = _targets(checkpoint, table, specs, shared)
    needs: dict[tuple[str, Index], list[TensorInfo]] = {}
    for info in checkpoint:
        place = table[info.name]
        chunks = targets[place.path].grid.over(place.start, place.block)
        for lead in dict.fromkeys(index[:-1] for index in chunks):
            needs.setdefault((place.path, lead), []).append(info)
    pieces = [
        _piece(path, lead, infos, table, targets[path]) for (path, lead), infos in needs.items()
    ]
    return Plan(table, targets, pieces)


def _by_itself(info: TensorInfo) -> Placement:
    if not info.shape or not info.nbytes:
        raise CheckpointError(f"{info.file}: {info.name} has shape {list(info.shape)}, so no rows")
    return Placement(info.name, (0,) * len(info.shape), info.shape, info.shape, "plain")


def _targets(
    checkpoint: Checkpoint,
    table: Mapping[str, Placement],
    specs: Mapping[str, WeightSpec],
    grid_of: Callable[[tuple[int, ...], Sequence[bool], int], Grid],
) -> dict[str, Target]:
    dtypes: dict[str, set[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for info in checkpoint:
        place = table[info.name]
        # Scales are float32 in the model whatever they are on disk, and float32 holds bfloat16.
        dtypes.setdefault(place.path, set()).add("F32" if place.kind == "scale" else info.dtype)
        if place.path not in specs:
            shapes[place.path] = info.shape
    targets = {}
    for path, found in dtypes.items():
        spec = specs.get(path)
        dtype = found.pop() if len(found) == 1 else "F32"
        itemsize = DTYPES[dtype].itemsize
        if spec is None:
            grid = grid_of(shapes[path], [False] * len(shapes[path]), itemsize)
        else:
            shared = [place is not None for place in partition_spec(spec.axes)]
            grid = grid_of(spec.shape, shared, itemsize)
        targets[path] = Target(dtype, grid)
    return targets


def _piece(
    path: str, lead: Index, infos: list[TensorInfo], table: Mapping[str, Placement], target: Target
) -> Piece:
    """All chunks of the array along its last axis: a row of a tensor that is cut there goes to each."""
    grid = target.grid
    indices = tuple((*lead, last) for last in range(grid.counts[-1]))
    parts = [Part(n, grid.start(index), grid.chunk) for n, index in enumerate(indices)]
    jobs = [cut_up(info, table[info.name], parts) for info in infos]
    nbytes = DTYPES[target.dtype].itemsize * math.prod(grid.chunk) * len(indices)
    return Piece(path, indices, tuple(job for job in jobs if job is not None), nbytes)
