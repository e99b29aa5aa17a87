"""From logits to the next token, on device, each row by its own parameters and its own seed.

Knows no requests. A row's choice depends on its logits, parameters, seed, position and history alone:
never on the rows beside it. What no row of a batch asks for is not computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt32

# Addends of each column of a sum: with so many, two stages leave 37 columns of GLM-4.7's vocabulary.
_ADDENDS = 64


class SamplingRows(NamedTuple):
    """Sampling parameters of a batch, one entry a row.

    Attributes:
      temperature: 0 means greedy.
      top_p: 1 means off. top_k: 0 means off. min_p: 0 means off.
      seed: the two halves of the request's seed.
      position: index the sampled token will have in its sequence; it tells the draws of one request
        apart, so that a draw does not depend on how the request was scheduled.
    """

    temperature: Float32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    seed: UInt32[Array, "B 2"]
    position: Int32[Array, " B"]


class Adjustments(NamedTuple):
    """What changes the logits of a batch before a token is chosen, one entry a row.

    Attributes:
      frequency, presence: taken from a token's logit, per occurrence in the completion and once.
      repetition: logarithm of what divides the logit of any token of prompt or completion.
      prompt_length: position of the completion's first token.
      num_biases, num_bans: how many of `tokens` have a bias, and how many after them are banned.
      min_length: the position from which nothing is banned any more.
      is_masked: 1 where `mask` holds.
      tokens, biases, mask: see CONTROL_TOKENS, CONTROL_BIASES and CONTROL_MASK in shapes.py.
    """

    frequency: Float32[Array, " B"]
    presence: Float32[Array, " B"]
    repetition: Float32[Array, " B"]
    prompt_length: Int32[Array, " B"]
    num_biases: Int32[Array, " B"]
    num_bans: Int32[Array, " B"]
    min_length: Int32[Array, " B"]
    is_masked: Int32[Array, " B"]
    tokens: Int32[Array, "B biases"]
    biases: Float32[Array, "B biases"]
    mask: Int32[Array, "B words"]


def adjust(
    logits: Float32[Array, "B V"],
    rows: Adjustments,
    position: Int32[Array, " B"],
    history: Callable[[], Int32[Array, "B S"]],
) -> Float32[Array, "B V"]:
    """The logits to choose from: penalties, then biases and bans, then the mask.

    Args:
      position: of the token to be chosen.
      history: each row's tokens by position; what stands at `position` or later is ignored.
    """
    is_penalized = (rows.frequency != 0) | (rows.presence != 0) | (rows.repetition != 0)

    def penalize(logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        return jnp.where(
            is_penalized[:, None], _penalized(logits, rows, position, history()), logits
        )

    def bias(logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        return _biased(logits, rows, position)

    def mask(logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        bits = (rows.mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None, :]) & 1
        allowed = bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1
        return jnp.where(allowed | (rows.is_masked == 0)[:, None], logits, -jnp.inf)

    asked = [
        (is_penalized.any(), penalize),
        ((rows.num_biases + rows.num_bans > 0).any(), bias),
    ]
    if rows.mask.shape[1]:  # none: compiled for requests that have none
        asked.append(((rows.is_masked > 0).any(), mask))

    def all_that_is_asked(logits: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        for is_asked, change in asked:
            logits = lax.cond(is_asked, change, lambda x: x, logits)
        return logits

    # A branch that changes nothing is a copy of the logits: one, not three.
    is_any = jnp.stack([is_asked for is_asked, _ in asked]).any()
    return lax.cond(is_any, all_that_is_asked, lambda x: x, logits)


def _penalized(
    logits: Float32[Array, "B V"],
    rows: Adjustments,
    position: Int32[Array, " B"],
    history: Int32[Array, "B S"],
) -> Float32[Array, "B V"]:
    places = jnp.arange(history.shape[1], dtype=jnp.int32)[None, :]
    is_past = places < position[:, None]
    is_completion = is_past & (places >= rows.prompt_length[:, None])
    row = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
    token = jnp.where(is_past, history, logits.shape[1])  # out of range: dropped
    nothing = jnp.zeros(logits.shape, jnp.int32)
    is_seen = nothing.at[row, token].max(1, mode="drop") > 0
    count = nothing.at[row, token].add(is_completion.astype(jnp.int32), mode="drop")
    factor = jnp.exp(rows.repetition)[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(is_seen, repeated, logits)
    logits -= rows.frequency[:, None] * count.astype(jnp.float32)
    return logits - jnp.where(count > 0, rows.presence[:, None], 0.0)


def _biased(
    logits: Float32[Array, "B V"], rows: Adjustments, position: Int32[Array, " B"]
) -> Float32[Array, "B V"]:
    index = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None, :]
    is_bias = index < rows.num_biases[:, None]
    is_ban = ~is_bias & (index < (rows.num_biases + rows.num_bans)[:, None])
    is_ban &= (position < rows.min_length)[:, None]
    token = jnp.where(is_bias | is_ban, rows.tokens, logits.shape[1])  # out of range: dropped
    row = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
    return logits.at[row, token].add(jnp.where(is_ban, -jnp.inf, rows.biases), mode="drop")


def top_logprobs(
    logits: Float32[Array, "B V"], wanted: Int32[Array, " B"], number: int
) -> tuple[Int32[Array, "{number} B"], Float32[Array, "{number} B"]]:
    """The likeliest tokens under the unmodified distribution, the likeliest first, if any row wants some.

    Args:
      wanted: how many each row asks for.
      number: how many all get.
    """

    def top() -> tuple[Int32[Array, "{number} B"], Float32[Array, "{number} B"]]:
        values, tokens = lax.top_k(logits, number)
        logprobs = values - log_sum_exp(logits)[:, None]
        return tokens.astype(jnp.int32).T, logprobs.T

    return lax.cond((wanted > 0).any(), top, lambda: no_logprobs(len(logits), number))


def no_logprobs(
    num_rows: int, number: int
) -> tuple[Int32[Array, "{number} B"], Float32[Array, "{number} B"]]:
    """What top_logprobs returns where no row wants any."""
    shape = (number, num_rows)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)


def sample(
    logits: Float32[Array, "B V"], rows: SamplingRows
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """The next token of each row, and its log-probability."""
    tokens = pick(logits, rows)
    return tokens, logprobs_of(logits, tokens)


def pick(logits: Float32[Array, "B V"], rows: SamplingRows) -> Int32[Array, " B"]:
    """A token for each row, drawn as its parameters say.

    Order: temperature, then min_p, then top_k, then top_p over what is left; candidates equal to the
    last one kept are kept too.
    """
    greedy = likeliest(logits)
    is_random = rows.temperature > 0

    def draw() -> Int32[Array, " B"]:
        # Measured from the best, so that the least temperature overflows downward only.
        below = logits - logits.max(axis=-1, keepdims=True)
        kept = _filter(below / jnp.where(is_random, rows.temperature, 1.0)[:, None], rows)
        return likeliest(kept + _gumbel(rows, logits.shape[-1]))

    drawn = lax.cond(is_random.any(), draw, lambda: greedy)
    return jnp.where(is_random, drawn, greedy)


def likeliest(logits: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    """The first of each row's largest."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def logprobs_of(logits: Float32[Array, "B V"], tokens: Int32[Array, " B"]) -> Float32[Array, " B"]:
    """The tokens' log-probabilities under the unmodified distribution."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - log_sum_exp(logits)


def log_sum_exp(logits: Float32[Array, "B V"]) -> Float32[Array, " B"]:
    """What a row's logits are to be lowered by to be log-probabilities."""
    largest = logits.max(axis=-1)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    return jnp.log(_sums(lambda x: jnp.exp(x - largest[:, None]), logits)) + largest


def _sums(of: Callable[..., Array], *rows: Array) -> Float32[Array, " B"]:
    """Sums of of(*rows) along rows [B, V], in an order that is written here.

    XLA's own order depends on what it fuses a sum with, which differs from one number of rows to
    another: so did the last bit of log-probabilities, in 67 of 843 answers that an H200 gave in company.

    Args:
      of: knows each element by itself.
    """
    num_columns = rows[0].shape[1]
    width = -(-num_columns // _ADDENDS)
    addends = []
    for first in range(0, num_columns, width):
        # Cut first: what is made of whole rows XLA would write to memory.
        made = of(*(x[:, first : first + width] for x in rows))
        addends.append(jnp.pad(made, ((0, 0), (0, width - made.shape[1]))))
    while len(addends) > 1:
        pairs = zip(addends[::2], addends[1::2], strict=False)
        addends = [a + b for a, b in pairs] + addends[len(addends) // 2 * 2 :]
    if width == 1:
        return addends[0][:, 0]
    # In memory: each of these is added up again.
    return _sums(lambda x: x, lax.optimization_barrier(addends[0]))


def _gumbel(rows: SamplingRows, vocab_size: int) -> Float32[Array, "B V"]:
    """Gumbel noise per row: adding it and taking the largest draws from the softmax."""

    def noise(seed: UInt32[Array, "2"], position: Int32[Array, ""]) -> Float32[Array, " V"]:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,))

    return jax.vmap(noise)(rows.seed, rows.position)


def _filter(scaled: Float32[Array, "B V"], rows: SamplingRows) -> Float32[Array, "B V"]:
    """Sets to -inf what min_p, top_k and top_p leave out."""
    largest = scaled.max(axis=-1, keepdims=True)
    floor = jnp.where(rows.min_p > 0, jnp.log(rows.min_p), -jnp.inf)
    scaled = jnp.where(scaled >= largest + floor[:, None], scaled, -jnp.inf)

    def keep_top_k(scaled: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        wanted = jnp.where(rows.top_k > 0, rows.top_k, scaled.shape[-1]).astype(jnp.float32)
        return _keep_heaviest(scaled, jnp.ones_like(scaled), wanted)

    def keep_top_p(scaled: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        # A top_p that rounds to 0 still keeps the best.
        wanted = jnp.maximum(rows.top_p, jnp.finfo(jnp.float32).tiny)
        log_shares = scaled - log_sum_exp(scaled)[:, None]
        kept = _keep_heaviest(scaled, jnp.exp(log_shares), wanted)
        # A mass of 1 might never be reached by a rounded sum.
        return jnp.where((rows.top_p < 1)[:, None], kept, scaled)

    scaled = lax.cond((rows.top_k > 0).any(), keep_top_k, lambda s: s, scaled)
    return lax.cond((rows.top_p < 1).any(), keep_top_p, lambda s: s, scaled)


def _keep_heaviest(
    scores: Float32[Array, "B V"], weight: Float32[Array, "B V"], wanted: Float32[Array, " B"]
) -> Float32[Array, "B V"]:
    """Keeps the highest scores, as few as weigh `wanted` together; the rest become -inf.

    Finds the threshold bit by bit in the order-preserving integer form of a float: 32 sums over the
    row in place of a sort, which is slow over a vocabulary of 150 000.
    """
    keys = _ordered_bits(scores)

    def settle(index: Int32[Array, ""], threshold: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        candidate = threshold | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        enough = _weight_from(keys, weight, candidate) >= wanted
        return jnp.where(enough, candidate, threshold)

    threshold = lax.fori_loop(0, 32, settle, jnp.zeros(scores.shape[:1], jnp.uint32))
    return jnp.where(keys >= threshold[:, None], scores, -jnp.inf)


def _weight_from(
    keys: UInt32[Array, "B V"], weight: Float32[Array, "B V"], threshold: UInt32[Array, " B"]
) -> Float32[Array, " B"]:
    return _sums(lambda key, w: jnp.where(key >= threshold[:, None], w, 0.0), keys, weight)


def _ordered_bits(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Integers in the same order as the floats: -inf is smallest."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    is_negative = (bits >> 31) == 1
    return jnp.where(is_negative, ~bits, bits | jnp.uint32(0x80000000))
