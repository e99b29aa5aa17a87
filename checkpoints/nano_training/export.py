"""Writes nano's weights as the published FP8 checkpoint, its MTP layer included.

Knows the MTP layer's tensor names; everything else is the checkpoint writer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from checkpoints.nano_training.draft import Draft, one_layer
from checkpoints.quantize import quantize
from checkpoints.writer import tensors_from_weights, write_checkpoint
from glm_jax.config import ModelConfig
from glm_jax.model import Glm4Moe

Weights = Mapping[str, jax.Array]


def weights_of(module: Glm4Moe | Draft) -> dict[str, jax.Array]:
    """The module's weights by dotted path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): param[...] for path, param in flat}


def export(directory: Path, decoder: Weights, draft: Weights) -> None:
    """Quantizes both and writes them beside, and as told by, the directory's config.json.

    Args:
      directory: holds a config.json; weights that are there are replaced.
      decoder: an unquantized Glm4Moe's weights, in any float dtype.
      draft: the Draft's.
    """
    config = ModelConfig.from_directory(directory)
    plain = replace(config, is_fp8=False)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        yield from tensors_from_weights(plain, decoder)
        yield from _draft_tensors(plain, decoder, draft)

    write_checkpoint(directory, raw, quantize(config, tensors()))


def _draft_tensors(
    config: ModelConfig, decoder: Weights, draft: Weights
) -> Iterator[tuple[str, np.ndarray]]:
    """The MTP layer under the index after the last; GLM-4.7 ships copies of embedding and head."""
    prefix = f"model.layers.{config.num_hidden_layers}"
    yield f"{prefix}.embed_tokens.weight", np.asarray(decoder["embed_tokens.values"])
    yield f"{prefix}.enorm.weight", np.asarray(draft["enorm.weight"])
    yield f"{prefix}.hnorm.weight", np.asarray(draft["hnorm.weight"])
    yield f"{prefix}.eh_proj.weight", np.asarray(draft["eh_proj.values"][0])
    # A one-layer decoder of the draft's weights has the same tensors, as layer 0.
    outside = ("embed_tokens.values", "lm_head.values", "norm.weight")
    layers = {path: array for path, array in draft.items() if path.startswith("layers.")}
    layers |= {path: decoder[path] for path in outside}
    for name, array in tensors_from_weights(one_layer(config), layers):
        if name.startswith("model.layers.0."):
            yield name.replace("model.layers.0", prefix, 1), array
    yield f"{prefix}.shared_head.norm.weight", np.asarray(draft["norm.weight"])
    yield f"{prefix}.shared_head.head.weight", np.asarray(decoder["lm_head.values"])
