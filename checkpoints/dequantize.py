"""A checkpoint's FP8 weights multiplied out again: the same model without FP8 arithmetic.

Knows names and rectangles, not what is done with the weights.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from checkpoints.names import placements
from checkpoints.reader import Checkpoint
from glm_jax.config import ModelConfig

Arrays = dict[str, np.ndarray]
_BF16 = np.dtype(ml_dtypes.bfloat16)


def dequantized(checkpoint: Checkpoint, plain: ModelConfig, prefixes: dict[str, str]) -> Arrays:
    """The weights of an unquantized config by dotted path, in bfloat16 where they are not float32.

    Args:
      checkpoint: FP8 or not.
      plain: whose tensors are wanted; its is_fp8 is False.
      prefixes: beginnings of its tensor names, and what they begin with in the checkpoint.
    """
    weights: Arrays = {}
    table = placements(plain)
    for placement in table.values():
        end = [a + b for a, b in zip(placement.start, placement.block, strict=True)]
        old = weights.get(placement.path)
        shape = end if old is None else np.maximum(end, old.shape).tolist()
        if old is None or tuple(shape) != old.shape:
            weights[placement.path] = np.empty(shape, _dtype(placement.path))
    for name, placement in table.items():
        where = tuple(
            slice(first, first + size)
            for first, size in zip(placement.start, placement.block, strict=True)
        )
        stored = _renamed(name, prefixes)
        weights[placement.path][where] = read(checkpoint, stored).reshape(placement.block)
    return weights


def read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor in float32, multiplied by its scales if it has any."""
    values = checkpoint.read(name).astype(np.float32)
    scale = f"{name}_scale"
    return (
        values * checkpoint.read(scale).astype(np.float32)
        if scale in checkpoint.tensors
        else values
    )


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _dtype(path: str) -> np.dtype:
    return np.dtype(np.float32) if path.endswith("correction_bias") else _BF16
