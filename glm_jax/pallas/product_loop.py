"""A product's walk over tiles and steps, and the two roles that any chip has in it: feeding and finishing.

Knows no instruction that multiplies; fp8_product says which threads play which role.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm_jax.pallas.chip import Chip
from glm_jax.pallas.tiling import TuningConfig

# What multiplies the rows that a warpgroup has of a tile: (block of them, first token, tokens) to the
# products of each half.
Products = Callable[[int, int, int], list[jax.Array]]
# Tiles whose scales may be under way: more than the ring's stages span where K is two steps short.
SCALE_SLOTS = 4
# M of wgmma; a warpgroup with more rows multiplies them block by block.
WGMMA_ROWS = 64


@dataclass(frozen=True, slots=True)
class Streams:
    """What a caller says of its tiles; a place is whatever its own locate returns.

    Attributes:
      num_tiles: how many tiles there are, on the host or int32[].
      look_up: what must be read from memory to locate a tile, of any index: it is asked for one tile ahead.
      locate: the place of a tile, from its index and what look_up said of it.
      num_steps: steps along K at a place.
      fetch_weights: copies the weights of (place, step) to one of a stage's refs, one a swizzle, on
        barrier.
      fetch_tokens: the same of tokens.
      fetch_row_scales, fetch_token_scales: copy the scales of a place to a slot, on barrier.
      finish: what becomes of (slot, row, first, products), float32[rows, count] of products that holds
        the same for each half, for the rows from row on of a stage and the tokens from first on of a tile.
      send: stores what was staged of (place, warpgroup, first, staged), from a tile's first token on.
      is_narrow: whether a place's operands are those of the narrower swizzle, where a ring has both.
      await_tokens: holds a warp until tokens are there: then they are fed by a warp of their own.
    """

    num_tiles: jax.Array | int
    look_up: Callable[[jax.Array], Any]
    locate: Callable[[jax.Array, Any], Any]
    num_steps: Callable[[Any], jax.Array | int]
    fetch_weights: Callable[[Any, jax.Array, list[Any], Any], None]
    fetch_tokens: Callable[[Any, jax.Array, list[Any], Any], None]
    fetch_row_scales: Callable[[Any, jax.Array, Any], None]
    fetch_token_scales: Callable[[Any, jax.Array, Any], None]
    finish: Callable[[jax.Array, jax.Array | int, int, list[jax.Array]], jax.Array]
    send: Callable[[Any, jax.Array, int, Any], None]
    is_narrow: Callable[[Any], jax.Array] | None = None
    await_tokens: Callable[[], None] | None = None


class Loop:
    """The walk over tiles and steps that all roles of a CTA share."""

    def __init__(
        self,
        chip: Chip,
        config: TuningConfig,
        num_ctas: int,
        streams: Streams,
        scratch: Mapping[str, Any],
    ) -> None:
        self.config = config
        is_sm90 = chip.architecture == "sm90"
        self.block_rows = WGMMA_ROWS if is_sm90 else config.rows
        # Products come out of tensor memory in pieces that fit registers.
        self.block_tokens = config.store_tokens if is_sm90 else min(config.store_tokens, 64)
        self.num_ctas = num_ctas
        self.streams = streams
        self.scratch = scratch
        # The ring as each swizzle sees it: weights and tokens.
        self.rings: list[Any] = [*scratch["ring"]]
        self.halves = self.rings[0][0].shape[1]

    def over_tiles(self, visit: Callable[[jax.Array, Any, jax.Array], None]) -> None:
        """Calls visit(number of the tile in this CTA, place, steps before it)."""
        cta = lax.axis_index("cta")
        num_tiles = jnp.int32(self.streams.num_tiles)
        count = lax.div(num_tiles - cta + self.num_ctas - 1, jnp.int32(self.num_ctas))

        def step(number: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            first_step, known = carry
            following = self.streams.look_up(cta + (number + 1) * self.num_ctas)
            place = self.streams.locate(cta + number * self.num_ctas, known)
            visit(number, place, first_step)
            return first_step + self.streams.num_steps(place), following

        lax.fori_loop(0, count, step, (jnp.int32(0), self.streams.look_up(cta)))

    def stage(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.config.stages))

    def weights(self, ring: Any, stage: jax.Array, rows: int) -> Any:
        """A stage of a ring of weights: [halves, rows, step]; of a compact one, so many rows from its first."""
        if not self.config.is_compact:
            return ring.at[stage]
        return ring.at[0, :, pl.ds(stage * self.config.tile_rows, rows)]

    def full(self, number: jax.Array, stage: jax.Array) -> Any:
        """The barrier of those who read a stage of a tile."""
        if self.config.takes_turns:
            stage = stage + self.turn(number) * self.config.stages
        return self.scratch["full"].at[stage]

    def turn(self, number: jax.Array) -> jax.Array:
        """The warpgroup whose turn a tile is, where they take turns."""
        return lax.rem(number, jnp.int32(self.config.warpgroups))

    def feed(self, *, weights: bool = True, tokens: bool = True) -> None:
        """Keeps every stage of the ring under way, or one operand of it with its scales."""
        empty, streams = self.scratch["empty"], self.streams
        fetches = [
            *([(0, streams.fetch_weights, streams.fetch_row_scales)] if weights else []),
            *([(1, streams.fetch_tokens, streams.fetch_token_scales)] if tokens else []),
        ]
        scales_full, scales_empty = self.scratch["scales_full"], self.scratch["scales_empty"]

        def feed_tile(number: jax.Array, place: Any, first_step: jax.Array) -> None:
            slot = lax.rem(number, jnp.int32(SCALE_SLOTS))

            @pl.when(number >= SCALE_SLOTS)
            def _():
                plgpu.barrier_wait(scales_empty.at[slot])

            def feed_step(index: jax.Array, _: None) -> None:
                step = first_step + index
                stage = self.stage(step)

                @pl.when(step >= self.config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                full = self.full(number, stage)
                for operand, fetch, _scales in fetches:
                    refs = [
                        ring[1].at[stage]
                        if operand
                        else self.weights(ring[0], stage, self.config.tile_rows)
                        for ring in self.rings
                    ]
                    fetch(place, index, refs, full)

                # Scales are wanted last, but must not wait for the ring to come round.
                @pl.when(index == 0)
                def _():
                    for *_, fetch_scales in fetches:
                        fetch_scales(place, slot, scales_full.at[slot])

            lax.fori_loop(0, self.streams.num_steps(place), feed_step, None)

        self.over_tiles(feed_tile)

    def finish(
        self, number: jax.Array, place: Any, warpgroup: jax.Array, products: Products
    ) -> None:
        """Rounds, stages and sends a tile's products."""
        slot = lax.rem(number, jnp.int32(SCALE_SLOTS))
        staged = self.scratch["staged"].at[warpgroup]
        plgpu.barrier_wait(self.scratch["scales_full"].at[slot])
        first_row, rows, count = (
            self.config.first_row(warpgroup),
            self.block_rows,
            self.block_tokens,
        )
        for sent in range(0, self.config.tokens, self.config.store_tokens):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for block in range(self.config.rows // rows):
                for first in range(0, self.config.store_tokens, count):
                    row, token = first_row + block * rows, sent + first
                    values = self.streams.finish(slot, row, token, products(block, token, count))
                    part = staged.at[pl.ds(first, count), pl.ds(block * rows, rows)]
                    part.transpose((1, 0))[...] = values.astype(jnp.bfloat16)
            if sent + self.config.store_tokens == self.config.tokens:
                plgpu.barrier_arrive(self.scratch["scales_empty"].at[slot])
            plgpu.commit_smem()
            self.streams.send(place, warpgroup, sent, staged)
