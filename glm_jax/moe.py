"""Routing, routed experts, shared expert; and the dense MLP of the first layers.

Knows neither attention nor requests. Outputs are partial sums, one per kv head's share of the model,
whatever the mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from glm_jax.config import ModelConfig
from glm_jax.kernels import PLAIN_KERNELS, Kernels
from glm_jax.layers import Layer, Linear, parameter
from glm_jax.operands import Partials, Pending, Staged, Weight, Workspace
from glm_jax.ops import Rows


class Routing(NamedTuple):
    """Which experts each token goes to.

    Attributes:
      experts: int32[T, k], by falling score.
      weights: float32[T, k], what each expert's output is multiplied with.
      scores: float32[T, E], sigmoid of the router's logits, for inspection and load balancing; None
        where a kernel routes.
      staged: the tokens in the order of their experts, where the kernel that routes also sorts.
    """

    experts: Int32[Array, "T k"]
    weights: Float32[Array, "T k"]
    scores: Float32[Array, "T E"] | None
    staged: Staged | None = None


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), stacked over layers, split over its width."""

    def __init__(
        self,
        config: ModelConfig,
        num_layers: int,
        width: int,
        dtype: jnp.dtype,
        kernels: Kernels,
        *,
        rngs: nnx.Rngs,
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
        self.kernels = kernels

    def weights(self) -> tuple[Weight, Weight]:
        """Of the gate_up and the down projection."""
        return self.gate_up_proj.weights(), self.down_proj.weights()

    def __call__(self, rows: Rows, layer: Layer) -> Partials:
        """Partial sums over groups of the width."""
        return self.kernels.gated_mlp(rows, self.weights(), layer, self.group_size)


class Router(nnx.Module):
    """Scores every expert for every token; replicated on all devices."""

    def __init__(
        self,
        config: ModelConfig,
        num_layers: int,
        dtype: jnp.dtype,
        kernels: Kernels,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (num_layers, config.n_routed_experts, config.hidden_size)
        init = nnx.initializers.normal(config.hidden_size**-0.5)
        self.weight = parameter(init, rngs, shape, dtype, ("layers", None, "embed"))
        zeros = nnx.initializers.zeros
        self.e_score_correction_bias = parameter(
            zeros, rngs, shape[:-1], jnp.float32, ("layers", None)
        )
        self.choice = {
            "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": config.norm_topk_prob,
            "routed_scaling_factor": config.routed_scaling_factor,
        }
        self.kernels = kernels

    def __call__(self, x: Float[Array, "T D"], layer: Layer) -> Routing:
        """Picks by score plus correction bias; weighs by score alone, renormalized and scaled."""
        weight, bias = self.weight[...], self.e_score_correction_bias[...]
        return Routing(*self.kernels.route(x, weight, bias, layer, **self.choice))

    def stage(self, rows: Rows, layer: Layer, num_local: int, workspace: Workspace) -> Routing:
        """Routes, and sorts the rows by this device's num_local experts."""
        weight, bias = self.weight[...], self.e_score_correction_bias[...]
        found = self.kernels.stage(rows, weight, bias, layer, num_local, workspace, **self.choice)
        return Routing(*found)


class Experts(nnx.Module):
    """The routed experts, whole experts on each device."""

    def __init__(
        self,
        config: ModelConfig,
        num_layers: int,
        dtype: jnp.dtype,
        kernels: Kernels,
        *,
        rngs: nnx.Rngs,
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
        self.kernels = kernels

    @property
    def num_local(self) -> int:
        """Experts that each device holds; inside a step, where arrays are a device's part."""
        return self.down_proj.values.shape[1]

    def __call__(self, rows: Rows, routing: Routing, shared: MLP, layer: Layer) -> Pending:
        """Partial sums over groups of experts, the shared expert's part with each; every device sees
        every token and adds its own."""
        return self.kernels.experts(
            rows,
            routing.experts,
            routing.weights,
            (self.gate_up_proj.weights(), self.down_proj.weights()),
            shared.weights(),
            layer,
            group_size=self.group_size,
            shared_group_size=shared.group_size,
            staged=routing.staged,
        )


class MoE(nnx.Module):
    """A mixture-of-experts MLP: routed experts plus the shared expert every token passes."""

    def __init__(
        self,
        config: ModelConfig,
        num_layers: int,
        dtype: jnp.dtype,
        kernels: Kernels = PLAIN_KERNELS,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        arguments = (config, num_layers, dtype, kernels)
        self.gate = Router(*arguments, rngs=rngs)
        self.experts = Experts(*arguments, rngs=rngs)
        width = config.shared_width
        self.shared_experts = MLP(config, num_layers, width, dtype, kernels, rngs=rngs)

    def __call__(
        self, rows: Rows, layer: Layer, workspace: Workspace | None = None
    ) -> tuple[Pending, Routing]:
        """Partial sums, routed and shared together; the shared expert is not scaled."""
        assert rows.plain is not None, "the router reads rows that are not quantized"
        with jax.named_scope("router"):
            if workspace is None:
                routing = self.gate(rows.plain, layer)
            else:
                routing = self.gate.stage(rows, layer, self.experts.num_local, workspace)
        pending = self.experts(rows, routing, self.shared_experts, layer)
        return pending, routing._replace(staged=None)
