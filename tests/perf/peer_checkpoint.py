"""Random bf16 checkpoints that every engine can load: nano's shape, and a larger one with heads of 128.

Knows no engine. Speed does not depend on what the weights say.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints.dummy import dummy_weights
from checkpoints.writer import tensors_from_weights, write_checkpoint
from glm_jax.config import ModelConfig
from glm_jax.model import abstract_weights
from glm_jax.sharding import make_mesh

NANO = Path(__file__).parents[2] / "checkpoints" / "nano"
# What the larger model has other than nano: 233 million parameters.
LARGER = {
    "head_dim": 128,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "moe_intermediate_size": 384,
    "n_routed_experts": 16,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
}
SIZES: dict[str, dict[str, Any]] = {"nano": {}, "larger": LARGER}


def description_of(size: str) -> dict[str, Any]:
    """The config.json of a size."""
    described = json.loads((NANO / "config.json").read_text()) | SIZES[size]
    described.pop("quantization_config")
    return described | {"num_nextn_predict_layers": 0}


def config_of(size: str) -> ModelConfig:
    """The same, parsed."""
    return ModelConfig.from_dict(description_of(size))


def write(directory: Path, size: str) -> int:
    """Writes a checkpoint with nano's tokenizer; returns its number of parameters."""
    described, config = description_of(size), config_of(size)
    weights = dummy_weights(abstract_weights(config, np.dtype(jnp.bfloat16)), make_mesh(1), 0)
    write_checkpoint(directory, described, tensors_from_weights(config, weights))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(NANO / name, directory / name)
    return sum(weight.size for weight in weights.values())
