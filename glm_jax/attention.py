"""Grouped-query attention: projections, head norms, rotary, and a way to attend handed in.

Knows neither pages nor devices: what the queries see is the caller's `attend`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from glm_jax import cache as kv_cache
from glm_jax import ops
from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.layers import Layer, Linear, RMSNorm, rotate

# (layer, q [B, T, K, G, H], k [B, T, K, H], v, cache) -> (attended [B, T, K, G, H], cache)
Attend = Callable[[Layer, Array, Array, Array, KVCache | None], tuple[Array, KVCache | None]]


def attend_paged(page_table: Int32[Array, "B P"], positions: Int32[Array, "B T"]) -> Attend:
    """Writes this step's keys and values into the pages, then attends over all of them."""

    def attend(
        layer: Layer, q: Array, k: Array, v: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        assert cache is not None, "attend_paged needs a cache"
        cache = kv_cache.write(cache, layer, page_table, positions, k, v)
        return ops.paged_attention(q, *cache, layer, page_table, positions), cache

    return attend


def attend_causal(visible: Bool[Array, "B T T"]) -> Attend:
    """Attends within the tokens given, with no cache; visible[b, t, s]: t may see s."""

    def attend(
        layer: Layer, q: Array, k: Array, v: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        del layer
        return ops.causal_attention(q, k, v, visible), cache

    return attend


class Attention(nnx.Module):
    """Self-attention of every layer, its weights stacked."""

    def __init__(
        self, config: ModelConfig, num_layers: int, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        width, kv_heads, head_dim = config.hidden_size, config.num_key_value_heads, config.head_dim
        groups = config.num_query_groups
        self.qkv_proj = Linear(
            (num_layers, kv_heads, (groups + 2) * head_dim, width),
            ("layers", "kv_heads", None, "embed"),
            dtype,
            is_fp8=config.is_fp8,
            use_bias=config.attention_bias,
            rngs=rngs,
        )
        self.o_proj = Linear(
            (num_layers, width, kv_heads * groups * head_dim),
            ("layers", "embed", "heads"),
            dtype,
            is_fp8=config.is_fp8,
            rngs=rngs,
        )
        norm = ((num_layers, head_dim), ("layers", "head_dim"), config.rms_norm_eps, dtype)
        self.q_norm = nnx.data(RMSNorm(*norm, rngs=rngs) if config.use_qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(*norm, rngs=rngs) if config.use_qk_norm else None)
        self.head_dim = head_dim
        self.query_groups = groups
        self.rotary = (config.rotary_dim, config.rope_theta)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        layer: Layer,
        cache: KVCache | None,
        attend: Attend,
    ) -> tuple[Float32[Array, "R rows D"], KVCache | None]:
        """Partial sums of the sub-layer's output, one per kv head of this device."""
        num_rows, num_tokens, width = x.shape
        with jax.named_scope("qkv_proj"):
            qkv = self.qkv_proj(x.reshape(-1, width), layer)
        qkv = qkv.reshape(num_rows, num_tokens, -1, self.query_groups + 2, self.head_dim)
        q, k, v = qkv[..., : self.query_groups, :], qkv[..., -2, :], qkv[..., -1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, layer), self.k_norm(k, layer)
        q_heads = q.reshape(num_rows, num_tokens, -1, self.head_dim)
        q = rotate(q_heads, positions, *self.rotary).reshape(q.shape)
        k = rotate(k, positions, *self.rotary)
        with jax.named_scope("attend"):
            attended, cache = attend(layer, q, k, v, cache)
        with jax.named_scope("o_proj"):
            flat = attended.reshape(num_rows * num_tokens, -1)
            return self.o_proj.partials(flat, layer, self.query_groups * self.head_dim), cache
