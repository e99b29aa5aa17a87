"""The routed experts for training: each computes only the tokens that chose it.

Knows the same weights under the same names as the product's reference, which computes every expert
for every token: a quarter of the work here, and only room for so many tokens per expert.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax import ops
from glm_jax.layers import Layer
from glm_jax.moe import MLP, Experts, Routing
from glm_jax.operands import Partials
from glm_jax.ops import Rows


class GroupedExperts(Experts):
    """Takes the place of an unquantized Experts on one device.

    Args:
      experts: whose weights it uses.
      capacity_factor: room per expert, in multiples of what even routing would fill. Choices past
        it are dropped, which balanced routing makes rare.
    """

    def __init__(self, experts: Experts, capacity_factor: float) -> None:
        # Not the parent's constructor: that would make weights, and these are there already.
        nnx.Module.__init__(self)
        self.gate_up_proj = experts.gate_up_proj
        self.down_proj = experts.down_proj
        self.group_size = experts.group_size
        self.capacity_factor = capacity_factor

    def __call__(self, rows: Rows, routing: Routing, shared: MLP, layer: Layer) -> Partials:
        """What all experts add for every token, as the first partial sum; and the shared expert's."""
        x = rows.plain
        assert x is not None, "training knows no quantized rows"
        num_tokens, num_chosen = routing.experts.shape
        gate_up = jax.lax.dynamic_index_in_dim(self.gate_up_proj.values[...], layer, keepdims=False)
        down = jax.lax.dynamic_index_in_dim(self.down_proj.values[...], layer, keepdims=False)
        num_experts = gate_up.shape[0]
        room = int(num_tokens * num_chosen / num_experts * self.capacity_factor)
        room = min(room, num_tokens)
        # Place p of expert e holds the p-th token that chose e; empty places hold no token.
        chose = jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.int32)
        place = jnp.cumsum(chose.sum(1), axis=0) - 1
        place = jnp.take_along_axis(place, routing.experts, axis=1)
        token = jnp.broadcast_to(jnp.arange(num_tokens)[:, None], place.shape)
        held = jnp.full((num_experts, room), num_tokens, jnp.int32)
        held = held.at[routing.experts, place].set(token, mode="drop")
        weight = jnp.zeros((num_experts, room), jnp.float32)
        weight = weight.at[routing.experts, place].set(routing.weights, mode="drop")
        grouped = jnp.take(x, held, axis=0, mode="fill", fill_value=0)
        hidden = jnp.einsum("epd,egfd->epgf", grouped, gate_up)
        product = jnp.einsum("epf,edf->epd", ops.gated_silu(hidden), down)
        product = product.astype(jnp.float32) * weight[..., None]
        # As many partial sums as the shared expert's, to which they are added one by one.
        out = jnp.zeros((num_experts // self.group_size, *x.shape), jnp.float32)
        return out.at[0, held].add(product, mode="drop") + shared(rows, layer)
