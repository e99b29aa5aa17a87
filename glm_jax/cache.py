"""The KV cache on device: pages, how they are written, how large they are.

Knows neither requests nor who owns a page.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from glm_jax.config import ModelConfig
from glm_jax.fp8 import FP8, FP8_MAX
from glm_jax.shapes import StepShapes
from glm_jax.sharding import WeightSpec


class KVCache(NamedTuple):
    """Keys and values of every layer, page by page; one page of one kv head is contiguous.

    Attributes:
      k, v: [layers, pages, kv_heads, page_size, head_dim].
    """

    k: Float[Array, "L pages K page_size H"]
    v: Float[Array, "L pages K page_size H"]


# What --kv-cache-dtype says; auto is the dtype of the activations.
KV_DTYPES: dict[str, np.dtype | None] = {
    "auto": None,
    "bf16": np.dtype(jnp.bfloat16),
    "fp8_e4m3": np.dtype(FP8),
}
CACHE_AXES = ("layers", "pages", "kv_heads", None, "head_dim")


def cache_spec(config: ModelConfig, shapes: StepShapes, dtype: np.dtype) -> WeightSpec:
    """What each of k and v is, before it is."""
    shape = (
        config.num_hidden_layers,
        shapes.num_pages,
        config.num_key_value_heads,
        shapes.page_size,
        config.head_dim,
    )
    return WeightSpec(shape, np.dtype(dtype), CACHE_AXES)


def page_bytes(
    config: ModelConfig, page_size: int, dtype: np.dtype, *, with_mtp: bool = False
) -> int:
    """Bytes of one page, keys and values of all layers, over all devices together.

    Args:
      with_mtp: whether the MTP layer is among them.
    """
    num_layers = config.num_hidden_layers + with_mtp
    width = num_layers * config.num_key_value_heads * config.head_dim
    return 2 * width * page_size * np.dtype(dtype).itemsize


def write(
    cache: KVCache,
    layer: Int32[Array, ""] | int,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> KVCache:
    """Stores k and v at each row's positions; position -1 stores nothing.

    Worked example: page_size 4, page_table[b] = [7, 2], positions[b] = [3, 4]:
    k[b, 0] goes to page 7 offset 3, k[b, 1] to page 2 offset 0.
    """
    num_pages, page_size = cache.k.shape[1], cache.k.shape[3]
    index = jnp.maximum(positions, 0) // page_size
    page = jnp.take_along_axis(page_table, index, axis=1)
    # Out of range on purpose where there is nothing to store: the scatter drops it.
    page = jnp.where(positions >= 0, page, num_pages)
    offset = positions % page_size
    k, v = (_as_stored(x, cache.k.dtype) for x in (k, v))
    return KVCache(
        cache.k.at[layer, page, :, offset].set(k, mode="drop"),
        cache.v.at[layer, page, :, offset].set(v, mode="drop"),
    )


def _as_stored(x: Float[Array, "*any"], dtype: jnp.dtype) -> Float[Array, "*any"]:
    """In the cache's dtype; FP8 has no scale here, and clamps what it cannot hold."""
    if dtype == FP8:
        return jnp.clip(x.astype(jnp.float32), -FP8_MAX, FP8_MAX).astype(FP8)
    return x.astype(dtype)
