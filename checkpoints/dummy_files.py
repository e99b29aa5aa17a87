"""A random checkpoint of any config on disk, for what reads and converts checkpoints.

Knows shapes and dtypes as published; the same seed gives the same bytes. Memory holds one file's
tensors at a time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.dummy import FP8_EXPONENT, FP8_RANDOM, distribution
from checkpoints.durable import check_space, make_directory
from checkpoints.names import Placement, mtp_kinds, placements
from checkpoints.reader import DTYPES
from checkpoints.writer import GIB, write_checkpoint
from glm_jax.config import ModelConfig
from glm_jax.mtp import weight_specs
from glm_jax.sharding import WeightSpec

_SLAB = 1 << 22  # elements made at once
_UNIFORM = 12**0.5  # makes the standard deviation of numbers between -1/2 and 1/2 into 1


def write_dummy(directory: str | Path, raw_config: Mapping[str, Any], seed: int = 0) -> None:
    """Writes config.json and random weights of its shapes, the MTP layer and its copies included.

    Args:
      raw_config: the content of config.json.

    Raises:
      ConfigError: the config is not supported.
      CheckpointError: the disk has no room for it.
    """
    config = ModelConfig.from_dict(dict(raw_config))
    make_directory(Path(directory))
    check_space(Path(directory), _nbytes(config))
    write_checkpoint(directory, raw_config, _tensors(config, seed), max_shard_bytes=GIB)


def _table(config: ModelConfig) -> dict[str, Placement]:
    return placements(config, with_mtp=True) | _copies(config)


def _nbytes(config: ModelConfig) -> int:
    """Of all tensors together."""
    return sum(
        math.prod(place.shape) * _dtype(config, name, place).itemsize
        for name, place in _table(config).items()
    )


def _tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    specs = weight_specs(config, DTYPES["BF16"], with_mtp=bool(config.num_nextn_predict_layers))
    table = _table(config)
    if config.is_fp8 and config.num_nextn_predict_layers:
        # The published draft head is FP8, of which the model's own is none.
        size = (config.vocab_size, config.hidden_size)
        specs["copy.values"] = WeightSpec(size, DTYPES["F8_E4M3"], (None, None))
        specs["copy.scale"] = WeightSpec(size[:1], DTYPES["F32"], (None,))
    for name, place in table.items():
        rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
        dtype = _dtype(config, name, place)
        yield name, _random(rng, place, dtype, *distribution(place.path, specs))


def _copies(config: ModelConfig) -> dict[str, Placement]:
    """The MTP layer's own embedding and head, which the model has no place for."""
    shapes = {}
    for name, kind in mtp_kinds(config).items():
        size = (config.vocab_size, config.hidden_size)
        if name.endswith(".embed_tokens.weight"):
            shapes[name] = Placement("embed_tokens.values", (0, 0), size, size, kind)
        elif name.endswith(".shared_head.head.weight"):
            path = "copy.values" if config.is_fp8 else "lm_head.values"
            shapes[name] = Placement(path, (0, 0), size, size, kind)
        elif name.endswith(".shared_head.head.weight_scale"):
            shapes[name] = Placement("copy.scale", (0,), size[:1], (size[0], 1), kind)
    return shapes


def _dtype(config: ModelConfig, name: str, place: Placement) -> np.dtype:
    if place.kind == "scale" or name.endswith(".e_score_correction_bias"):
        return DTYPES["F32"]
    return DTYPES["F8_E4M3" if place.kind == "values" and config.is_fp8 else "BF16"]


def _random(
    rng: np.random.Generator, place: Placement, dtype: np.dtype, center: float, deviation: float
) -> np.ndarray:
    array = np.empty(math.prod(place.shape), dtype)
    for first in range(0, array.size, _SLAB):
        slab = array[first : first + _SLAB]
        if dtype == DTYPES["F8_E4M3"]:
            bits = np.frombuffer(rng.bytes(slab.size), np.uint8)
            np.add(bits & FP8_RANDOM, FP8_EXPONENT, out=slab.view(np.uint8), dtype=np.uint8)
        else:
            uniform = (rng.random(slab.size, np.float32) - np.float32(0.5)) * np.float32(_UNIFORM)
            slab[:] = (np.float32(center) + np.float32(deviation) * uniform).astype(dtype)
    return array.reshape(place.shape)
