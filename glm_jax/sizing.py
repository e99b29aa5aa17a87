"""How large the buckets and the page pool should be, for a model on a mesh.

Knows no requests and makes no arrays: sizes in, a StepShapes out.
"""

import math
from dataclasses import dataclass

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from glm_jax.cache import page_bytes
from glm_jax.config import ModelConfig
from glm_jax.mtp import weight_specs
from glm_jax.shapes import StepShapes
from glm_jax.sharding import check_divisible, partition_spec

_MIB = 1 << 20
_GIB = 1 << 30

# Temporaries of the largest step, per device: a prefill of 8192 tokens of GLM-4.7 compiles to 3.95 GB.
_TEMPORARIES = 5 * _GIB
# Bytes that sampling holds for each logit: seven float32 arrays, of all tokens that a step verifies.
_SAMPLING_BYTES = 7 * 4
# A developer's machine has no memory set aside: enough for 64 conversations with a small model.
_HOST_KV_BYTES = 512 * _MIB


NO_MTP_LAYER = (
    "the model has no MTP layer to guess tokens with (num_nextn_predict_layers is 0); leave out "
    "--speculative-tokens"
)


class SizingError(ValueError):
    """The model, the mesh and the limits asked for do not fit together."""


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What suits a kind of device: tile sizes, and which buckets are worth a compilation."""

    page_size: int
    prefill_tile: int
    prefill_tokens: tuple[int, ...]
    decode_rows: tuple[int, ...]


# On a CPU a step's time grows with its rows, padding included, and a bucket costs 4 to 5 s of one core
# to compile (nano: a decode step of 1, 4, 16 and 32 rows takes 0.7, 1, 6 and 10 ms of CPU time, a
# prefill of 64 tokens 12; 2026-11-29). At the roofline of eight B200 a
# prefill step of GLM-4.7 takes 7 ms and 8.4 us a token: these buckets waste 9 ms of it at most up to
# 4096 tokens, and about a third of the step at worst.
_GEOMETRY = {
    "cpu": _Geometry(64, 16, (64, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    "gpu": _Geometry(
        64,
        128,
        (128, 512, 1024, 2048, 3072, 4096, 6144, 8192),
        (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    ),
}


def choose_shapes(
    config: ModelConfig,
    mesh: Mesh,
    dtype: np.dtype,
    *,
    max_concurrency: int,
    max_seq_len: int,
    max_batch_tokens: int,
    num_drafts: int = 0,
    kv_dtype: np.dtype | None = None,
) -> StepShapes:
    """The shapes to compile: every bucket up to the limits, and all the pages that fit.

    Args:
      dtype: of activations.
      kv_dtype: of the KV cache; None for that of the activations.
      max_concurrency: sequences that decode at once.
      max_seq_len: positions of one sequence.
      max_batch_tokens: tokens of one prefill step, at most; the device's own bound may be lower.
      num_drafts: tokens that a decode step guesses; 0: no speculation.

    Raises:
      SizingError: the mesh cannot share the model, the sequences are longer than the model's, it has
        no MTP layer to guess with, or not even one sequence fits beside the weights; says by how much.
    """
    return shapes_within(
        config,
        mesh,
        dtype,
        platform=_platform(mesh),
        kv_bytes=_kv_bytes(config, mesh, dtype, max_concurrency, num_drafts),
        kv_dtype=dtype if kv_dtype is None else kv_dtype,
        max_concurrency=max_concurrency,
        max_seq_len=max_seq_len,
        max_batch_tokens=max_batch_tokens,
        num_drafts=num_drafts,
    )


def shapes_within(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    dtype: np.dtype,
    *,
    platform: str,
    kv_bytes: int,
    kv_dtype: np.dtype,
    max_concurrency: int,
    max_seq_len: int,
    max_batch_tokens: int,
    num_drafts: int = 0,
) -> StepShapes:
    """choose_shapes for a mesh whose memory is known from elsewhere, as a plan's is.

    Args:
      platform: "cpu" or "gpu".
      kv_bytes: what can hold keys and values, over all devices together.
      kv_dtype: of the KV cache.

    Raises:
      SizingError: as choose_shapes.
    """
    if max_seq_len > config.max_position_embeddings:
        raise SizingError(
            f"max_seq_len = {max_seq_len} is more than the model's max_position_embeddings = "
            f"{config.max_position_embeddings}; lower --max-seq-len"
        )
    with_mtp = num_drafts > 0
    if with_mtp and not config.num_nextn_predict_layers:
        raise SizingError(NO_MTP_LAYER)
    try:
        check_divisible(weight_specs(config, dtype, with_mtp=with_mtp), mesh)
    except ValueError as error:
        raise SizingError(f"{error} (--num-gpus)") from error
    geometry = _GEOMETRY[platform]
    # A GPU's kernels read whole pages of one size, and rows and tokens by eights: other rows XLA would
    # pad in every layer, and no launch would overlap the one before.
    is_gpu = platform == "gpu"
    page_size = geometry.page_size if is_gpu else min(geometry.page_size, max_seq_len)
    most_decoded = max_concurrency
    if is_gpu and max_concurrency > 8:
        most_decoded += -max_concurrency % 8
    per_sequence = math.ceil(max_seq_len / page_size)
    fitting = kv_bytes // page_bytes(config, page_size, kv_dtype, with_mtp=with_mtp)
    if fitting < per_sequence:
        raise SizingError(
            f"one sequence of {max_seq_len} positions needs {per_sequence} KV pages and "
            f"{max(fitting, 0)} fit beside the weights; lower --max-seq-len or use more devices"
        )
    tile = min(geometry.prefill_tile, max_batch_tokens)
    if is_gpu:
        tile = max(tile - tile % 8, 8)
    most_rows = max(min(max_batch_tokens, geometry.prefill_tokens[-1]) // tile, 1)
    return StepShapes(
        num_slots=max_concurrency,
        num_pages=min(fitting, max_concurrency * per_sequence),
        page_size=page_size,
        max_seq_len=max_seq_len,
        prefill_tile=tile,
        prefill_buckets=_up_to(tuple(n // tile for n in geometry.prefill_tokens), most_rows),
        decode_buckets=_up_to(geometry.decode_rows, most_decoded),
        vocab_size=config.vocab_size,
        num_drafts=num_drafts,
    )


def _up_to(buckets: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """The buckets below `largest`, and `largest` itself: In (1, 4, 16), 6. Out (1, 4, 6)."""
    return tuple(bucket for bucket in buckets if 0 < bucket < largest) + (largest,)


def _platform(mesh: Mesh) -> str:
    return "cpu" if mesh.devices.flat[0].platform == "cpu" else "gpu"


def weight_bytes(
    config: ModelConfig, dtype: np.dtype, num_devices: int, *, with_mtp: bool = False
) -> int:
    """Bytes of weights on each device; replicated arrays count on every one."""
    total = 0
    for spec in weight_specs(config, dtype, with_mtp=with_mtp).values():
        sharded = any(place is not None for place in partition_spec(spec.axes))
        total += math.prod(spec.shape) * spec.dtype.itemsize // (num_devices if sharded else 1)
    return total


def _kv_bytes(
    config: ModelConfig, mesh: Mesh, dtype: np.dtype, max_concurrency: int, num_drafts: int
) -> int:
    """Bytes that can hold keys and values, over all devices together."""
    if _platform(mesh) == "cpu":
        return _HOST_KV_BYTES
    stats = mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise SizingError("the device does not say how much memory it has")
    # The limit is JAX's own share of the device already (environment.py).
    sampling = max_concurrency * (1 + num_drafts) * config.vocab_size * _SAMPLING_BYTES
    free = stats["bytes_limit"] - max(_TEMPORARIES, sampling)
    weights = weight_bytes(config, dtype, mesh.size, with_mtp=num_drafts > 0)
    return mesh.size * (free - weights)
