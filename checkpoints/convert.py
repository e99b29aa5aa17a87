"""Turn a published checkpoint into the converted form, a piece at a time, in bounded memory.

Knows no arithmetic: every byte of every tensor is kept. A conversion that is cut short goes on where
its journal stops, and is not taken for a checkpoint before its manifest, written last, is there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from checkpoints.checks import check_tensors
from checkpoints.checksums import combine, crc_of
from checkpoints.converted import (
    FORMAT,
    JOURNAL_NAME,
    MANIFEST_NAME,
    SOURCE_NAME,
    TENSORS_NAME,
    WEIGHTS_NAME,
    canonical,
    read_manifest,
)
from checkpoints.cuts import Job
from checkpoints.durable import check_space, make_directory, partial_path, write_whole
from checkpoints.journal import Journal, Record
from checkpoints.layout import MAX_CHUNK_BYTES, chunk_key
from checkpoints.names import compare
from checkpoints.orbax import ARRAY_NAME, STEP_NAME, TREE_NAME, array_json, step_json, tree_json
from checkpoints.pieces import Piece, Plan, plan_conversion
from checkpoints.progress import Progress
from checkpoints.reader import (
    DTYPES,
    INDEX_NAME,
    Checkpoint,
    CheckpointError,
    aligned_empty,
    raw_header,
    rows_shape,
)
from checkpoints.shards import copy
from glm_jax.config import ModelConfig
from glm_jax.mtp import weight_specs
from glm_jax.sharding import MESH_AXIS, WeightSpec, check_divisible

# Chunks and tensors in memory at a time; one larger piece goes alone.
_BUDGET = 1 << 30
_NUM_WORKERS = 4


def convert(
    source: str | Path,
    destination: str | Path,
    num_devices: int,
    *,
    progress: bool = True,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> bool:
    """Converts a checkpoint of the published layout for so many devices.

    Args:
      source: the checkpoint; it is only read.
      destination: made if it is not there; an unfinished conversion of the same checkpoint in it
        is finished.

    Returns:
      Whether there was anything to do: False if the destination is this very conversion already.

    Raises:
      CheckpointError: the checkpoint is not whole or not its config's, the destination is something
        else or cannot be written, or the disk is full.
      ConfigError: config.json is not supported.
      ValueError: the devices cannot share the weights.
    """
    source, destination = Path(source), Path(destination)
    config = ModelConfig.from_directory(source)
    for name in (MANIFEST_NAME, JOURNAL_NAME):
        if (source / name).exists():
            raise CheckpointError(f"{source / name} is a conversion's: {source} is none to convert")
    with Checkpoint(source) as checkpoint:
        lacking, _ = compare(config, checkpoint.tensors, with_mtp=True)
        with_mtp = bool(config.num_nextn_predict_layers) and not lacking
        check_tensors(checkpoint, config, with_mtp=with_mtp)
        specs = sharded_specs(config, num_devices, with_mtp=with_mtp)
        plan = plan_conversion(checkpoint, config, specs, num_devices, max_chunk_bytes)
        header = {
            "format": FORMAT,
            "num_devices": num_devices,
            "source": _fingerprint(checkpoint),
        }
        if _is_done(destination, header):
            return False
        first = header | {"layout": zlib.crc32(canonical(_arrays(plan)))}
        with Journal(destination / JOURNAL_NAME, first) as journal:
            _make_pieces(checkpoint, plan, destination, journal, progress)
            if _fingerprint(checkpoint) != header["source"]:
                raise CheckpointError(
                    f"{source} has changed while it was being converted: remove {destination} and "
                    "convert again"
                )
            _finish(checkpoint, plan, destination, journal, header)
    (destination / JOURNAL_NAME).unlink()
    return True


def sharded_specs(
    config: ModelConfig, num_devices: int, *, with_mtp: bool
) -> dict[str, WeightSpec]:
    """Every weight of the model as published, for so many devices.

    Raises:
      ValueError: they cannot share the weights.
    """
    specs = weight_specs(config, DTYPES["BF16"], with_mtp=with_mtp)
    check_divisible(specs, AbstractMesh((num_devices,), (MESH_AXIS,)))
    return specs


def _fingerprint(checkpoint: Checkpoint) -> Record:
    """Sizes, times and headers of the files: what differs when they do."""
    files = [*dict.fromkeys(info.file for info in checkpoint), checkpoint.directory / "config.json"]
    found: Record = {}
    for file in files:
        stat = file.stat()
        crc = zlib.crc32(file.read_bytes() if file.suffix == ".json" else raw_header(file))
        found[file.name] = [stat.st_size, stat.st_mtime_ns, crc]
    return found


def _is_done(destination: Path, header: Record) -> bool:
    """Whether the conversion is there; refuses a destination that holds anything else."""
    make_directory(destination)
    if (destination / MANIFEST_NAME).exists():
        manifest = read_manifest(destination)
        if any(manifest[key] != value for key, value in header.items()):
            raise CheckpointError(
                f"{destination} holds a conversion of other files or for another target: remove it, "
                "or convert to another directory"
            )
        (destination / JOURNAL_NAME).unlink(missing_ok=True)
        return True
    if not (destination / JOURNAL_NAME).exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} is not empty: convert to a directory of its own")
    return False


def _arrays(plan: Plan) -> dict[str, Any]:
    """The arrays as the manifest describes them, without checksums."""
    return {
        path: {"dtype": target.dtype, "shape": target.grid.shape, "chunk": target.grid.chunk}
        for path, target in plan.targets.items()
    }


def _make_pieces(
    checkpoint: Checkpoint, plan: Plan, destination: Path, journal: Journal, progress: bool
) -> None:
    done = {record["piece"] for record in journal.records}
    todo = [piece for piece in plan.pieces if piece.name not in done]
    total = sum(piece.nbytes for piece in plan.pieces)
    left = sum(piece.nbytes for piece in todo)
    check_space(destination, left)
    for path in plan.targets:
        make_directory(destination / WEIGHTS_NAME / path)
    running: dict[Future[Record], int] = {}
    with (
        Progress("converting", total, done=total - left, shown=progress) as bar,
        ThreadPoolExecutor(_NUM_WORKERS, "convert") as pool,
    ):
        try:
            for piece in todo:
                while running and sum(running.values()) + piece.nbytes > _BUDGET:
                    _collect(running, journal, bar)
                running[pool.submit(_make_piece, checkpoint, plan, piece, destination)] = (
                    piece.nbytes
                )
            while running:
                _collect(running, journal, bar)
        finally:
            pool.shutdown(cancel_futures=True)


def _collect(running: dict[Future[Record], int], journal: Journal, bar: Progress) -> None:
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        nbytes = running.pop(future)
        journal.append(future.result())
        bar.advance(nbytes)


def _make_piece(checkpoint: Checkpoint, plan: Plan, piece: Piece, destination: Path) -> Record:
    """Reads what a piece needs, writes its chunks, and says what their and the tensors' bytes are."""
    target = plan.targets[piece.path]
    chunks = [aligned_empty(target.grid.chunk, DTYPES[target.dtype]) for _ in piece.indices]
    tensors = []
    for job in piece.jobs:
        rows = job.rows or slice(0, job.info.shape[0])
        tensors.append([job.info.name, rows.start, rows.stop, _place(checkpoint, job, chunks)])
    checksums = {}
    for index, chunk in zip(piece.indices, chunks, strict=True):
        key = chunk_key(index)
        write_whole(destination / WEIGHTS_NAME / piece.path / key, [chunk])
        checksums[key] = crc_of(chunk)
    return {"piece": piece.name, "path": piece.path, "chunks": checksums, "tensors": tensors}


def _place(checkpoint: Checkpoint, job: Job[int], chunks: list[np.ndarray]) -> int:
    """Reads a tensor's rows into the chunks; returns their checksum."""
    info = job.info
    if job.is_one_piece:
        (cut,) = job.cuts
        memory = chunks[cut.target][_box(cut.start, job.block)]
        if memory.flags.c_contiguous and memory.dtype == DTYPES[info.dtype]:
            checkpoint.read_into(info.name, job.rows, memory)
            return crc_of(memory)
    tensor = aligned_empty(rows_shape(info, job.rows), DTYPES[info.dtype])
    checkpoint.read_into(info.name, job.rows, tensor)
    block = tensor.reshape(job.block)
    for cut in job.cuts:
        piece = block[cut.source]
        copy(piece, chunks[cut.target][_box(cut.start, piece.shape)])
    return crc_of(tensor)


def _box(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))


def _finish(
    checkpoint: Checkpoint, plan: Plan, destination: Path, journal: Journal, header: Record
) -> None:
    """Writes everything that is not weights, the manifest last."""
    for cut_short in destination.rglob(partial_path(Path("*")).name):
        cut_short.unlink()
    weights = destination / WEIGHTS_NAME
    for path, target in plan.targets.items():
        write_whole(weights / path / ARRAY_NAME, [array_json(target.dtype, target.grid)])
    arrays = _arrays(plan)
    for record in journal.records:
        arrays[record["path"]].setdefault("crc32", {}).update(record["chunks"])
    grids = {path: target.grid for path, target in plan.targets.items()}
    write_whole(weights / TREE_NAME, [tree_json(grids)])
    write_whole(weights / STEP_NAME, [step_json()])
    files = {}
    for name, content in _other_files(checkpoint, plan, journal):
        make_directory((destination / name).parent)
        write_whole(destination / name, [content])
        files[name] = zlib.crc32(content)
    body = header | {"arrays": arrays, "files": files}
    sealed = {"manifest": body, "crc32": zlib.crc32(canonical(body))}
    write_whole(destination / MANIFEST_NAME, [canonical(sealed)])


def _other_files(
    checkpoint: Checkpoint, plan: Plan, journal: Journal
) -> Iterator[tuple[str, bytes]]:
    """Config and tokenizer as they are, and what it takes to write the original's files again."""
    shards = list(dict.fromkeys(info.file for info in checkpoint))
    for file in shards:
        yield f"{SOURCE_NAME}/{file.name}.header", raw_header(file)
    for file in sorted(checkpoint.directory.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.suffix == ".safetensors":
            continue
        name = f"{SOURCE_NAME}/{file.name}" if file.name == INDEX_NAME else file.name
        yield name, file.read_bytes()
    yield (
        f"{SOURCE_NAME}/{TENSORS_NAME}",
        canonical(
            {
                "files": [file.name for file in shards],
                "tensors": {
                    name: [
                        plan.table[name].path,
                        plan.table[name].start,
                        plan.table[name].block,
                        crc,
                    ]
                    for name, crc in _tensor_checksums(checkpoint, journal).items()
                },
            }
        ),
    )


def _tensor_checksums(checkpoint: Checkpoint, journal: Journal) -> dict[str, int]:
    rows: dict[str, list[tuple[int, int, int]]] = {}
    for record in journal.records:
        for name, first, last, crc in record["tensors"]:
            rows.setdefault(name, []).append((first, last, crc))
    found = {}
    for info in checkpoint:
        row_bytes, pieces, end = info.nbytes // info.shape[0], [], 0
        for first, last, crc in sorted(rows[info.name]):
            assert first == end, f"{info.name}: rows {end} to {first} went nowhere"
            pieces.append((crc, (last - first) * row_bytes))
            end = last
        assert end == info.shape[0], f"{info.name}: rows from {end} on went nowhere"
        found[info.name] = combine(pieces)
    return found
