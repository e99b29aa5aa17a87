"""A whole forward pass with no cache, for looking inside: logits, hidden states, router picks, attention.

Knows no slots and no pages: every position of every row is computed at once, and kept.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from glm_jax.attention import AttendHeads, attend_causal
from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.model import Trace, Weights, abstract_model, abstract_weights, bind
from glm_jax.sharding import all_gather, partition_spec
from glm_jax.steps import compiler_options


class Forward(NamedTuple):
    """What a forward pass computed.

    Attributes:
      logits: the scores of every next token at every position.
      trace: the residual stream after each layer, and the router's picks.
      attention: the share of each query head's attention at position t that position s gets;
        None unless it was asked for.
    """

    logits: Float32[Array, "B T V"]
    trace: Trace
    attention: Float32[Array, "L B N T T"] | None = None


def forward_function(
    config: ModelConfig, mesh: Mesh, dtype: DTypeLike, *, with_attention: bool = False
) -> jax.stages.Wrapped:
    """A jitted function (weights, tokens int32[B, T]) -> Forward, causal, on the given mesh."""
    model = abstract_model(config, dtype)

    def forward(weights: Weights, tokens: Int32[Array, "B T"]) -> Forward:
        bound = bind(model, weights)
        num_rows, num_tokens = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(num_tokens), tokens.shape)
        visible = positions[:, :, None] >= positions[:, None, :]
        attend, record = attend_causal(visible), None
        if with_attention:
            num_heads = config.num_attention_heads // mesh.size
            shape = (config.num_hidden_layers, num_rows, num_heads, num_tokens, num_tokens)
            attend, record = _attend_on_record(visible), jnp.zeros(shape)
        # Layers hand the cache on as they get it; without pages it may be anything.
        cache = cast(KVCache | None, record)
        hidden, cache, trace = bound(tokens, positions, cache, attend, with_trace=True)
        assert trace is not None
        logits = bound.logits(hidden.reshape(num_rows * num_tokens, -1))
        record = None if record is None else all_gather(cast(Array, cache), axis=2)
        return Forward(logits.reshape(num_rows, num_tokens, -1), trace, record)

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


def _attend_on_record(visible: Bool[Array, "B T T"]) -> AttendHeads:
    """attend_causal that writes each layer's shares into [L, B, N, T, T] in place of a cache."""
    plain = attend_causal(visible)

    def attend(
        layer: Array | int,
        q: Float[Array, "B T K G H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        cache: KVCache | None,
    ) -> tuple[Array, KVCache | None]:
        q_heads = q.astype(jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.einsum("btkgh,bskh->bkgts", q_heads, k.astype(jnp.float32))
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        shares = jax.nn.softmax(scores, axis=-1).reshape(q.shape[0], -1, *visible.shape[1:])
        record = lax.dynamic_update_index_in_dim(cast(Array, cache), shares, layer, axis=0)
        return plain(layer, q, k, v, None)[0], cast(KVCache, record)

    return attend
