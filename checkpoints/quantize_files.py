"""Quantize a checkpoint on disk: bf16 in, the published FP8 format out, tokenizer and all.

Knows no arithmetic. Memory holds one file's tensors at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checkpoints.checks import check_tensors
from checkpoints.quantize import ignore_list, quantization_config, quantize
from checkpoints.reader import INDEX_NAME, Checkpoint, CheckpointError
from checkpoints.writer import write_checkpoint
from glm_jax.config import ModelConfig

_CONFIG_NAME = "config.json"


def quantize_files(source: str | Path, destination: str | Path) -> None:
    """Writes the FP8 form of a checkpoint that is not quantized.

    Args:
      destination: a directory other than the source.

    Raises:
      CheckpointError: the source is broken, or FP8 already.
      ConfigError: its config.json is not supported.
      ValueError: a weight holds an infinity or a NaN.
    """
    source, destination = Path(source), Path(destination)
    config = ModelConfig.from_directory(source)
    if config.is_fp8:
        raise CheckpointError(f"{source} is FP8 already")
    if destination.exists() and destination.samefile(source):
        raise CheckpointError(f"cannot quantize {source} onto itself: name another directory")
    raw = json.loads((source / _CONFIG_NAME).read_text(encoding="utf-8"))
    raw["quantization_config"] = quantization_config(ignore_list(config))
    with Checkpoint(source) as checkpoint:
        check_tensors(checkpoint, config, with_mtp=False)
        write_checkpoint(destination, raw, quantize(config, _tensors(checkpoint)))
    for file in sorted(source.iterdir()):
        is_text = file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".md")
        if is_text and file.name not in (_CONFIG_NAME, INDEX_NAME):
            shutil.copyfile(file, destination / file.name)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    for info in checkpoint:
        yield info.name, checkpoint.read(info.name)
