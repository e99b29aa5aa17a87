"""FP8 as published: which tensors are quantized, how, and the config that says so.

Knows no files. The scheme is compressed-tensors' float-quantized: e4m3fn weights with one scale per
output channel, activations quantized per token at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.names import Kind, mtp_kinds, placements
from glm_jax.config import ModelConfig

FP8_MAX = 448.0
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes each row by its own largest magnitude.

    Args:
      weight: [out, in], any float dtype.

    Returns:
      values float8_e4m3fn [out, in] and scale float32 [out, 1]; weight is about values * scale.

    Raises:
      ValueError: the weight is not a matrix, or holds an infinity or a NaN.
    """
    if weight.ndim != 2:
        raise ValueError(f"a weight to quantize is a matrix, got shape {weight.shape}")
    weight = weight.astype(np.float32)
    largest = np.abs(weight).max(axis=1, keepdims=True, initial=0)
    if not np.isfinite(largest).all():
        raise ValueError("a weight to quantize holds an infinity or a NaN")
    # A row of zeros, or of numbers too small to divide by, would have scale 0.
    scale = np.maximum(largest / np.float32(FP8_MAX), np.finfo(np.float32).tiny)
    # A conversion past 448 gives NaN, not the largest value, so the division's rounding is clamped.
    values = np.clip(weight / scale, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return values, scale


def quantize(
    config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Turns a plain checkpoint's tensors into a published FP8 checkpoint's.

    Linear weights become FP8, each followed by its weight_scale; the router's correction bias is
    float32; everything else is bfloat16.

    Args:
      config: the model's; whether it is quantized makes no difference.
      tensors: names and arrays, the MTP layer's among them if there is one.

    Raises:
      ValueError: a name is not one of the model's, or its array cannot be quantized.
    """
    kinds = tensor_kinds(config)
    for name, array in tensors:
        kind = kinds.get(name)
        if kind is None or kind == "scale":
            raise ValueError(f"{name} is not a tensor of an unquantized checkpoint of this model")
        if kind == "values":
            try:
                values, scale = quantize_channels(array)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            yield name, values
            yield f"{name}_scale", scale
        elif name.endswith(".e_score_correction_bias"):
            yield name, array.astype(np.float32)
        else:
            yield name, array.astype(_BFLOAT16)


def tensor_kinds(config: ModelConfig) -> dict[str, Kind]:
    """What each tensor of the model is, the MTP layer's included, by its name in the checkpoint."""
    kinds: dict[str, Kind] = {name: place.kind for name, place in placements(config).items()}
    return kinds | mtp_kinds(config)


def ignore_list(config: ModelConfig) -> list[str]:
    """What quantization leaves alone, as the published ignore lists spell it."""
    plain = [name for name, kind in tensor_kinds(config).items() if kind == "plain"]
    return sorted(name.removesuffix(".weight") for name in plain)


def quantization_config(ignore: Sequence[str]) -> dict[str, Any]:
    """config.json's quantization_config for the published scheme, with this ignore list."""
    scheme = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "num_bits": 8,
        "observer_kwargs": {},
        "symmetric": True,
        "type": "float",
    }
    weights = {**scheme, "dynamic": False, "observer": "minmax", "strategy": "channel"}
    activations = {**scheme, "dynamic": True, "observer": None, "strategy": "token"}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }
