"""Read all of a checkpoint and say what is wrong with it.

Knows no remedy beyond the messages. A conversion has checksums; a published checkpoint has none, so
there its numbers are looked at: a scale that is not positive, or a weight that is no number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from checkpoints.checks import check_tensors
from checkpoints.checksums import combine, crc_of
from checkpoints.converted import SOURCE_NAME, TENSORS_NAME, WEIGHTS_NAME, Converted, is_converted
from checkpoints.export import original_file
from checkpoints.names import Kind, mtp_kinds, placements
from checkpoints.orbax import ARRAY_NAME, TREE_NAME, array_json, tree_json
from checkpoints.progress import Progress
from checkpoints.reader import Checkpoint, CheckpointError, TensorInfo
from glm_jax.config import ModelConfig

_NUM_READERS = 4
_SLAB_BYTES = 64 << 20
_FP8_NAN = 0x7F


@dataclass(slots=True)
class Verdict:
    """What reading everything found.

    Attributes:
      nbytes: that were read.
      faults: one sentence each, empty if all is well.
    """

    nbytes: int = 0
    faults: list[str] = field(default_factory=list)


def verify(
    directory: str | Path, original: str | Path | None = None, *, progress: bool = True
) -> Verdict:
    """Reads every byte of a checkpoint of either form.

    Args:
      original: for a conversion, the published checkpoint that it must be a conversion of.

    Raises:
      CheckpointError: it is broken in a way that leaves nothing to read.
      ConfigError: config.json is not supported.
      ValueError: an original is given for a checkpoint that is no conversion.
    """
    directory = Path(directory)
    if is_converted(directory):
        verdict = _verify_converted(directory, progress)
        if original is not None:
            _compare(directory, Path(original), verdict, progress)
        return verdict
    if original is not None:
        raise ValueError(f"{directory} is no conversion, so it has no checksums to compare")
    return _verify_published(directory, progress)


def _verify_converted(directory: Path, progress: bool) -> Verdict:
    verdict = Verdict()
    with Converted(directory) as converted:
        chunks = list(converted)
        _check_all(
            "verifying", chunks, lambda info: _chunk_fault(converted, info), verdict, progress
        )
        metadata = {f"{WEIGHTS_NAME}/{TREE_NAME}": tree_json(_grids(converted))}
        for path, array in converted.arrays.items():
            name = f"{WEIGHTS_NAME}/{path}/{ARRAY_NAME}"
            metadata[name] = array_json(array.dtype, array.grid)
        for name, content in metadata.items():
            file = directory / name
            if not file.exists() or file.read_bytes() != content:
                verdict.faults.append(f"{file} is missing or damaged: convert again")
        for name in converted.source_files:
            try:
                original_file(converted, name)
            except CheckpointError as error:
                verdict.faults.append(str(error))
    return verdict


def _grids(converted: Converted):
    return {path: array.grid for path, array in converted.arrays.items()}


def _chunk_fault(converted: Converted, info: TensorInfo) -> str | None:
    try:
        converted.read(info.name)
    except CheckpointError as error:
        return str(error)
    return None


def _compare(directory: Path, original: Path, verdict: Verdict, progress: bool) -> None:
    """Whether the conversion's checksums are those of this checkpoint's tensors."""
    with Converted(directory) as converted, Checkpoint(original) as checkpoint:
        name = f"{SOURCE_NAME}/{TENSORS_NAME}"
        expected = json.loads(original_file(converted, name))["tensors"]
        for other in sorted(expected.keys() ^ checkpoint.tensors.keys()):
            verdict.faults.append(f"{other} is in only one of {directory} and {original}")

        def fault(info: TensorInfo) -> str | None:
            slabs = ((crc_of(slab), slab.nbytes) for slab in _slabs(checkpoint, info))
            if combine(slabs) != expected[info.name][-1]:
                return f"{info.file}: {info.name} is not what {directory} was converted from"
            return None

        common = [info for info in checkpoint if info.name in expected]
        _check_all("comparing", common, fault, verdict, progress)


def _verify_published(directory: Path, progress: bool) -> Verdict:
    config, verdict = ModelConfig.from_directory(directory), Verdict()
    with Checkpoint(directory) as checkpoint:
        check_tensors(checkpoint, config, with_mtp=False)
        kinds: dict[str, Kind] = {
            name: placement.kind for name, placement in placements(config).items()
        }
        kinds |= mtp_kinds(config)

        def fault(info: TensorInfo) -> str | None:
            is_scale = kinds[info.name] == "scale"
            if all(_is_sound(slab, is_scale) for slab in _slabs(checkpoint, info)):
                return None
            what = "a scale that is not a positive number" if is_scale else "a value that is none"
            return f"{info.file}: {info.name} holds {what}; download the file again"

        _check_all("verifying", list(checkpoint), fault, verdict, progress)
    return verdict


def _is_sound(array: np.ndarray, is_scale: bool) -> bool:
    if array.itemsize == 1:
        return not ((array.view(np.uint8) & _FP8_NAN) == _FP8_NAN).any()
    values = array.astype(np.float32, copy=False)
    return bool(np.isfinite(values).all() and (not is_scale or (values > 0).all()))


def _slabs(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[np.ndarray]:
    """The tensor's rows, a bounded number of bytes at a time."""
    num_rows = max(1, _SLAB_BYTES * info.shape[0] // max(1, info.nbytes))
    for first in range(0, info.shape[0], num_rows):
        yield checkpoint.read(info.name, slice(first, min(first + num_rows, info.shape[0])))


def _check_all(
    what: str,
    infos: Iterable[TensorInfo],
    fault_of: Callable[[TensorInfo], str | None],
    verdict: Verdict,
    progress: bool,
) -> None:
    infos = list(infos)
    total = sum(info.nbytes for info in infos)
    with (
        Progress(what, total, shown=progress) as bar,
        ThreadPoolExecutor(_NUM_READERS, "verify") as pool,
    ):
        for info, fault in zip(infos, pool.map(fault_of, infos), strict=True):
            bar.advance(info.nbytes)
            verdict.nbytes += info.nbytes
            if fault is not None:
                verdict.faults.append(fault)
