"""The MTP layer: one expert layer after the last that guesses a token further, with its own cache.

Knows no speculation: hidden states and the tokens that follow them in, states of guesses out.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from glm_jax import ops
from glm_jax.attention import Pages
from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.kernels import PLAIN_KERNELS, Kernels
from glm_jax.layers import Linear, RMSNorm
from glm_jax.model import DecoderLayers, Weights, abstract_weights, bind, specs_of
from glm_jax.operands import Workspace
from glm_jax.ops import NormedRows
from glm_jax.sharding import WeightSpec

# The layer's weights stand among the model's under this prefix of their dotted paths.
PREFIX = "mtp."


class MtpLayer(nnx.Module):
    """Norms and joins a token's embedding with the hidden state before it, then one decoder layer.

    Embedding and head are the decoder's own. The entry of position i in the layer's cache is made of
    token i and of the hidden state of position i - 1, so it depends on no token after i and is as
    good for every sequence that begins with the same tokens as the decoder's entries are.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        kernels: Kernels = PLAIN_KERNELS,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        width = config.hidden_size
        norm = ((width,), ("embed",), config.rms_norm_eps, dtype)
        self.enorm = RMSNorm(*norm, rngs=rngs)
        self.hnorm = RMSNorm(*norm, rngs=rngs)
        # Whole on every device: joining the parts of a product this small takes as long as reading it.
        self.eh_proj = Linear(
            (1, width, 2 * width), ("layers", "embed", None), dtype, is_fp8=False, rngs=rngs
        )
        self.layers = DecoderLayers(one_layer(config), dtype, kernels, rngs=rngs)
        self.norm = RMSNorm(*norm, rngs=rngs)

    def __call__(
        self,
        embedded: Float[Array, "B T D"],
        hidden: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: KVCache,
        pages: Pages,
        workspace: Workspace | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Normed states whose logits guess the token after each; they also stand in for the
        decoder's own where a further guess is made of this one.

        Args:
          embedded: the token at each position.
          hidden: the decoder's state at the position before, after its last norm.
          positions: -1 where there is nothing.
          cache: of this layer alone.
          pages: of the rows, the same as in the decoder's cache.
          workspace: of so many rows, the decoder's own.
        """
        layers = self.layers
        pages = self._prepared(pages, positions)
        entered = self._enter(embedded, hidden)
        normed, cache_after, _ = layers.attention_block(
            entered, positions, 0, cache, pages, workspace
        )
        assert cache_after is not None
        partials, _ = layers.mlp_block(normed, 0, is_dense=False, workspace=workspace)
        normed = layers.add(partials, normed.residual, self.norm, 0, workspace)
        assert normed.rows.plain is not None
        return normed.rows.plain.reshape(hidden.shape), cache_after

    def remember(
        self,
        embedded: Float[Array, "B T D"],
        hidden: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: KVCache,
        pages: Pages,
    ) -> KVCache:
        """What __call__ leaves in the cache, for tokens after which nothing is to be guessed."""
        rows = self._enter(embedded, hidden).rows
        pages = self._prepared(pages, positions)
        return self.layers.self_attn.store(rows, positions, 0, cache, pages)

    def _prepared(self, pages: Pages, positions: Int32[Array, "B T"]) -> Pages:
        prepared = self.layers.self_attn.prepare(pages, positions)
        assert isinstance(prepared, Pages)
        return prepared

    def _enter(self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T D"]) -> NormedRows:
        joined = jnp.concatenate([self.enorm(embedded, None), self.hnorm(hidden, None)], -1)
        flat = joined.reshape(-1, joined.shape[-1])
        with jax.named_scope("eh_proj"):
            return self.layers.enter(ops.matmul(flat, *self.eh_proj.weights(), None, 0), 0)


def one_layer(config: ModelConfig) -> ModelConfig:
    """The config of a decoder that is a single expert layer."""
    return replace(config, num_hidden_layers=1, first_k_dense_replace=0)


def abstract_mtp(
    config: ModelConfig, dtype: DTypeLike, kernels: Kernels = PLAIN_KERNELS
) -> MtpLayer:
    """The layer with shapes in place of arrays."""
    return nnx.eval_shape(lambda: MtpLayer(config, jnp.dtype(dtype), kernels, rngs=nnx.Rngs(0)))


def weight_specs(config: ModelConfig, dtype: np.dtype, *, with_mtp: bool) -> dict[str, WeightSpec]:
    """Every weight of the model, by its dotted path, and those of the MTP layer where it is used.

    Raises:
      ValueError: the layer is wanted and the model has none.
    """
    specs = abstract_weights(config, dtype)
    if not with_mtp:
        return specs
    if not config.num_nextn_predict_layers:
        raise ValueError("the model has no MTP layer: its num_nextn_predict_layers is 0")
    own = specs_of(abstract_mtp(config, dtype))
    return specs | {PREFIX + path: spec for path, spec in own.items()}


def bind_mtp(layer: MtpLayer, weights: Weights) -> MtpLayer:
    """The layer holding its weights, taken from among all; `layer` may be abstract.

    Raises:
      KeyError: a weight is missing.
    """
    start = len(PREFIX)
    return bind(layer, {path[start:]: w for path, w in weights.items() if path.startswith(PREFIX)})
