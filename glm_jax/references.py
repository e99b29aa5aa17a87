"""What a step runs where neither a GPU nor a C compiler is: the references, as host_kernels has them.

Knows no layer.
"""

from jaxtyping import Array, Float, Float32, Int32

from glm_jax import cache as kv_cache
from glm_jax import ops
from glm_jax.cache import KVCache
from glm_jax.operands import Weight
from glm_jax.ops import (
    HeadNorms,
    Layer,
    Rows,
    paged_attention,
    partial_products,
    product,
    route,
    vocab_logits,
)

__all__ = [
    "experts", "paged_attention", "partial_products", "product", "rotary_table", "route",
    "vocab_logits", "write",
]  # fmt: skip


def experts(
    rows: Rows,
    chosen: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
    first: Layer,
    experts: tuple[Weight, Weight],
    layer: Layer,
    group_size: int,
) -> Float32[Array, "R T D"]:
    """The chosen experts among this device's.

    Args:
      first: the first expert of this device.
      experts: gate_up and down projections.
      group_size: experts for each of R partial sums.
    """
    gate_up, down = experts
    routing = ops.local_routing(chosen, weights, first, down[0].shape[1])
    return ops.experts(rows, routing, *gate_up, *down, layer, group_size)


def rotary_table(positions: Int32[Array, "B T"], rotary_dim: int, theta: float) -> None:
    """Nothing: each layer computes it anew, within its rotation."""
    del positions, rotary_dim, theta


def write(
    qkv: Float[Array, "B T K G2 H"],
    norms: HeadNorms,
    positions: Int32[Array, "B T"],
    page_table: Int32[Array, "B P"],
    layer: Layer,
    cache: KVCache,
    rotary: Float[Array, "B T 2 half"] | None,
) -> tuple[Float[Array, "B T K G H"], KVCache]:
    """The queries, and keys and values in their pages."""
    del rotary
    q, k, v = ops.split_heads(qkv, norms, positions, layer)
    return q, kv_cache.write(cache, layer, page_table, positions, k, v)
