"""Prefill and decode as pure functions: what a step does on the device, whatever compiles it.

Knows no requests and no mesh: a step is a function of weights, cache, slots, controls and one int32
array whose columns shapes.py names. The sampled token stays in `Slots` for the next step and is
returned besides.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from glm_jax import shapes as columns
from glm_jax.attention import Pages
from glm_jax.cache import KVCache
from glm_jax.model import Glm4Moe
from glm_jax.operands import Workspace
from glm_jax.sampling import (
    Adjustments,
    SamplingRows,
    adjust,
    likeliest,
    logprobs_of,
    no_logprobs,
    pick,
    top_logprobs,
)


class Drafting(NamedTuple):
    """What the MTP layer needs to guess how a slot goes on. It decides guesses, never answers.

    Attributes:
      hidden: the decoder's normed states of the last positions that a step fed, the newest last.
      num_hidden: of these, the newest ones, after whose positions the layer's cache has no entry yet.
      ends: the position after the newest state's; the chunk of a prompt that starts there follows it.
      cache: the layer's own, of the same pages.
    """

    hidden: Float[Array, "slots tokens_per_step D"]
    num_hidden: Int32[Array, " slots"]
    ends: Int32[Array, " slots"]
    cache: KVCache


class Slots(NamedTuple):
    """What the device remembers of each slot between steps.

    Attributes:
      tokens: the last sampled token, whose keys and values are not in the cache yet.
      lengths: positions the sequence has in the cache.
      history: which token stands at each position of the cache. By page, as keys and values are, so
        that a sequence finds its whole past there too when it shares or recomputes a part of it.
      drafting: what speculation needs; None where there is none.
    """

    tokens: Int32[Array, " slots"]
    lengths: Int32[Array, " slots"]
    history: Int32[Array, "pages page_size"]
    drafting: Drafting | None = None


StepResult = tuple[KVCache, Slots, Int32[Array, "outputs B"]]


def prefill(
    model: Glm4Moe,
    cache: KVCache,
    slots: Slots,
    controls: Int32[Array, "slots control_columns"],
    batch: Int32[Array, "B columns"],
    pages_per_sequence: int,
) -> StepResult:
    """Runs each row's chunk of a prompt; rows that end their prompt sample and fill their slot."""
    prompt = prompt_rows(batch, pages_per_sequence)
    result, _ = run_prompt(model, cache, slots, controls, batch, prompt)
    return result


class PromptRows(NamedTuple):
    """What the rows of a prefill step feed; position -1 where a row is shorter than its tile."""

    tokens: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]
    table: Int32[Array, "B P"]


def prompt_rows(batch: Int32[Array, "B columns"], pages_per_sequence: int) -> PromptRows:
    """The rows of a prefill batch."""
    tokens = batch[:, columns.NUM_FIELDS + pages_per_sequence :]
    offsets = jnp.arange(tokens.shape[1])
    is_valid = offsets[None, :] < batch[:, columns.NUM_TOKENS, None]
    positions = jnp.where(is_valid, batch[:, columns.START, None] + offsets[None, :], -1)
    return PromptRows(tokens, positions, page_table(batch, pages_per_sequence))


def run_prompt(
    model: Glm4Moe,
    cache: KVCache,
    slots: Slots,
    controls: Int32[Array, "slots control_columns"],
    batch: Int32[Array, "B columns"],
    prompt: PromptRows,
) -> tuple[StepResult, Float[Array, "B T D"]]:
    """prefill, and the normed hidden states of all it fed."""
    start, num_tokens = batch[:, columns.START], batch[:, columns.NUM_TOKENS]
    tokens, positions, table = prompt
    slots = remember(slots, table, positions, tokens)
    hidden, cache = forward(model, tokens, positions, cache, Pages(table))
    newest = newest_of(hidden, num_tokens)
    lengths = start + num_tokens
    is_last = (batch[:, columns.IS_LAST] == 1) & (num_tokens > 0)
    result = _finish(model, cache, slots, controls, batch, newest, lengths, is_last, table)
    return result, hidden


def newest_of(hidden: Float[Array, "B T D"], num_tokens: Int32[Array, " B"]) -> Float[Array, "B D"]:
    """The state of each row's last token."""
    last = jnp.maximum(num_tokens - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]


def decode(
    model: Glm4Moe,
    cache: KVCache,
    slots: Slots,
    controls: Int32[Array, "slots control_columns"],
    batch: Int32[Array, "B columns"],
    pages_per_sequence: int,
) -> StepResult:
    """Feeds each row's last token and samples the next one."""
    table = page_table(batch, pages_per_sequence)
    slot = jnp.minimum(batch[:, columns.SLOT], slots.tokens.shape[0] - 1)
    is_valid = batch[:, columns.NUM_TOKENS] > 0
    positions = jnp.where(is_valid, slots.lengths[slot], -1)
    tokens = slots.tokens[slot]
    slots = remember(slots, table, positions[:, None], tokens[:, None])
    hidden, cache = forward(model, tokens[:, None], positions[:, None], cache, Pages(table))
    length = positions + 1
    return _finish(model, cache, slots, controls, batch, hidden[:, 0], length, is_valid, table)


def remember(
    slots: Slots,
    table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
    tokens: Int32[Array, "B T"],
) -> Slots:
    """Writes which tokens a step feeds; position -1 writes nothing."""
    num_pages, page_size = slots.history.shape
    page = jnp.take_along_axis(table, jnp.maximum(positions, 0) // page_size, axis=1)
    page = jnp.where(positions >= 0, page, num_pages)
    history = slots.history.at[page, positions % page_size].set(tokens, mode="drop")
    return slots._replace(history=history)


def page_table(batch: Int32[Array, "B columns"], pages_per_sequence: int) -> Int32[Array, "B P"]:
    """The pages of each row."""
    return batch[:, columns.NUM_FIELDS : columns.NUM_FIELDS + pages_per_sequence]


def forward(
    model: Glm4Moe,
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "B T"],
    cache: KVCache,
    pages: Pages,
    workspace: Workspace | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """The normed last hidden states; keys and values are in the cache."""
    hidden, cache_after, _ = model(tokens, positions, cache, pages, workspace)
    assert cache_after is not None
    return hidden, cache_after


def _finish(
    model: Glm4Moe,
    cache: KVCache,
    slots: Slots,
    controls: Int32[Array, "slots control_columns"],
    batch: Int32[Array, "B columns"],
    hidden: Float[Array, "B D"],
    lengths: Int32[Array, " B"],
    is_kept: Array,
    table: Int32[Array, "B P"],
) -> StepResult:
    """Samples a token for every row and keeps those of the rows that have one to keep."""
    output = choose(model, slots, controls, batch, hidden, lengths, table)
    # Rows with nothing to keep name a slot out of range, which the scatter drops.
    slot = jnp.where(is_kept, batch[:, columns.SLOT], slots.tokens.shape[0])
    slots = slots._replace(
        tokens=slots.tokens.at[slot].set(output[columns.OUTPUT_TOKENS], mode="drop"),
        lengths=slots.lengths.at[slot].set(lengths, mode="drop"),
    )
    return cache, slots, output


def choose(
    model: Glm4Moe,
    slots: Slots,
    controls: Int32[Array, "slots control_columns"],
    batch: Int32[Array, "B columns"],
    hidden: Float[Array, "B D"],
    lengths: Int32[Array, " B"],
    table: Int32[Array, "B P"],
) -> Int32[Array, "outputs B"]:
    """A token after each row's hidden state, for position `lengths`, and what is told of it."""
    with jax.named_scope("sample"):
        rows = batch, lengths, table
        return model.choose(hidden, rows, partial(_choose, slots.history, controls))


def _choose(
    tokens_of: Int32[Array, "pages page_size"],
    controls: Int32[Array, "slots control_columns"],
    logits: Float[Array, "B V"],
    batch: Int32[Array, "B columns"],
    lengths: Int32[Array, " B"],
    table: Int32[Array, "B P"],
) -> Int32[Array, "outputs B"]:
    def history() -> Int32[Array, "B S"]:
        return tokens_of[table].reshape(len(table), -1)

    def as_asked() -> tuple[Array, Array, Array]:
        adjusted = adjust(logits, _adjustments(batch, controls), lengths, history)
        tokens = pick(adjusted, sampling_rows(batch, lengths))
        wanted = batch[:, columns.NUM_LOGPROBS]
        return tokens, *top_logprobs(logits, wanted, columns.MAX_TOP_LOGPROBS)

    def greedily() -> tuple[Array, Array, Array]:
        return likeliest(logits), *no_logprobs(len(logits), columns.MAX_TOP_LOGPROBS)

    # Each branch of its own costs a step some 5 us, and one that changes logits a copy of them.
    is_asked = (batch[:, jnp.array(columns.ASKS)] != 0).any()
    tokens, top_tokens, top = lax.cond(is_asked, as_asked, greedily)
    logprobs = logprobs_of(logits, tokens)
    return jnp.concatenate([tokens[None], _bits(logprobs)[None], top_tokens, _bits(top)])


def _bits(x: Float[Array, "..."]) -> Int32[Array, "..."]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _adjustments(
    batch: Int32[Array, "B columns"], controls: Int32[Array, "slots control_columns"]
) -> Adjustments:
    # Padding rows name the slot after the last; they get the last one's, and heed nothing of it.
    own = controls[jnp.minimum(batch[:, columns.SLOT], len(controls) - 1)]

    def floats(bits: Array) -> Array:
        return lax.bitcast_convert_type(bits, jnp.float32)

    return Adjustments(
        frequency=floats(batch[:, columns.FREQUENCY_PENALTY]),
        presence=floats(batch[:, columns.PRESENCE_PENALTY]),
        repetition=floats(batch[:, columns.REPETITION_PENALTY]),
        prompt_length=batch[:, columns.PROMPT_LENGTH],
        num_biases=batch[:, columns.NUM_BIASES],
        num_bans=batch[:, columns.NUM_BANS],
        min_length=batch[:, columns.MIN_LENGTH],
        is_masked=batch[:, columns.IS_MASKED],
        tokens=own[:, columns.CONTROL_TOKENS],
        biases=floats(own[:, columns.CONTROL_BIASES]),
        mask=own[:, columns.CONTROL_MASK],
    )


def sampling_rows(batch: Int32[Array, "B columns"], position: Int32[Array, " B"]) -> SamplingRows:
    """How the token at a position is drawn in each row."""

    def floats(column: int) -> Array:
        return lax.bitcast_convert_type(batch[:, column], jnp.float32)

    seed = batch[:, jnp.array([columns.SEED_HIGH, columns.SEED_LOW])]
    return SamplingRows(
        temperature=floats(columns.TEMPERATURE),
        top_p=floats(columns.TOP_P),
        min_p=floats(columns.MIN_P),
        top_k=batch[:, columns.TOP_K],
        seed=lax.bitcast_convert_type(seed, jnp.uint32),
        position=position,
    )
