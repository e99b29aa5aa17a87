"""Routing, routed experts, shared expert; and the dense MLP of the first layers.

Knows neither attention nor requests. Outputs are partial sums, one per kv head's share of the model,
whatever the mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from glm_jax import ops, sharding
from glm_jax.config import ModelConfig
from glm_jax.layers import Layer, Linear, parameter


class Routing(NamedTuple):
    """Which experts each token goes to.

    Attributes:
      experts: int32[T, k], by falling score.
      weights: float32[T, k], what each expert's output is multiplied with.
      scores: float32[T, E], sigmoid of the router's logits, for inspection and load balancing.
    """

    experts: Int32[Array, "T k"]
    weights: Float32[Array, "T k"]
    scores: Float32[Array, "T E"]


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), stacked over layers, split over its width."""

    def __init__(
        self, config: ModelConfig, num_layers: int, width: int, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        self.gate_up_proj = Linear(
            (num_layers, 2, width, config.hidden_size),
            ("layers", None, "mlp", "embed"),
            dtype,
            is_fp8=config.is_fp8,
            rngs=rngs,
        )
        self.down_proj = Linear(
            (num_layers, config.hidden_size, width),
            ("layers", "embed", "mlp"),
            dtype,
            is_fp8=config.is_fp8,
            rngs=rngs,
        )
        self.group_size = width // config.num_key_value_heads

    def __call__(self, x: Float[Array, "T D"], layer: Layer) -> Float32[Array, "R T D"]:
        """Partial sums over groups of the width."""
        hidden = ops.gated_silu(self.gate_up_proj(x, layer))
        return self.down_proj.partials(hidden, layer, self.group_size)


class Router(nnx.Module):
    """Scores every expert for every token; replicated on all devices."""

    def __init__(
        self, config: ModelConfig, num_layers: int, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        shape = (num_layers, config.n_routed_experts, config.hidden_size)
        init = nnx.initializers.normal(config.hidden_size**-0.5)
        self.weight = parameter(init, rngs, shape, dtype, ("layers", None, "embed"))
        zeros = nnx.initializers.zeros
        self.e_score_correction_bias = parameter(
            zeros, rngs, shape[:-1], jnp.float32, ("layers", None)
        )
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor

    def __call__(self, x: Float[Array, "T D"], layer: Layer) -> Routing:
        """Picks by score plus correction bias; weighs by score alone, renormalized and scaled."""
        scores = jax.nn.sigmoid(ops.router_logits(x, self.weight[...], layer))
        bias = lax.dynamic_index_in_dim(self.e_score_correction_bias[...], layer, keepdims=True)
        _, chosen = lax.top_k(scores + bias, self.num_experts_per_tok)
        weights = jnp.take_along_axis(scores, chosen, axis=1)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return Routing(chosen, weights * self.routed_scaling_factor, scores)


class Experts(nnx.Module):
    """The routed experts, whole experts on each device."""

    def __init__(
        self, config: ModelConfig, num_layers: int, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        num_experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up_proj = Linear(
            (num_layers, num_experts, 2, width, config.hidden_size),
            ("layers", "experts", None, "expert_mlp", "embed"),
            dtype,
            is_fp8=config.is_fp8,
            rngs=rngs,
        )
        self.down_proj = Linear(
            (num_layers, num_experts, config.hidden_size, width),
            ("layers", "experts", "embed", "expert_mlp"),
            dtype,
            is_fp8=config.is_fp8,
            rngs=rngs,
        )
        self.group_size = num_experts // config.num_key_value_heads

    def __call__(
        self, x: Float[Array, "T D"], routing: Routing, layer: Layer
    ) -> Float32[Array, "R T D"]:
        """Partial sums over groups of experts; every device sees every token and adds its own."""
        num_local = self.down_proj.values.shape[1]
        local = sharding.device_index() * num_local + jnp.arange(num_local)
        is_chosen = routing.experts[:, :, None] == local[None, None, :]
        weights = jnp.where(is_chosen, routing.weights[:, :, None], 0.0).sum(1)
        return ops.experts(
            x,
            weights,
            *self.gate_up_proj.weights(),
            *self.down_proj.weights(),
            layer,
            self.group_size,
        )


class MoE(nnx.Module):
    """A mixture-of-experts MLP: routed experts plus the shared expert every token passes."""

    def __init__(
        self, config: ModelConfig, num_layers: int, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        self.gate = Router(config, num_layers, dtype, rngs=rngs)
        self.experts = Experts(config, num_layers, dtype, rngs=rngs)
        self.shared_experts = MLP(config, num_layers, config.shared_width, dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "T D"], layer: Layer
    ) -> tuple[Float32[Array, "R T D"], Routing]:
        """Partial sums, routed and shared together; the shared expert is not scaled."""
        with jax.named_scope("router"):
            routing = self.gate(x, layer)
        with jax.named_scope("experts"):
            routed = self.experts(x, routing, layer)
        with jax.named_scope("shared_experts"):
            shared = self.shared_experts(x, layer)
        assert routed.shape == shared.shape, (routed.shape, shared.shape)
        return routed + shared, routing
