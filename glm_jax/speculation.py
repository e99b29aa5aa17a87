"""Steps that guess: drafts from the MTP layer, verified by the decoder in the step that draws them.

Knows neither the layer's weights nor requests. A decode step gives each row between one token and
1 + num_drafts tokens.

Why answers are those of no speculation, whatever the drafts are: the token at a position is a function
of the logits there, of the row's parameters, its seed and the position (see sampling.py), and of
nothing else. The decoder computes this token for the position after the newest token and after each
draft; a row keeps these tokens up to the first that differs from the draft fed in its place, for behind
it the logits were those of another text. So a draft decides how many tokens a step may keep, never
which. This holds bit by bit, as far as a row's bits depend on that row alone, greedy or sampled; and a
token that is drawn as before is distributed as before. It is rejection sampling in which target and
draft are coupled by the same noise: a draft takes part in the draw of its own position with the MTP
layer's logits in place of the decoder's, and so agrees with it more often than an independent one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from glm_jax import shapes as columns
from glm_jax.attention import Pages
from glm_jax.cache import KVCache, cache_spec
from glm_jax.config import ModelConfig
from glm_jax.model import Glm4Moe
from glm_jax.mtp import MtpLayer, one_layer
from glm_jax.operands import Workspace
from glm_jax.phases import (
    Drafting,
    PromptRows,
    Slots,
    StepResult,
    choose,
    forward,
    newest_of,
    page_table,
    prompt_rows,
    remember,
    run_prompt,
    sampling_rows,
)
from glm_jax.sampling import likeliest, pick
from glm_jax.shapes import StepShapes
from glm_jax.sharding import WeightSpec


class Models(NamedTuple):
    """The decoder, and the layer that guesses what it will say."""

    decoder: Glm4Moe
    mtp: MtpLayer


def drafting_specs(
    config: ModelConfig, shapes: StepShapes, dtype: np.dtype, kv_dtype: np.dtype
) -> Drafting:
    """What each array of Drafting is, before it is."""
    size = (shapes.num_slots, shapes.tokens_per_step, config.hidden_size)
    count = WeightSpec((shapes.num_slots,), np.dtype(np.int32), (None,))
    cache = cache_spec(one_layer(config), shapes, kv_dtype)
    hidden = WeightSpec(size, np.dtype(dtype), (None, None, "embed"))
    return Drafting(hidden, count, count, KVCache(cache, cache))  # type: ignore[arg-type]


def prefill(
    models: Models,
    cache: KVCache,
    slots: Slots,
    controls: Int32[Array, "slots control_columns"],
    batch: Int32[Array, "B columns"],
    pages_per_sequence: int,
) -> StepResult:
    """phases.prefill, which also makes the MTP layer's entries and keeps the last hidden states."""
    prompt = prompt_rows(batch, pages_per_sequence)
    result, hidden = run_prompt(models.decoder, cache, slots, controls, batch, prompt)
    cache, slots, output = result
    assert slots.drafting is not None
    drafting = _follow_prompt(models, slots.drafting, batch, prompt, hidden)
    return cache, slots._replace(drafting=drafting), output


def _follow_prompt(
    models: Models,
    drafting: Drafting,
    batch: Int32[Array, "B columns"],
    prompt: PromptRows,
    hidden: Float[Array, "B T D"],
) -> Drafting:
    """Entries for every token of the prompt; after what no step of this slot fed, of zeros."""
    slot, start = batch[:, columns.SLOT], batch[:, columns.START]
    num_tokens = batch[:, columns.NUM_TOKENS]
    newest, ends = newest_of(hidden, num_tokens), start + num_tokens
    # A long chunk fills several rows, each of which goes on where the one before it ends.
    goes_on = (slot[1:] == slot[:-1]) & (start[1:] == ends[:-1]) & (num_tokens[1:] > 0)
    follows, is_followed = jnp.pad(goes_on, (1, 0)), jnp.pad(goes_on, (0, 1))
    own = jnp.minimum(slot, len(drafting.ends) - 1)
    is_known = (drafting.ends[own] == start) & (start > 0)
    kept = jnp.where(is_known[:, None], drafting.hidden[own, -1], 0)
    before = jnp.where(follows[:, None], jnp.roll(newest, 1, axis=0), kept)
    shifted = jnp.concatenate([before[:, None], hidden[:, :-1]], axis=1)
    embedded = models.decoder.embed_tokens.embed(prompt.tokens)
    cache = models.mtp.remember(
        embedded, shifted, prompt.positions, drafting.cache, Pages(prompt.table)
    )
    is_end = (num_tokens > 0) & ~is_followed
    kept_in = jnp.where(is_end, slot, len(drafting.ends))  # out of range: dropped
    return Drafting(
        hidden=drafting.hidden.at[kept_in, -1].set(newest, mode="drop"),
        num_hidden=drafting.num_hidden.at[kept_in].set(1, mode="drop"),
        ends=drafting.ends.at[kept_in].set(ends, mode="drop"),
        cache=cache,
    )


def decode(
    models: Models,
    cache: KVCache,
    slots: Slots,
    controls: Int32[Array, "slots control_columns"],
    batch: Int32[Array, "B columns"],
    pages_per_sequence: int,
) -> tuple[KVCache, Slots, Int32[Array, "tokens_per_step outputs B"]]:
    """Guesses how each row goes on, and keeps of the decoder's own tokens those that say the same,
    and the one after them; a row gains no more than its NUM_TOKENS.

    A draft heeds temperature and filters, not penalties, biases and bans: where these matter, guesses
    are worse. A mask is for the first token alone, so a row that has one must not ask for more.
    """
    assert slots.drafting is not None
    table = page_table(batch, pages_per_sequence)
    slot = jnp.minimum(batch[:, columns.SLOT], len(slots.tokens) - 1)
    places = jnp.arange(slots.drafting.hidden.shape[1])[None]
    fits = places < batch[:, columns.NUM_TOKENS, None]
    positions = jnp.where(fits, slots.lengths[slot][:, None] + places, -1)
    workspace = models.decoder.workspace(positions.size)
    with jax.named_scope("draft"):
        drafts, draft_cache = _draft(models, slots, batch, slot, positions, table, workspace)
    tokens = jnp.concatenate([slots.tokens[slot][:, None], drafts], axis=1)
    slots = remember(slots, table, positions, tokens)
    hidden, cache, output = _verify(
        models.decoder, cache, slots, controls, batch, tokens, positions, table, workspace
    )
    targets = output[:, columns.OUTPUT_TOKENS].T
    is_right = (drafts == targets[:, :-1]) & fits[:, 1:]
    num_gained = 1 + jnp.cumprod(is_right.astype(jnp.int32), axis=1).sum(1)
    is_gained = fits & (places < num_gained[:, None])
    output = output.at[:, columns.OUTPUT_TOKENS].set(
        jnp.where(is_gained, targets, columns.NO_TOKEN).T
    )
    slots = _advance(slots, batch, targets, hidden, num_gained, draft_cache)
    return cache, slots, output


def _draft(
    models: Models,
    slots: Slots,
    batch: Int32[Array, "B columns"],
    slot: Int32[Array, " B"],
    positions: Int32[Array, "B tokens_per_step"],
    table: Int32[Array, "B P"],
    workspace: Workspace | None,
) -> tuple[Int32[Array, "B drafts"], KVCache]:
    """A chain of guesses: each takes the token guessed before it, and the state that guessed it."""
    decoder, mtp = models

    def guess(state: Float[Array, "B D"], position: Int32[Array, " B"]) -> Int32[Array, " B"]:
        return decoder.choose(state, (batch, position + 1), draw)

    state, cache = _follow_up(models, slots, slot, positions[:, 0], table, workspace)
    drafts = [guess(state, positions[:, 0])]
    # No loop: XLA would make it a graph within the step's, where CUDA lets nothing be conditional.
    for place in range(1, positions.shape[1] - 1):
        position = positions[:, place]
        embedded = decoder.embed_tokens.embed(drafts[-1])
        states, cache = mtp(
            embedded[:, None], state[:, None], position[:, None], cache, Pages(table)
        )
        state = states[:, 0]
        drafts.append(guess(state, position))
    return jnp.stack(drafts, axis=1), cache


def draw(
    logits: Float[Array, "B V"], batch: Int32[Array, "B columns"], position: Int32[Array, " B"]
) -> Int32[Array, " B"]:
    """A guess for each row's position."""
    is_drawn = (batch[:, columns.TEMPERATURE] != 0).any()
    # What only a drawn token takes is computed in its branch.
    return lax.cond(
        is_drawn, lambda: pick(logits, sampling_rows(batch, position)), lambda: likeliest(logits)
    )


def _follow_up(
    models: Models,
    slots: Slots,
    slot: Int32[Array, " B"],
    length: Int32[Array, " B"],
    table: Int32[Array, "B P"],
    workspace: Workspace | None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """The MTP layer's state after the newest token, and its cache with entries of all tokens up to it.

    Where the last step kept drafts, their entries are those of guessed states, or are not there: they
    are made again of the decoder's, in rows beside the newest token's. So a step's layers, this one too,
    are of as many rows, and can share memory.
    """
    decoder, mtp = models
    drafting = slots.drafting
    assert drafting is not None
    hidden = drafting.hidden[slot]
    num_rows, per_row, width = hidden.shape
    behind = per_row - 1 - jnp.arange(per_row)[None]  # positions before the newest token's
    is_missing = behind < jnp.maximum(drafting.num_hidden[slot], 1)[:, None]
    positions = jnp.where(is_missing & (length >= 0)[:, None], length[:, None] - behind, -1)
    page_size = slots.history.shape[1]
    page = jnp.take_along_axis(table, jnp.maximum(positions, 0) // page_size, axis=1)
    tokens = slots.history[page, positions % page_size].at[:, -1].set(slots.tokens[slot])
    embedded = decoder.embed_tokens.embed(tokens.reshape(-1, 1))
    rows = hidden.reshape(-1, 1, width), positions.reshape(-1, 1)
    pages = Pages(table, per_row)
    states, cache = mtp(embedded, *rows, drafting.cache, pages, workspace)
    return states.reshape(num_rows, per_row, width)[:, -1], cache


def _verify(
    decoder: Glm4Moe,
    cache: KVCache,
    slots: Slots,
    controls: Int32[Array, "slots control_columns"],
    batch: Int32[Array, "B columns"],
    tokens: Int32[Array, "B tokens_per_step"],
    positions: Int32[Array, "B tokens_per_step"],
    table: Int32[Array, "B P"],
    workspace: Workspace | None,
) -> tuple[Float[Array, "B tokens_per_step D"], KVCache, Int32[Array, "tokens_per_step outputs B"]]:
    """What decode would say after each token, given those before it in its row.

    Every token has a row of its own, so that a row's bits are those of a decode step without drafts:
    in each layer all rows' keys and values are stored before any query attends to them.
    """
    num_rows, per_row = tokens.shape
    wide, wide_table = (jnp.repeat(x, per_row, axis=0) for x in (batch, table))
    flat = positions.reshape(-1)
    rows = tokens.reshape(-1, 1), flat[:, None]
    pages = Pages(table, per_row)
    hidden, cache = forward(decoder, *rows, cache, pages, workspace)
    output = choose(decoder, slots, controls, wide, hidden[:, 0], flat + 1, wide_table)
    output = output.reshape(-1, num_rows, per_row).transpose(2, 0, 1)
    return hidden.reshape(num_rows, per_row, -1), cache, output


def _advance(
    slots: Slots,
    batch: Int32[Array, "B columns"],
    targets: Int32[Array, "B tokens_per_step"],
    hidden: Float[Array, "B tokens_per_step D"],
    num_gained: Int32[Array, " B"],
    draft_cache: KVCache,
) -> Slots:
    """The slots after a step whose rows gained so many tokens."""
    drafting = slots.drafting
    assert drafting is not None
    num_slots, per_row = drafting.hidden.shape[:2]
    is_valid = batch[:, columns.NUM_TOKENS] > 0
    slot = jnp.where(is_valid, batch[:, columns.SLOT], num_slots)  # out of range: dropped
    lengths = slots.lengths[jnp.minimum(slot, num_slots - 1)] + num_gained
    newest = jnp.take_along_axis(targets, num_gained[:, None] - 1, axis=1)[:, 0]
    # In: 2 of 3 states are of kept tokens. Out: states [0, 0, 1], the newest last.
    order = jnp.maximum(num_gained[:, None] - per_row + jnp.arange(per_row)[None], 0)
    states = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
    return slots._replace(
        tokens=slots.tokens.at[slot].set(newest, mode="drop"),
        lengths=slots.lengths.at[slot].set(lengths, mode="drop"),
        drafting=Drafting(
            hidden=drafting.hidden.at[slot].set(states, mode="drop"),
            num_hidden=drafting.num_hidden.at[slot].set(num_gained, mode="drop"),
            ends=drafting.ends.at[slot].set(lengths, mode="drop"),
            cache=draft_cache,
        ),
    )
