"""The multi-token-prediction layer as it is trained: one expert layer that guesses one token further.

Knows no speculation: it reads the decoder's hidden states of known text.
"""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from glm_jax import ops
from glm_jax.attention import Attend
from glm_jax.config import ModelConfig
from glm_jax.layers import Linear, RMSNorm
from glm_jax.model import DecoderLayers
from glm_jax.moe import Routing


class Draft(nnx.Module):
    """norms and joins the next token's embedding with the hidden state, then one decoder layer.

    Shares the embedding and the head with the decoder. Its weights' names are the checkpoint's.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        norm = ((width,), ("embed",), config.rms_norm_eps, dtype)
        self.enorm = RMSNorm(*norm, rngs=rngs)
        self.hnorm = RMSNorm(*norm, rngs=rngs)
        self.eh_proj = Linear(
            (1, width, 2 * width), ("layers", "embed", None), dtype, is_fp8=False, rngs=rngs
        )
        self.layers = DecoderLayers(one_layer(config), dtype, rngs=rngs)
        self.norm = RMSNorm(*norm, rngs=rngs)

    def __call__(
        self,
        embedded_next: Float[Array, "B T D"],
        hidden: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        attend: Attend,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Normed states whose logits guess the token after the next; and the router's choices.

        Args:
          embedded_next: the embedding of the token after each position.
          hidden: the decoder's states, after its last norm.
        """
        joined = jnp.concatenate([self.enorm(embedded_next, None), self.hnorm(hidden, None)], -1)
        flat = joined.reshape(-1, joined.shape[-1])
        x = ops.matmul(flat, *self.eh_proj.weights(), None, 0)
        normed, *_ = self.layers.attention_block(
            self.layers.enter(x, 0), positions, 0, None, attend
        )
        partials, routing = self.layers.mlp_block(normed, 0, is_dense=False)
        normed = self.layers.add(partials, normed.residual, self.norm, 0)
        assert routing is not None and normed.rows.plain is not None
        return normed.rows.plain.reshape(hidden.shape), routing


def one_layer(config: ModelConfig) -> ModelConfig:
    """The config of a decoder that is a single expert layer."""
    return replace(config, num_hidden_layers=1, first_k_dense_replace=0)
