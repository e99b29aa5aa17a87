"""Grouped-query attention: projections, head norms, rotary, and what the queries may see.

Knows no devices: over pages or within the tokens at hand is the caller's choice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from glm_jax import ops
from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.kernels import AttentionPlan, Kernels
from glm_jax.layers import Linear, RMSNorm
from glm_jax.operands import Partials
from glm_jax.ops import HeadNorms, Layer, Rows


class Pages(NamedTuple):
    """Attends over the cache, after this step's keys and values are stored there.

    Attributes:
      table: the pages of each sequence, in order.
      rows_per_sequence: so many rows after one another are tokens of the same sequence: each sees
        what this step stores for those before it, and has the bits of a row of its own.
      rotary, counters, plan: what the layers of a step share, from Attention.prepare.
    """

    table: Int32[Array, "sequences P"]
    rows_per_sequence: int = 1
    rotary: Float[Array, "B T 2 half"] | None = None
    counters: jax.Ref | None = None
    plan: AttentionPlan | None = None


# (layer, q [B, T, K, G, H], k [B, T, K, H], v, cache) -> (attended [B, T, K, G, H], cache)
AttendHeads = Callable[[Layer, Array, Array, Array, KVCache | None], tuple[Array, KVCache | None]]
Attend = Pages | AttendHeads


def attend_causal(visible: Bool[Array, "B T T"]) -> AttendHeads:
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
        self,
        config: ModelConfig,
        num_layers: int,
        dtype: jnp.dtype,
        kernels: Kernels,
        *,
        rngs: nnx.Rngs,
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
        self.kernels = kernels
        self.is_fp8 = config.is_fp8
        self.head_dim = head_dim
        self.query_groups = groups
        self.rotary = (config.rms_norm_eps, config.rotary_dim, config.rope_theta)

    def prepare(self, attend: Attend, positions: Int32[Array, "B T"]) -> Attend:
        """attend, with what depends on positions alone; to be made once, outside the layers."""
        if not isinstance(attend, Pages):
            return attend
        rotary = self.kernels.rotary_table(positions, *self.rotary[1:])
        kv_heads = self.qkv_proj.weights()[0].shape[1]
        counters = self.kernels.attention_counters(positions.shape, kv_heads)
        plan = self.kernels.attention_plan(positions, self.query_groups)
        return attend._replace(rotary=rotary, counters=counters, plan=plan)

    def __call__(
        self,
        rows: Rows,
        positions: Int32[Array, "B T"],
        layer: Layer,
        cache: KVCache | None,
        attend: Attend,
    ) -> tuple[Partials, KVCache | None]:
        """Partial sums of the sub-layer's output, one per kv head of this device."""
        qkv = self._project(rows, positions, layer)
        with jax.named_scope("attend"):
            if isinstance(attend, Pages):
                attended, cache = self._attend_pages(qkv, positions, layer, cache, attend)
            else:
                heads = ops.split_heads(qkv, self._norms(), positions, layer)
                out, cache = attend(layer, *heads, cache)
                attended = self._rows(out)
        with jax.named_scope("o_proj"):
            group_size = self.query_groups * self.head_dim
            weight = self.o_proj.weights()
            return self.kernels.partial_products(attended, weight, layer, group_size), cache

    def store(
        self,
        rows: Rows,
        positions: Int32[Array, "B T"],
        layer: Layer,
        cache: KVCache,
        pages: Pages,
    ) -> KVCache:
        """Keys and values of the rows, for queries to come; nothing attends to them yet."""
        qkv = self._project(rows, positions, layer)
        norms = self._norms()
        _, cache = self.kernels.write(
            qkv, norms, positions, pages.table, layer, cache, pages.rotary
        )
        return cache

    def _project(
        self, rows: Rows, positions: Int32[Array, "B T"], layer: Layer
    ) -> Float[Array, "B T K G2 H"]:
        bias = None if self.qkv_proj.bias is None else self.qkv_proj.bias[...]
        with jax.named_scope("qkv_proj"):
            qkv = self.kernels.product(rows, self.qkv_proj.weights(), bias, layer)
        return qkv.reshape(*positions.shape, -1, self.query_groups + 2, self.head_dim)

    def _attend_pages(
        self,
        qkv: Float[Array, "B T K G2 H"],
        positions: Int32[Array, "B T"],
        layer: Layer,
        cache: KVCache | None,
        pages: Pages,
    ) -> tuple[Rows, KVCache]:
        assert cache is not None, "pages are those of a cache"
        operands = qkv, self._norms(), positions, pages.table, layer, cache, pages.rotary
        return self.kernels.write_and_attend(
            *operands, is_fp8=self.is_fp8, counters=pages.counters, plan=pages.plan,
            rows_per_sequence=pages.rows_per_sequence,
        )  # fmt: skip

    def _rows(self, attended: Float[Array, "B T K G H"]) -> Rows:
        kv_heads = attended.shape[2]
        flat = attended.reshape(attended.shape[0] * attended.shape[1], -1)
        return ops.as_rows(flat, is_fp8=self.is_fp8, num_groups=kv_heads)

    def _norms(self) -> HeadNorms:
        if self.q_norm is None or self.k_norm is None:
            return HeadNorms(None, None, *self.rotary)
        return HeadNorms(self.q_norm.weight[...], self.k_norm.weight[...], *self.rotary)
