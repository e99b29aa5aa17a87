"""How often the MTP layer guesses what the model then says: its acceptance as a drafter.

Knows no speculation: it reads text that the model has already said, and what it would have drafted
at every place of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

from checkpoints.dequantize import Arrays, dequantized, read
from checkpoints.nano_training.draft import Draft, one_layer
from checkpoints.reader import Checkpoint
from glm_jax import ops
from glm_jax.attention import Attend, attend_causal
from glm_jax.config import ModelConfig
from glm_jax.model import Glm4Moe, abstract_model
from glm_jax.sharding import make_mesh

NUM_DRAFTED = 3
_ROWS = 16
_LENGTH_STEP = 256


@dataclass(frozen=True, slots=True)
class Generated:
    """A prompt and what the model greedily said to it, as tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def acceptance(
    directory: Path, config: ModelConfig, texts: Sequence[Generated]
) -> tuple[float, ...]:
    """The share of places where the first, the first two, the first three drafts were all right.

    Places are those of the answers that have as many tokens after them.

    Args:
      directory: a checkpoint with an MTP layer.
      config: its own.
    """
    plain = replace(config, is_fp8=False)
    with Checkpoint(directory) as checkpoint:
        decoder = _filled(abstract_model(plain, jnp.bfloat16), dequantized(checkpoint, plain, {}))
        draft = _filled(
            nnx.eval_shape(lambda: Draft(plain, jnp.dtype(jnp.bfloat16), rngs=nnx.Rngs(0))),
            _draft_arrays(checkpoint, plain),
        )
    guess = _guess_function(decoder, draft)
    right, places = np.zeros(NUM_DRAFTED), np.zeros(NUM_DRAFTED)
    for tokens, batch in _batches(texts):
        guesses = np.asarray(guess(tokens))
        for row, text in enumerate(batch):
            right_here, places_here = count_accepted(guesses[:, row], text)
            right += right_here
            places += places_here
    return tuple((right / np.maximum(places, 1)).tolist())


def count_accepted(guesses: np.ndarray, text: Generated) -> tuple[np.ndarray, np.ndarray]:
    """Counts of right drafts and of places, by number of drafted tokens.

    guesses[n - 1, i] is the n-th drafted token of a chain, fed token i + 1: a guess at token i + 2.
    """
    tokens = np.array(text.prompt + text.answer)
    right, places = np.zeros(NUM_DRAFTED), np.zeros(NUM_DRAFTED)
    first = len(text.prompt) - 1  # the chain that starts with the answer's first token
    for drafted in range(1, NUM_DRAFTED + 1):
        starts = np.arange(first, len(tokens) - 1 - drafted)
        is_right = np.ones(len(starts), bool)
        for n in range(drafted):
            is_right &= guesses[n, starts + n] == tokens[starts + n + 2]
        right[drafted - 1] += is_right.sum()
        places[drafted - 1] += len(starts)
    return right, places


def _batches(texts: Sequence[Generated]) -> list[tuple[np.ndarray, Sequence[Generated]]]:
    """Rows of like length together, padded to few different lengths."""
    ordered = sorted(texts, key=lambda text: len(text.prompt) + len(text.answer))
    batches = []
    for start in range(0, len(ordered), _ROWS):
        batch = ordered[start : start + _ROWS]
        longest = len(batch[-1].prompt) + len(batch[-1].answer)
        tokens = np.zeros((_ROWS, -(-longest // _LENGTH_STEP) * _LENGTH_STEP), np.int32)
        for row, text in enumerate(batch):
            both = text.prompt + text.answer
            tokens[row, : len(both)] = both
        batches.append((tokens, batch))
    return batches


def _guess_function(decoder: Glm4Moe, draft: Draft) -> jax.stages.Wrapped:
    """(tokens int32[B, T]) -> int32[NUM_DRAFTED, B, T], see count_accepted."""
    graphdef, state = nnx.split((decoder, draft))

    def guesses(state: nnx.State, tokens: Int32[Array, "B T"]) -> Int32[Array, "n B T"]:
        decoder, draft = nnx.merge(graphdef, state)
        size = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(size), tokens.shape)
        visible = jnp.broadcast_to(jnp.tril(jnp.ones((size, size), bool)), (*tokens.shape, size))
        carry, _, _ = decoder(tokens, positions, None, attend_causal(visible))
        following = decoder.embed_tokens.embed(jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))))
        drafted = []
        attend = _attend_chain()
        for n in range(NUM_DRAFTED):
            if n:
                # A later link gets, in place of the decoder's state, what the link before made.
                carry = jnp.pad(carry[:, :-1], ((0, 0), (1, 0), (0, 0)))
            carry, _ = draft(following, carry, positions, attend)
            logits = decoder.logits(carry.reshape(-1, carry.shape[-1]))
            drafted.append(logits.argmax(-1).reshape(tokens.shape))
        return jnp.stack(drafted)

    mapped = jax.shard_map(
        guesses,
        mesh=make_mesh(1),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    compiled = jax.jit(mapped)
    return jax.tree_util.Partial(compiled, state)  # pyright: ignore[reportReturnType]


def _attend_chain() -> Attend:
    """Each call is one link later in every chain at once.

    Link n sees the first links' keys of all places before its chain's second, and in the n - 1
    places after those one key of each later link: what a cache would hold.
    """
    keys: list[Array] = []
    values: list[Array] = []

    def attend(layer: object, q: Array, k: Array, v: Array, cache: None) -> tuple[Array, None]:
        del layer
        keys.append(k)
        values.append(v)
        size, last = q.shape[1], len(keys) - 1
        query, key = jnp.arange(size)[:, None], jnp.arange(size)[None]
        links = [key <= query - last] + [key == query - (last - n) for n in range(1, last + 1)]
        # The first places have no chain of this length; they see themselves, and nobody looks.
        links[0] |= (query < last) & (key == query)
        visible = jnp.broadcast_to(jnp.concatenate(links, 1), (q.shape[0], size, size * len(keys)))
        joined = jnp.concatenate(keys, 1), jnp.concatenate(values, 1)
        return ops.causal_attention(q, *joined, visible), cache

    return attend  # pyright: ignore[reportReturnType]


def _draft_arrays(checkpoint: Checkpoint, plain: ModelConfig) -> Arrays:
    prefix = f"model.layers.{plain.num_hidden_layers}"
    arrays = dequantized(checkpoint, one_layer(plain), {"model.layers.0": prefix})
    for path in ("embed_tokens.values", "lm_head.values"):
        del arrays[path]
    for norm, name in (("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "shared_head.norm")):
        arrays[f"{norm}.weight"] = read(checkpoint, f"{prefix}.{name}.weight").astype(jnp.bfloat16)
    joined = read(checkpoint, f"{prefix}.eh_proj.weight")[None]
    return arrays | {"eh_proj.values": joined.astype(jnp.bfloat16)}


def _filled[M: nnx.Module](module: M, arrays: Arrays) -> M:
    graphdef, state = nnx.split(module, nnx.Param)
    flat = [
        (path, param.replace(jnp.asarray(arrays[".".join(map(str, path))])))
        for path, param in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
