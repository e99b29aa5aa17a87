"""Fills checkpoints/nano with seeded random weights, so that it loads before it is trained.

Knows no data: the model it makes speaks noise.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from checkpoints.nano_training.draft import Draft
from checkpoints.nano_training.export import export, weights_of
from checkpoints.nano_training.rendering import NANO_DIRECTORY
from glm_jax.config import ModelConfig
from glm_jax.model import Glm4Moe


def main() -> None:
    """Reads the command line and writes the weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", type=Path, default=NANO_DIRECTORY, help="has a config.json")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = replace(ModelConfig.from_directory(options.directory), is_fp8=False)
    rngs, dtype = nnx.Rngs(options.seed), jnp.dtype(jnp.float32)
    decoder, draft = Glm4Moe(config, dtype, rngs=rngs), Draft(config, dtype, rngs=rngs)
    export(options.directory, weights_of(decoder), weights_of(draft))


if __name__ == "__main__":
    main()
