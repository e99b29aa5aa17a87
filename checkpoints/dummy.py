"""Random weights of a model's shapes, made on its devices.

Knows no checkpoint: specs say what the weights are. The same seed gives the same weights on any mesh.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_jax.sharding import WeightSpec, sharding_for

_GAIN = 0.7  # standard deviation of an output when its inputs have 1
_FP8 = np.dtype(jnp.float8_e4m3fn)
# An FP8 value here is a random sign, mantissa and two low bits of the exponent, under this one:
# from 2^1 to 2^4 times 1 to 1.875.
FP8_EXPONENT = 0b0_1000_000
FP8_RANDOM = 0b1_0011_111


def dummy_weights(specs: Mapping[str, WeightSpec], mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Random weights on the devices; the host holds none of them, and no device a temporary.

    Linear weights have a standard deviation of about 0.7 / sqrt(inputs), norm weights are near 1.

    Args:
      specs: every weight's shape, dtype and axes by dotted path.
      mesh: the devices.
      seed: decides every value, whatever the mesh.
    """
    return {path: _make(path, specs, mesh, seed) for path in specs}


def _make(path: str, specs: Mapping[str, WeightSpec], mesh: Mesh, seed: int) -> jax.Array:
    spec = specs[path]
    start = np.uint32(zlib.crc32(f"{seed} {path}".encode()))
    center, deviation = distribution(path, specs)

    def make(start: jax.Array) -> jax.Array:
        bits = _hash_indices(start, spec.shape)
        if spec.dtype == _FP8:
            return _fp8(bits)
        return (center + deviation * _uniform(bits)).astype(spec.dtype)

    return jax.jit(make, out_shardings=sharding_for(spec.axes, mesh))(start)


def distribution(path: str, specs: Mapping[str, WeightSpec]) -> tuple[float, float]:
    """Mean and standard deviation of a weight that is not FP8."""
    kind = path.rsplit(".", 1)[-1]
    if kind == "scale":
        inputs = specs[path.removesuffix("scale") + "values"].shape[-1]
        center = _GAIN / inputs**0.5 / _FP8_DEVIATION
        return center, center / 8
    if path.endswith("norm.weight"):
        return 1.0, 0.1
    if kind in ("bias", "e_score_correction_bias"):
        return 0.0, 0.1
    if path == "embed_tokens.values":
        return 0.0, 1.0
    return 0.0, _GAIN / specs[path].shape[-1] ** 0.5


def _hash_indices(start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 random bits for each element, from its index alone.

    Elementwise, so that XLA fuses it into the one kernel that writes the weight, splits it over any
    mesh without changing a value, and needs no room for random keys or float32 draws.
    """
    bits = jnp.broadcast_to(start, shape)
    for axis in range(len(shape)):
        odd = np.uint32(pow(0x9E3779B1, axis + 1, 1 << 32))
        bits = bits + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * odd
    bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def _uniform(bits: jax.Array) -> jax.Array:
    """float32 of mean 0 and standard deviation 1, evenly spread."""
    unit = (bits >> 8).astype(jnp.float32) / (1 << 24)
    return (unit - 0.5) * 12**0.5


def _fp8(bits: jax.Array) -> jax.Array:
    patterns = (bits & FP8_RANDOM).astype(jnp.uint8) + np.uint8(FP8_EXPONENT)
    return jax.lax.bitcast_convert_type(patterns, _FP8)


def _fp8_deviation() -> float:
    patterns = np.arange(256, dtype=np.uint8) & FP8_RANDOM
    return float((patterns + np.uint8(FP8_EXPONENT)).view(_FP8).astype(np.float64).std())


_FP8_DEVIATION = _fp8_deviation()
