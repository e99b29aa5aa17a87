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
from glm_jax.kernels import DEFAULT_KERNELS, Kernels, Partials
from glm_jax.layers import Layer, RMSNorm, VocabTable
from glm_jax.moe import MLP, MoE, Routing
from glm_jax.ops import NormedRows
from glm_jax.sharding import WeightSpec, as_partials, round_partials

# The residual stream, and what the sub-layer before adds to it: not summed over devices yet.
Carry = tuple[Array, Partials, KVCache | None]


class Trace(NamedTuple):
    """What happened inside a forward pass, layer by layer.

    Attributes:
      hidden: [L, B, T, D], the residual stream after each layer.
      routing: of the expert layers, each field stacked to [Lm, B * T, …].
    """

    hidden: Float[Array, "L B T D"]
    routing: Routing


class DecoderLayers(nnx.Module):
    """All decoder layers, stacked: the first first_k_dense_replace have a dense MLP, the rest MoE.

    Between sub-layers stand NormedRows: a sum over devices, the addition to the residual stream and
    the norm that follows are one operation.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        kernels: Kernels = DEFAULT_KERNELS,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        num_layers = config.num_hidden_layers
        norm = ((num_layers, config.hidden_size), ("layers", "embed"), config.rms_norm_eps, dtype)
        self.input_layernorm = RMSNorm(*norm, rngs=rngs)
        self.self_attn = Attention(config, num_layers, dtype, kernels, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(*norm, rngs=rngs)
        self.kernels = kernels
        self.is_fp8 = config.is_fp8
        self.num_dense = config.first_k_dense_replace
        self.num_layers = num_layers
        width = config.intermediate_size
        self.dense_mlp = nnx.data(
            MLP(config, self.num_dense, width, dtype, kernels, rngs=rngs)
            if self.num_dense
            else None
        )
        self.moe = MoE(config, config.num_moe_layers, dtype, kernels, rngs=rngs)

    def enter(self, x: Float[Array, "T D"], layer: Layer) -> NormedRows:
        """The residual stream as a layer's attention takes it, when nothing is left to be summed."""
        norm = self.input_layernorm
        return self.kernels.add_norm(
            x, None, norm.stacked(), layer, eps=norm.eps, is_fp8=self.is_fp8
        )

    def add(
        self, partials: Partials, residual: Float[Array, "T D"], norm: RMSNorm, layer: Layer
    ) -> NormedRows:
        """residual + the sum of all devices' partials, normed for the sub-layer that follows."""
        return self.kernels.sum_add_norm(
            partials, residual, norm.stacked(), layer, eps=norm.eps, is_fp8=self.is_fp8
        )

    def attention_block(
        self,
        normed: NormedRows,
        positions: Int32[Array, "B T"],
        layer: Layer,
        cache: KVCache | None,
        attend: Attend,
    ) -> tuple[NormedRows, KVCache | None]:
        """The residual stream with attention added, normed for the MLP."""
        partials, cache = self.self_attn(normed.rows, positions, layer, cache, attend)
        norm = self.post_attention_layernorm
        return self.add(partials, normed.residual, norm, layer), cache

    def mlp_block(
        self, normed: NormedRows, layer: Layer, is_dense: bool
    ) -> tuple[Partials, Routing | None]:
        """What the layer's dense MLP or its experts add to the residual stream, still to be summed."""
        if is_dense:
            assert self.dense_mlp is not None
            return self.dense_mlp(normed.rows, layer), None
        return self.moe(normed.rows, layer - self.num_dense)


class Glm4Moe(nnx.Module):
    """GLM-4.5, 4.6 and 4.7: a decoder of dense and mixture-of-experts layers.

    Args:
      config: the hyper-parameters.
      dtype: of activations and of every weight that is not FP8.
      kernels: how the heavy operations are to run.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        kernels: Kernels = DEFAULT_KERNELS,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        size = (config.vocab_size, config.hidden_size)
        self.embed_tokens = VocabTable(*size, dtype, rngs=rngs)
        self.layers = DecoderLayers(config, dtype, kernels, rngs=rngs)
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
        attend = layers.self_attn.prepare(attend, positions)

        def run(
            is_dense: bool, carry: Carry, layer: Array
        ) -> tuple[Carry, tuple[Array, Routing | None] | None]:
            residual, partials, cache = carry
            normed = layers.add(partials, residual, layers.input_layernorm, layer)
            before = normed.residual
            normed, cache = layers.attention_block(normed, positions, layer, cache, attend)
            partials, routing = layers.mlp_block(normed, layer, is_dense)
            carry = (normed.residual, round_partials(partials, residual.dtype), cache)
            return carry, ((before, routing) if with_trace else None)

        # The embedding is what the first layer adds to nothing: its sum is like every other.
        embedded = self.embed_tokens.embed_here(tokens.reshape(-1))
        kv_heads = layers.self_attn.qkv_proj.values.shape[1]
        carry: Carry = (jnp.zeros_like(embedded), as_partials(embedded, kv_heads), cache)
        entered = []
        if num_dense:
            carry, traced = lax.scan(partial(run, True), carry, jnp.arange(num_dense))
            entered = [traced[0]] if traced else []
        indices = jnp.arange(num_dense, layers.num_layers)
        carry, traced = lax.scan(partial(run, False), carry, indices)
        residual, partials, cache = carry
        last = layers.add(partials, residual, self.norm, 0)
        trace = None
        if traced is not None:
            residuals, routing = traced
            assert routing is not None
            hidden = jnp.concatenate([*entered, residuals, last.residual[None]])[1:]
            trace = Trace(hidden.reshape(-1, *tokens.shape, hidden.shape[-1]), routing)
        assert last.rows.plain is not None
        return last.rows.plain.reshape(*tokens.shape, -1), cache, trace

    def logits(self, hidden: Float[Array, "T D"]) -> Float32[Array, "T V"]:
        """Scores of every token of the vocabulary, for normed hidden states."""
        with jax.named_scope("lm_head"):
            return self.lm_head.logits(hidden)


Weights = dict[str, jax.Array]


def abstract_model(
    config: ModelConfig,
    dtype: DTypeLike,
    kernels: Kernels = DEFAULT_KERNELS,
) -> Glm4Moe:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Glm4Moe(config, jnp.dtype(dtype), kernels, rngs=nnx.Rngs(0)))


def abstract_weights(config: ModelConfig, dtype: DTypeLike) -> dict[str, WeightSpec]:
    """Every weight's shape, dtype and logical axes, by its dotted path, without making any."""
    return specs_of(abstract_model(config, dtype))


def specs_of(module: nnx.Module) -> dict[str, WeightSpec]:
    """The shape, dtype and logical axes of each parameter of a module, which may be abstract."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {
        ".".join(map(str, path)): WeightSpec(
            tuple(param.shape), np.dtype(param.dtype), param.get_metadata("axes")
        )
        for path, param in flat
    }


def bind[M: nnx.Module](model: M, weights: Weights) -> M:
    """The model, or a part of it, holding these arrays in place of its own; `model` may be abstract.

    Raises:
      KeyError: a weight is missing.
    """
    graphdef, state = nnx.split(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    filled = [(path, param.replace(weights[".".join(map(str, path))])) for path, param in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
