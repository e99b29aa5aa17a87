"""What a checkpoint holds: bytes, parameters in all and active, and what is missing or unknown.

Knows headers and shapes only; reads no weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from checkpoints.converted import Converted
from checkpoints.names import MTP_PREFIX, compare, placements
from checkpoints.reader import Checkpoint
from glm_jax.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters; scales of FP8 weights are none.

    Attributes:
      total: of the decoder, embedding and head included.
      active: that one token is multiplied with: of the experts those it goes to, and of the
        embedding, which is looked up, none.
      mtp: of the MTP layer besides.
    """

    total: int
    active: int
    mtp: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What the files hold.

    Attributes:
      nbytes: by safetensors' name of the dtype.
      lines: file, dtype, shape and name of each tensor, or of each array of a conversion.
      missing, unexpected: names, against the config.
    """

    nbytes: Counter[str]
    lines: list[str]
    missing: list[str]
    unexpected: list[str]


def contents_of(config: ModelConfig, source: Checkpoint | Converted) -> Contents:
    """What a checkpoint of either form holds."""
    nbytes: Counter[str] = Counter()
    for info in source:
        nbytes[info.dtype] += info.nbytes
    if isinstance(source, Checkpoint):
        lines = [
            f"{info.file.name}  {info.dtype:7}  {list(info.shape)!s:18}  {info.name}"
            for info in source
        ]
        return Contents(nbytes, lines, *compare(config, source.tensors))
    lines = [
        f"{array.dtype:7}  {list(array.grid.shape)!s:28}  in chunks {list(array.grid.chunk)!s:26}  {path}"
        for path, array in source.arrays.items()
    ]
    paths = {place.path for place in placements(config).values()}
    known = paths | {place.path for place in placements(config, with_mtp=True).values()}
    unexpected = [
        path for path in source.arrays if path not in known and not _is_copy(config, path)
    ]
    return Contents(nbytes, lines, sorted(paths - source.arrays.keys()), unexpected)


def parameters_of(config: ModelConfig) -> Parameters:
    """How many parameters a model of this config has."""
    total, active, mtp = 0, Fraction(0), 0
    share = Fraction(config.num_experts_per_tok, config.n_routed_experts)
    for place in placements(config, with_mtp=True).values():
        size = 0 if place.kind == "scale" else math.prod(place.block)
        if place.path.startswith(MTP_PREFIX):
            mtp += size
            continue
        total += size
        if place.path != "embed_tokens.values":
            active += size * (share if ".experts." in place.path else 1)
    return Parameters(total, round(active), mtp)


def device_bytes(config: ModelConfig, num_devices: int) -> tuple[int, int]:
    """Bytes of the decoder's weights on each device, and of the MTP layer's, without the KV cache.

    Raises:
      ValueError: so many devices cannot share the weights.
    """
    # JAX takes seconds to import, which the rest need not wait.
    from checkpoints.convert import sharded_specs
    from glm_jax.sharding import partition_spec

    sizes: Mapping[bool, list[int]] = {False: [0], True: [0]}
    has_mtp = bool(config.num_nextn_predict_layers)
    for path, spec in sharded_specs(config, num_devices, with_mtp=has_mtp).items():
        is_whole = all(place is None for place in partition_spec(spec.axes))
        size = math.prod(spec.shape) // (1 if is_whole else num_devices)
        sizes[path.startswith(MTP_PREFIX)].append(size * spec.dtype.itemsize)
    return sum(sizes[False]), sum(sizes[True])


def _is_copy(config: ModelConfig, path: str) -> bool:
    """Whether it is a tensor of the MTP layer that the model has no use for."""
    return path.startswith(f"model.layers.{config.num_hidden_layers}.")
