"""Every heavy operation as a step runs it: the choice between a kernel and the reference.

Knows no layer and no model. The choice is bound when a step is made, and travels with the model.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Float32, Int32

from glm_jax import cache as kv_cache
from glm_jax import ops, sharding
from glm_jax.cache import KVCache
from glm_jax.ops import HeadNorms, Layer, NormedRows, Rows

# A stacked weight: its values, and their scale where they are FP8.
Weight = tuple[Array, Array | None]
# Products still to be summed over devices: float32[R, T, D], one for each kv head's share of the model.
Partials = Float[Array, "R T D"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations, as they are to run wherever a step is traced."""

    def add_norm(
        self,
        residual: Float[Array, "T D"],
        added: Float[Array, "T D"] | None,
        weight: Float[Array, "L D"],
        layer: Layer,
        *,
        eps: float,
        is_fp8: bool,
    ) -> NormedRows:
        """residual + added, and the same normed and quantized for what follows."""
        return ops.add_norm(residual, added, weight, layer, eps=eps, is_fp8=is_fp8)

    def sum_add_norm(
        self,
        partials: Partials,
        residual: Float[Array, "T D"],
        weight: Float[Array, "L D"],
        layer: Layer,
        *,
        eps: float,
        is_fp8: bool,
    ) -> NormedRows:
        """add_norm of what the partials of all devices sum up to."""
        added = sharding.sum_partials(partials, residual.dtype)
        return self.add_norm(residual, added, weight, layer, eps=eps, is_fp8=is_fp8)

    def product(
        self, rows: Rows, weight: Weight, bias: Float[Array, " L *N"] | None, layer: Layer
    ) -> Float[Array, " T *N"]:
        """A linear layer of rows that are quantized already if the weight is FP8."""
        return ops.product(rows, *weight, bias, layer)

    def partial_products(
        self, rows: Rows, weight: Weight, layer: Layer, group_size: int
    ) -> Partials:
        """The row-parallel form: a partial product for each group of the rows' columns."""
        return ops.partial_products(rows, *weight, layer, group_size)

    def gated_silu(self, gate_up: Float[Array, "T 2 F"], *, is_fp8: bool, num_groups: int) -> Rows:
        """silu(gate) * up, made ready for a row-parallel layer of so many groups."""
        return ops.as_rows(ops.gated_silu(gate_up), is_fp8=is_fp8, num_groups=num_groups)

    def write(
        self,
        qkv: Float[Array, "B T K G2 H"],
        norms: HeadNorms,
        positions: Int32[Array, "B T"],
        page_table: Int32[Array, "B P"],
        layer: Layer,
        cache: KVCache,
    ) -> tuple[Float[Array, "B T K G H"], KVCache]:
        """Norms and rotates heads, stores keys and values in the pages; returns the queries."""
        q, k, v = ops.split_heads(qkv, norms, positions, layer)
        return q, kv_cache.write(cache, layer, page_table, positions, k, v)

    def attend(
        self,
        q: Float[Array, "B T K G H"],
        cache: KVCache,
        layer: Layer,
        page_table: Int32[Array, "B P"],
        positions: Int32[Array, "B T"],
        *,
        is_fp8: bool,
    ) -> Rows:
        """Attends over the pages; the rows are ready for o_proj, with a scale for each kv head."""
        attended = ops.paged_attention(q, *cache, layer, page_table, positions)
        flat = attended.reshape(q.shape[0] * q.shape[1], -1)
        return ops.as_rows(flat, is_fp8=is_fp8, num_groups=q.shape[2])

    def route(
        self,
        x: Float[Array, "T D"],
        weight: Float[Array, "L E D"],
        bias: Float32[Array, "L E"],
        layer: Layer,
        *,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
        routed_scaling_factor: float,
    ) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"], Float32[Array, "T E"]]:
        """Each token's experts, their weights, and the scores of all."""
        return ops.route(
            x,
            weight,
            bias,
            layer,
            num_experts_per_tok=num_experts_per_tok,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
        )

    def experts(
        self,
        rows: Rows,
        chosen: Int32[Array, "T k"],
        weights: Float32[Array, "T k"],
        experts: tuple[Weight, Weight],
        shared: tuple[Weight, Weight],
        layer: Layer,
        *,
        group_size: int,
        shared_group_size: int,
    ) -> Partials:
        """This device's experts for the tokens that chose them, and its part of the shared expert.

        Args:
          experts, shared: gate_up and down projections.
          group_size: experts for each partial sum.
          shared_group_size: columns of the shared expert's width for each partial sum.
        """
        gate_up, down = experts
        num_local = down[0].shape[1]
        first = sharding.device_index() * num_local
        routing = ops.local_routing(chosen, weights, first, num_local)
        with jax.named_scope("experts"):
            routed = ops.experts(rows, routing, *gate_up, *down, layer, group_size)
        with jax.named_scope("shared_experts"):
            return routed + self.gated_mlp(rows, shared, layer, shared_group_size)

    def gated_mlp(
        self, rows: Rows, weights: tuple[Weight, Weight], layer: Layer, group_size: int
    ) -> Partials:
        """down(silu(gate(x)) * up(x)), in partial products over groups of the width."""
        gate_up, down = weights
        hidden = self.product(rows, gate_up, None, layer)
        num_groups = hidden.shape[-1] // group_size
        inner = self.gated_silu(hidden, is_fp8=down[1] is not None, num_groups=num_groups)
        return self.partial_products(inner, down, layer, group_size)


DEFAULT_KERNELS = Kernels()
