"""Whether a checkpoint's files hold exactly the tensors that its config describes.

Knows headers only, reads no weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from checkpoints.converted import Converted
from checkpoints.names import Placement, compare, placements
from checkpoints.reader import DTYPES, Checkpoint, CheckpointError
from glm_jax.config import ModelConfig
from glm_jax.sharding import WeightSpec

_NUM_SHOWN = 5  # faults spelled out in an error; the rest are counted


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, *, with_mtp: bool) -> None:
    """Refuses a checkpoint that lacks a tensor, has one too many, or one of another shape or dtype.

    Args:
      with_mtp: whether the MTP layer is to be loaded too; otherwise it need not be there.

    Raises:
      CheckpointError: names the first faults.
    """
    table = placements(config, with_mtp=with_mtp)
    _check_quantization(checkpoint, config, table)
    _check_names(checkpoint, *compare(config, checkpoint.tensors, with_mtp=with_mtp))
    _check_shapes(checkpoint, config, table)


def check_arrays(converted: Converted, specs: Mapping[str, WeightSpec]) -> None:
    """Refuses a converted checkpoint whose arrays are not what the model wants.

    Raises:
      CheckpointError: names the first faults.
    """
    faults = []
    for path, spec in specs.items():
        array = converted.arrays.get(path)
        if array is None:
            faults.append(f"{path} is missing")
            continue
        if array.grid.shape != spec.shape:
            faults.append(f"{path} has shape {list(array.grid.shape)}, expected {list(spec.shape)}")
        if (array.dtype == "F8_E4M3") != (spec.dtype == DTYPES["F8_E4M3"]):
            faults.append(f"{path} is {array.dtype}, expected {spec.dtype}")
    if faults:
        raise CheckpointError(
            f"{converted.directory} does not fit its config.json: {_first(faults, '; ')}. Use the "
            "config.json it was converted with, or convert again from the original"
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


def _check_names(checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> None:
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


def _check_shapes(
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
