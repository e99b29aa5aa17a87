"""The decoder: embed, layers, logits. One screen.

Knows no mesh and no schedule: inside a step every array is this device's part, and each sub-layer
ends in one sum over devices.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from glm_jax import sharding
from glm_jax.attention import Attend, Attention
from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.kernels import PLAIN_KERNELS, Kernels
from glm_jax.layers import NormStack, RMSNorm, VocabTable
from glm_jax.moe import MLP, MoE, Routing
from glm_jax.operands import Pending, Shifted, Workspace
from glm_jax.ops import Layer, NormedRows
from glm_jax.sharding import WeightSpec

# The layer to come, the residual stream as it takes it, and the cache.
Carry = tuple[Array, NormedRows, KVCache | None]
# The residual stream after a layer, and where its tokens were sent.
Layerwise = tuple[Array, Routing | None]
# Layers of experts in a turn of a GPU's loop over them. A turn costs two launches of XLA's, its count
# and its condition, and a layer in it 1 MB of the compiled step.
_AT_A_TIME = 4


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
    the norm that follows are one operation, the last one of a layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        kernels: Kernels = PLAIN_KERNELS,
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
        self,
        pending: Pending,
        residual: Float[Array, "T D"],
        norm: RMSNorm | NormStack,
        layer: Layer,
        workspace: Workspace | None = None,
    ) -> NormedRows:
        """residual + what is pending on all devices, normed for the sub-layer that follows."""
        return self._add(pending, residual, norm, layer, workspace)[0]

    def _add(
        self,
        pending: Pending,
        residual: Float[Array, "T D"],
        norm: RMSNorm | NormStack,
        layer: Layer,
        workspace: Workspace | None,
        later: Layer | Shifted = 0,
    ) -> tuple[NormedRows, Layer]:
        return self.kernels.sum_add_norm(
            pending, residual, norm.stacked(), layer, eps=norm.eps, is_fp8=self.is_fp8,
            workspace=workspace, later=later,
        )  # fmt: skip

    def norms_between(self, last: RMSNorm) -> NormStack:
        """The norm before each layer's attention, and after them all the one before the head."""
        stacks = [self.input_layernorm.stacked(), last.stacked()]
        return NormStack(jnp.concatenate(stacks), last.eps)

    def attention_block(
        self,
        normed: NormedRows,
        positions: Int32[Array, "B T"],
        layer: Layer,
        cache: KVCache | None,
        attend: Attend,
        workspace: Workspace | None = None,
    ) -> tuple[NormedRows, KVCache | None, Layer]:
        """The residual stream with attention added, normed for the MLP; and which layer is next.

        The kernel that ends a layer would tell that too late: the next one's first reads its weights
        before the kernel ahead of it has ended.
        """
        partials, cache = self.self_attn(normed.rows, positions, layer, cache, attend)
        norm, later = self.post_attention_layernorm, self.kernels.shifted(layer, 1)
        normed, following = self._add(partials, normed.residual, norm, layer, workspace, later)
        return normed, cache, following

    def mlp_block(
        self,
        normed: NormedRows,
        layer: Layer,
        is_dense: bool,
        workspace: Workspace | None = None,
    ) -> tuple[Pending, Routing | None]:
        """What the layer's dense MLP or its experts add to the residual stream, still to be summed."""
        if is_dense:
            assert self.dense_mlp is not None
            return self.dense_mlp(normed.rows, layer), None
        return self.moe(normed.rows, self.kernels.shifted(layer, -self.num_dense), workspace)


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
        kernels: Kernels = PLAIN_KERNELS,
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
        workspace: Workspace | None = None,
        *,
        with_trace: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Trace | None]:
        """Runs every layer; returns the normed last hidden states, the cache, and the trace if asked.

        Layers run as a loop over the layer index with the stacked weights held outside it: a loop
        that carried each layer's weights as its input would copy them.

        Args:
          workspace: of so many rows, where the step has made one before.
        """
        layers = self.layers
        attend = layers.self_attn.prepare(attend, positions)
        norms = layers.norms_between(self.norm)
        workspace = workspace or self.workspace(tokens.size)

        def run(is_dense: bool, carry: Carry, _: None) -> tuple[Carry, Layerwise | None]:
            layer, normed, cache = carry
            normed, cache, following = layers.attention_block(
                normed, positions, layer, cache, attend, workspace
            )
            pending, routing = layers.mlp_block(normed, layer, is_dense, workspace)
            normed = layers.add(pending, normed.residual, norms, following, workspace)
            after = (normed.residual, routing) if with_trace else None
            return (jnp.asarray(following), normed, cache), after

        embedded = self.embed_tokens.embed(tokens.reshape(-1))
        carry: Carry = (jnp.int32(0), layers.enter(embedded, 0), cache)
        num_dense, entered = layers.num_dense, []
        if num_dense:
            carry, traced = _walk(partial(run, True), carry, 0, num_dense, 1, with_trace)
            entered = [traced[0]] if traced else []
        at_a_time = 1 if workspace is None else _AT_A_TIME
        # A loop that turns once is none, and then XLA's kernels would follow the last of ours.
        has_turns = layers.num_layers - num_dense >= 2 * at_a_time
        shares = workspace if has_turns and not with_trace else None
        with shares.overlapping(*tokens.shape) if shares else nullcontext():
            carry, traced = _walk(
                partial(run, False), carry, num_dense, layers.num_layers, at_a_time, with_trace
            )
        _, last, cache = carry
        trace = None
        if traced is not None:
            residuals, routing = traced
            assert routing is not None
            hidden = jnp.concatenate([*entered, residuals])
            trace = Trace(hidden.reshape(-1, *tokens.shape, hidden.shape[-1]), routing)
        assert last.rows.plain is not None
        return last.rows.plain.reshape(*tokens.shape, -1), cache, trace

    def workspace(self, num_rows: int) -> Workspace | None:
        """Memory that the kernels of a step of so many rows share; None where each does without."""
        layers = self.layers
        width = layers.input_layernorm.stacked().shape[-1]
        return layers.kernels.workspace(num_rows, width, layers.moe.experts.num_local)

    def logits(self, hidden: Float[Array, "T D"]) -> Float32[Array, "T V"]:
        """Scores of every token of the vocabulary, for normed hidden states."""
        with jax.named_scope("lm_head"):
            return self.lm_head.logits(hidden, self.layers.kernels)

    def choose(
        self,
        hidden: Float[Array, "T D"],
        rows: tuple[Array, ...],
        choose: Callable[..., Int32[Array, "*outputs T"]],
    ) -> Int32[Array, "*outputs T"]:
        """choose(logits, *rows), which knows each row by itself: where rows are many, each device
        does it for its share of them, and none gets the logits of all."""
        if not sharding.shares_rows(len(hidden)):
            return choose(sharding.in_memory(self.logits(hidden)), *rows)
        with jax.named_scope("lm_head"):
            own = self.lm_head.logits_of_share(hidden, self.layers.kernels)
            logits = sharding.in_memory(own)
        chosen = choose(logits, *map(sharding.share_of, rows))
        return sharding.all_gather(chosen, axis=chosen.ndim - 1)


def _walk(
    run: Callable[[Carry, None], tuple[Carry, Layerwise | None]],
    carry: Carry,
    first: int,
    end: int,
    at_a_time: int,
    with_trace: bool,
) -> tuple[Carry, Layerwise | None]:
    """Layers first ... end - 1, so many in a turn of the loop; their traces, stacked, if asked."""
    carry = (jnp.int32(first), *carry[1:])
    if with_trace:
        return lax.scan(run, carry, None, end - first)

    # Traced and lowered once, however many there are.
    @jax.jit
    def layer(carry: Carry) -> Carry:
        return run(carry, None)[0]

    def several(carry: Carry, number: int) -> Carry:
        for _ in range(number):
            carry = layer(carry)
        return carry

    def turn(carry: Carry) -> Carry:
        # The loop has a count of its own, which tells the compiler how often it turns.
        return (carry[0] + at_a_time, *several(carry, at_a_time)[1:])

    odd = (end - first) % at_a_time
    carry = (jnp.int32(first + odd), *several(carry, odd)[1:])
    # A scan would count layers a second time, which is a launch a layer.
    return lax.while_loop(lambda carry: carry[0] < end, turn, carry), None


Weights = dict[str, jax.Array]


def abstract_model(
    config: ModelConfig,
    dtype: DTypeLike,
    kernels: Kernels = PLAIN_KERNELS,
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
