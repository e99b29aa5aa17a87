"""A whole forward pass with no cache: logits, hidden states, router picks; for looking inside.

Knows no slots and no pages: every position of every row is computed at once, and kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from glm_jax.attention import attend_causal
from glm_jax.config import ModelConfig
from glm_jax.model import Trace, Weights, abstract_model, abstract_weights, bind
from glm_jax.sharding import partition_spec
from glm_jax.steps import compiler_options


class Forward(NamedTuple):
    """What a forward pass computed.

    Attributes:
      logits: the scores of every next token at every position.
      trace: the residual stream after each layer, and the router's picks.
    """

    logits: Float32[Array, "B T V"]
    trace: Trace


def forward_function(config: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> jax.stages.Wrapped:
    """A jitted function (weights, tokens int32[B, T]) -> Forward, causal, on the given mesh."""
    model = abstract_model(config, dtype)

    def forward(weights: Weights, tokens: Int32[Array, "B T"]) -> Forward:
        bound = bind(model, weights)
        num_rows, num_tokens = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(num_tokens), tokens.shape)
        visible = positions[:, :, None] >= positions[:, None, :]
        hidden, _, trace = bound(tokens, positions, None, attend_causal(visible), with_trace=True)
        assert trace is not None
        logits = bound.logits(hidden.reshape(num_rows * num_tokens, -1))
        return Forward(logits.reshape(num_rows, num_tokens, -1), trace)

    specs = {
        path: partition_spec(spec.axes) for path, spec in abstract_weights(config, dtype).items()
    }
    sharded = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.jit(sharded, compiler_options=compiler_options(mesh))
