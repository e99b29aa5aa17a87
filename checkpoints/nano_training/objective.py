"""What training minimizes: the next token's loss, and the draft layer's loss one token further.

Knows the model's forward pass, not how its weights change.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32

from checkpoints.nano_training.draft import Draft
from glm_jax import ops
from glm_jax.attention import AttendHeads
from glm_jax.cache import KVCache
from glm_jax.layers import Layer
from glm_jax.model import Glm4Moe

DRAFT_LOSS_WEIGHT = 0.3
_QUERY_BLOCK = 128


class Batch(NamedTuple):
    """One step's rows; the fields are those of packing.Rows."""

    tokens: Int32[Array, "B T"]
    segments: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]
    learned: Bool[Array, "B T"]


class Measures(NamedTuple):
    """What a step tells besides its loss.

    Attributes:
      loss: mean over the learned tokens.
      accuracy: share of learned tokens that are the most likely one.
      draft_loss, draft_accuracy: the same for the draft layer's guess.
      expert_load: share of the tokens' choices that each expert got, the draft layer's last.
    """

    loss: Float32[Array, ""]
    accuracy: Float32[Array, ""]
    draft_loss: Float32[Array, ""]
    draft_accuracy: Float32[Array, ""]
    expert_load: Float32[Array, "Lm1 E"]


def objective(
    decoder: Glm4Moe, draft: Draft, batch: Batch, prompt_weight: float = 0.0
) -> tuple[Float32[Array, ""], Measures]:
    """The weighted sum of both losses, and what to watch.

    Args:
      prompt_weight: what the decoder's loss of a token that is not learned counts for.
    """
    attend = attend_within(batch.segments)
    hidden, _, trace = decoder(batch.tokens, batch.positions, None, attend, with_trace=True)
    assert trace is not None
    loss, accuracy = _loss(decoder, hidden, batch, ahead=1)
    following = decoder.embed_tokens.embed(_shifted(batch.tokens, 1))
    guess, routing = draft(following, hidden, batch.positions, attend)
    draft_loss, draft_accuracy = _loss(decoder, guess, batch, ahead=2)
    assert routing.scores is not None, "the reference routes, and it tells"
    chosen = jnp.concatenate([trace.routing.experts, routing.experts[None]])
    load = _load(chosen, batch.segments.reshape(-1) > 0, routing.scores.shape[1])
    measures = Measures(loss, accuracy, draft_loss, draft_accuracy, load)
    if prompt_weight:
        read = batch._replace(learned=~batch.learned & (batch.segments > 0))
        loss = loss + prompt_weight * _loss(decoder, hidden, read, ahead=1, share=1.0)[0]
    return loss + DRAFT_LOSS_WEIGHT * draft_loss, measures


def attend_within(segments: Int32[Array, "B T"]) -> AttendHeads:
    """Each token sees itself and the earlier ones of its own segment.

    Queries go in blocks, each over the keys up to its end only: in a long row that saves almost half
    of the scores.
    """
    num_tokens = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    visible = same & jnp.tril(jnp.ones((num_tokens, num_tokens), bool))[None]

    def attend(
        layer: Layer, q: Array, k: Array, v: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        del layer
        blocks = []
        for start in range(0, num_tokens, _QUERY_BLOCK):
            end = min(start + _QUERY_BLOCK, num_tokens)
            seen = visible[:, start:end, :end]
            blocks.append(ops.causal_attention(q[:, start:end], k[:, :end], v[:, :end], seen))
        return jnp.concatenate(blocks, axis=1), cache

    return attend


def _loss(
    decoder: Glm4Moe,
    hidden: Float[Array, "B T D"],
    batch: Batch,
    ahead: int,
    share: float = 0.5,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Mean cross-entropy and accuracy of the learned tokens that many places ahead."""
    is_same = _shifted(batch.segments, ahead) == batch.segments
    target_is_learned = _shifted(batch.learned, ahead) & is_same
    # Logits are costly and most tokens are read, not learned: only those are gathered.
    rows = int(target_is_learned.size * share)
    (index,) = jnp.nonzero(target_is_learned.reshape(-1), size=rows, fill_value=-1)
    targets = _shifted(batch.tokens, ahead).reshape(-1)[index]
    logits = decoder.logits(hidden.reshape(-1, hidden.shape[-1])[index])
    weights = (index >= 0).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (logits.argmax(-1) == targets).astype(jnp.float32)
    total = jnp.maximum(weights.sum(), 1.0)
    return (losses * weights).sum() / total, (hits * weights).sum() / total


def _shifted(x: Array, ahead: int) -> Array:
    """x[:, t + ahead] at t; zeros past the end."""
    return jnp.pad(x[:, ahead:], ((0, 0), (0, ahead)))


def _load(
    chosen: Int32[Array, "Lm1 T k"], is_real: Bool[Array, " T"], num_experts: int
) -> Float32[Array, "Lm1 E"]:
    picks = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32).sum(2)
    picks = picks * is_real.astype(jnp.float32)[None, :, None]
    counts = picks.sum(1)
    return counts / counts.sum(-1, keepdims=True)
