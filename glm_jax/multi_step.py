"""Several decode steps in one program: the host is asked once for all of them.

Knows neither requests nor what a decode step does: it repeats one until every row has ended.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from glm_jax import shapes as columns
from glm_jax.cache import KVCache
from glm_jax.phases import Slots

Batch = Int32[Array, "B columns"]
Decode = Callable[[KVCache, Slots, Batch], tuple[KVCache, Slots, Int32[Array, "outputs B"]]]
Outputs = Int32[Array, "steps outputs B"]


def decode_steps(
    decode: Decode, cache: KVCache, slots: Slots, batch: Batch, num_steps: int
) -> tuple[KVCache, Slots, Outputs]:
    """Decodes each row for as many steps as its NUM_TOKENS says, at most num_steps, or to a stop token.

    A row that has ended is a padding row of the steps that others still need; after the last row's
    end no step is run. So a row's tokens are those of single steps, bit by bit.

    Args:
      decode: one decode step, as phases.decode.

    Returns:
      Besides cache and slots what each step returned; tokens are NO_TOKEN where a row had ended.
    """
    num_tokens = batch[:, columns.NUM_TOKENS]
    slot = jnp.minimum(batch[:, columns.SLOT], len(slots.tokens) - 1)
    outputs = jnp.full((num_steps, columns.NUM_OUTPUTS, len(batch)), columns.NO_TOKEN, jnp.int32)

    def is_needed(carry: tuple[Array, Array, KVCache, Slots, Array]) -> Bool[Array, ""]:
        step, is_live, *_ = carry
        return (step < num_steps) & is_live.any()

    def advance(
        carry: tuple[Array, Array, KVCache, Slots, Array],
    ) -> tuple[Array, Array, KVCache, Slots, Array]:
        step, is_live, cache, slots, outputs = carry
        rows = batch.at[:, columns.NUM_TOKENS].set(is_live.astype(jnp.int32))
        fed = slots.tokens[slot]
        cache, slots, output = decode(cache, slots, rows)
        tokens = output[columns.OUTPUT_TOKENS]
        told = jnp.where(is_live, tokens, columns.NO_TOKEN)
        output = output.at[columns.OUTPUT_TOKENS].set(told)
        outputs = lax.dynamic_update_index_in_dim(outputs, output, step, 0)
        # What was fed is a stop token where the host has yet to read of the end: one step is enough.
        is_live &= (step + 1 < num_tokens) & ~_is_stop(batch, tokens) & ~_is_stop(batch, fed)
        return step + 1, is_live, cache, slots, outputs

    start = (jnp.int32(0), num_tokens > 0, cache, slots, outputs)
    _, _, cache, slots, outputs = lax.while_loop(is_needed, advance, start)
    return cache, slots, outputs


def _is_stop(batch: Batch, tokens: Int32[Array, " B"]) -> Bool[Array, " B"]:
    stops = batch[:, columns.STOP_TOKENS]
    is_one = jnp.arange(stops.shape[1])[None, :] < batch[:, columns.NUM_STOPS, None]
    return (is_one & (stops == tokens[:, None])).any(axis=1)
