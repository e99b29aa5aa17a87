"""The decoder: embed, layers, logits. One screen.

Knows no mesh and no schedule: inside a step every array is this device's part, and each sub-layer
ends in one sum over devices.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from glm_jax.attention import Attend, Attention
from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.layers import Layer, RMSNorm, VocabTable
from glm_jax.moe import MLP, MoE, Routing
from glm_jax.sharding import WeightSpec, sum_partials

Carry = tuple[Array, KVCache | None]


class Trace(NamedTuple):
    """What happened inside a forward pass, layer by layer.

    Attributes:
      hidden: [L, B, T, D], the residual stream after each layer.
      routing: of the expert layers, each field stacked to [Lm, B * T, …].
    """

    hidden: Float[Array, "L B T D"]
    routing: Routing


class DecoderLayers(nnx.Module):
    """All decoder layers, stacked: the first first_k_dense_replace have a dense MLP, the rest MoE."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        num_layers = config.num_hidden_layers
        norm = ((num_layers, config.hidden_size), ("layers", "embed"), config.rms_norm_eps, dtype)
        self.input_layernorm = RMSNorm(*norm, rngs=rngs)
        self.self_attn = Attention(config, num_layers, dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(*norm, rngs=rngs)
        self.num_dense = config.first_k_dense_replace
        self.num_layers = num_layers
        width = config.intermediate_size
        self.dense_mlp = nnx.data(
            MLP(config, self.num_dense, width, dtype, rngs=rngs) if self.num_dense else None
        )
        self.moe = MoE(config, config.num_moe_layers, dtype, rngs=rngs)

    def attention_block(
        self,
        x: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        layer: Layer,
        cache: KVCache | None,
        attend: Attend,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """x + attention(norm(x))."""
        normed = self.input_layernorm(x, layer)
        partials, cache = self.self_attn(normed, positions, layer, cache, attend)
        return x + sum_partials(partials, x.dtype).reshape(x.shape), cache

    def mlp_block(
        self, x: Float[Array, "B T D"], layer: Layer, is_dense: bool
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """x + mlp(norm(x)), with the dense MLP or the experts of the layer."""
        normed = self.post_attention_layernorm(x, layer).reshape(-1, x.shape[-1])
        routing = None
        if is_dense:
            assert self.dense_mlp is not None
            partials = self.dense_mlp(normed, layer)
        else:
            partials, routing = self.moe(normed, layer - self.num_dense)
        return x + sum_partials(partials, x.dtype).reshape(x.shape), routing


class Glm4Moe(nnx.Module):
    """GLM-4.5, 4.6 and 4.7: a decoder of dense and mixture-of-experts layers.

    Args:
      config: the hyper-parameters.
      dtype: of activations and of every weight that is not FP8.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        size = (config.vocab_size, config.hidden_size)
        self.embed_tokens = VocabTable(*size, dtype, rngs=rngs)
        self.layers = DecoderLayers(config, dtype, rngs=rngs)
        self.norm = RMSNorm(size[1:], ("embed",), config.rms_norm_eps, dtype, rngs=rngs)
        self.lm_head = VocabTable(*size, dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        cache: KVCache | None,
        attend: Attend,
        *,
        with_trace: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Trace | None]:
        """Runs every layer; returns the normed last hidden states, the cache, and the trace if asked.

        Layers run as a loop over the layer index with the stacked weights held outside it: a loop
        that carried each layer's weights as its input would copy them.
        """
        layers, num_dense = self.layers, self.layers.num_dense

        def run(
            is_dense: bool, carry: Carry, layer: Array
        ) -> tuple[Carry, tuple[Array, Routing | None] | None]:
            x, cache = layers.attention_block(carry[0], positions, layer, carry[1], attend)
            x, routing = layers.mlp_block(x, layer, is_dense)
            return (x, cache), ((x, routing) if with_trace else None)

        carry: Carry = (self.embed_tokens.embed(tokens), cache)
        dense_hidden = []
        if num_dense:
            carry, traced = lax.scan(partial(run, True), carry, jnp.arange(num_dense))
            dense_hidden = [traced[0]] if traced else []
        indices = jnp.arange(num_dense, layers.num_layers)
        (x, cache), traced = lax.scan(partial(run, False), carry, indices)
        trace = None
        if traced is not None:
            hidden, routing = traced
            assert routing is not None
            trace = Trace(jnp.concatenate([*dense_hidden, hidden]), routing)
        return self.norm(x, None), cache, trace

    def logits(self, hidden: Float[Array, "T D"]) -> Float32[Array, "T V"]:
        """Scores of every token of the vocabulary, for normed hidden states."""
        with jax.named_scope("lm_head"):
            return self.lm_head.logits(hidden)


Weights = dict[str, jax.Array]


def abstract_model(config: ModelConfig, dtype: DTypeLike) -> Glm4Moe:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Glm4Moe(config, jnp.dtype(dtype), rngs=nnx.Rngs(0)))


def abstract_weights(config: ModelConfig, dtype: DTypeLike) -> dict[str, WeightSpec]:
    """Every weight's shape, dtype and logical axes, by its dotted path, without making any."""
    flat = nnx.to_flat_state(nnx.state(abstract_model(config, dtype), nnx.Param))
    return {
        ".".join(map(str, path)): WeightSpec(
            tuple(param.shape), np.dtype(param.dtype), param.get_metadata("axes")
        )
        for path, param in flat
    }


def bind(model: Glm4Moe, weights: Weights) -> Glm4Moe:
    """The model holding these arrays in place of its own; `model` may be abstract.

    Raises:
      KeyError: a weight is missing.
    """
    graphdef, state = nnx.split(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    filled = [(path, param.replace(weights[".".join(map(str, path))])) for path, param in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
