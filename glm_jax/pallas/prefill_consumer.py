"""What a warpgroup of prefill attention makes of its queries: scores, softmax, answers, tile by tile.

Knows neither pages nor who brings tiles of keys and values to shared memory.

On sm90 the products are wgmma's: sums are in registers, and so are queries, which shared memory, where
keys and values are read from by each warpgroup, has not the time for. While a tile's scores go through
softmax, the tensor cores add up the answers of the tile before, and what the other warpgroup has
begun: the two take turns at them. On sm100 they are tcgen05's, of twice the rows: scores,
shares and answers are in tensor memory, where the next tile's scores are made while this one's go
through softmax, and this one's answers are added up while the next one's do. There an answer is scaled
anew only when its row's maximum has grown by more than 2^8 since it last was, which is rare, and nothing
is done where that is true of no row: the bits of a row are its own either way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.pallas.widen import transforms

HEAD_DIM = 128
_SCALE = HEAD_DIM**-0.5 * math.log2(math.e)
# Below any score: a maximum that starts here, not at -inf, never makes a difference of infinities.
_LOWEST = -1e30
_GROWTH = 8.0
# Columns of answers in registers at a time: beside a tile's shares, and at the end, when they are gone.
_SCALED, _STORED = 16, 64


@dataclass(frozen=True, slots=True)
class Tiles:
    """A warpgroup's queries, and the tiles of keys and values that they see.

    Attributes:
      queries: operand[rows, 128], as `prepare` gave them.
      answers: bfloat16[rows, 128] in shared memory, theirs to write after `await_answers`.
      visible: int32[rows], each row's last position.
      keys, values: operand[stages, tile, 128] in shared memory.
      k_full, v_full: of a stage, arrived at by who fills it; k_empty, v_empty: by every warpgroup.
      num_tiles: in all; num_unmasked: that every row sees all of.
      begun: tiles of the CTA that were before these.
      warpgroup: which of them this is.
      scratch: what scratch_types made.
      feed: who brings tiles in passing, and where of their course these are; None where others do.
      ahead: what it knows of what is next.
    """

    queries: Any
    answers: Any
    await_answers: Callable[[], None]
    visible: Array
    keys: Any
    values: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any
    num_tiles: Array
    num_unmasked: Array
    begun: Array
    warpgroup: Array
    scratch: Any
    feed: "tuple[Feed, Any] | None" = None
    ahead: Any = ()

    def slot(self, index: Array) -> Array:
        return lax.rem(self.begun + index, self.keys.shape[0])

    def walk(self, visit: Any, carry: Any, first: int = 0) -> Any:
        """carry after visit(index, carry, is_masked=...) of every tile from `first` on in turn."""
        unmasked = jnp.maximum(self.num_unmasked, first)
        parts = ((first, unmasked, False), (unmasked, self.num_tiles, True))
        for start, end, is_masked in parts:
            carry = lax.fori_loop(
                start,
                end,
                lambda i, c, is_masked=is_masked: visit(i, c, is_masked=is_masked),
                carry,
            )
        return carry

    def masked(self, scores: Array, index: Array, layout: Any) -> Array:
        """Scores of tile `index`, -inf where not visible."""
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
        first = index * self.keys.shape[1]
        is_visible = first + key <= lax.broadcast_in_dim(self.visible, scores.shape, [0])
        return jnp.where(is_visible, scores, -jnp.inf)

    def inverse(self, total: Array) -> Array:
        # A row at -1 sees nothing, though the tiles before the masks did not ask.
        return jnp.where((self.visible >= 0) & (total > 0), 1.0 / total, 0.0)


class Feed(Protocol):
    """Brings tiles, called by each warpgroup that multiplies."""

    def before_products(self, course: Any, index: Array, ahead: Any) -> Any:
        """Before those of tile `index`'s keys and the values before them; returns what is ahead then."""

    def before_values(self, course: Any, index: Array, ahead: Any) -> None:
        """Holds until the values of tile `index` are here, or near."""

    def after_keys(self, course: Any, index: Array) -> None:
        """When this warpgroup has read those of tile `index`."""

    def after_values(self, course: Any, index: Array) -> None:
        """When this warpgroup has read those of tile `index`."""

    def before_last(self, course: Any, ahead: Any) -> Any:
        """Before the product of the last values; returns what is ahead then."""


class _Others:
    """Tiles that a warpgroup of its own brings."""

    def __init__(self, tiles: Tiles) -> None:
        self._tiles = tiles

    def before_products(self, course: Any, index: Array, ahead: Any) -> Any:
        del course, index
        return ahead

    def before_values(self, course: Any, index: Array, ahead: Any) -> None:
        del course, ahead
        plgpu.barrier_wait(self._tiles.v_full.at[self._tiles.slot(index)])

    def after_keys(self, course: Any, index: Array) -> None:
        del course
        plgpu.barrier_arrive(self._tiles.k_empty.at[self._tiles.slot(index)])

    def after_values(self, course: Any, index: Array) -> None:
        del course
        plgpu.barrier_arrive(self._tiles.v_empty.at[self._tiles.slot(index)])

    def before_last(self, course: Any, ahead: Any) -> Any:
        del course
        return ahead


class Wgmma:
    """sm90's form."""

    rows = 64
    tile_size = 128
    layout = plgpu.Layout.WGMMA
    # Of a thread of the producer, which may have to widen, and of one of these.
    widening_registers, registers = (56, 224), (40, 232)
    # Queries are read before answers come, so that the next ones may be on their way.
    keeps_queries = True

    def __init__(self, interpret: bool) -> None:
        self._interpret = interpret

    def scratch_types(self, warpgroups: int, tile: int, operand: Any) -> dict[str, Any]:
        """Who of two warpgroups may issue products."""
        del tile, operand
        return {"turns": plgpu.Barrier(num_barriers=2)} if warpgroups == 2 else {}

    def begin(self, scratch: dict[str, Any], warpgroup: Array) -> None:
        """Once, before anything is prepared."""
        if "turns" in scratch:
            pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(scratch["turns"].at[0]))

    def prepare(self, queries: Any, operand: Any, scratch: Any, warpgroup: Array) -> Array:
        """Queries as products take them, of bfloat16[rows, 128] in shared memory."""
        del scratch, warpgroup
        kept = plgpu.load(queries, layout=self.layout)
        if operand != jnp.bfloat16:
            kept = kept.astype(jnp.float32).astype(operand)
        # They are here before anybody says so: where they were, others come.
        kept = lax.optimization_barrier(kept)
        plgpu.commit_smem()
        return kept

    def consume(self, tiles: Tiles) -> Any:
        """Leaves the answers in `answers`; returns what is ahead then."""

        def see_nothing() -> Any:
            tiles.await_answers()
            nothing = jnp.zeros((self.rows, HEAD_DIM), jnp.bfloat16)
            tiles.answers[...] = plgpu.layout_cast(nothing, self.layout)
            return tiles.ahead

        return lax.cond(tiles.num_tiles > 0, lambda: self._attend(tiles), see_nothing)

    def _attend(self, tiles: Tiles) -> Any:
        turns, mine = tiles.scratch.get("turns"), tiles.warpgroup
        operand, (feed, course) = tiles.queries.dtype, tiles.feed or (_Others(tiles), None)

        def take_turn() -> None:
            if turns is not None:
                plgpu.barrier_wait(turns.at[mine])

        def end_turn() -> None:
            if turns is not None:
                plgpu.barrier_arrive(turns.at[1 - mine])

        def visit(index: Array, carry: Any, *, is_masked: bool) -> Any:
            largest, total, out, shares, ahead = carry
            slot, before = tiles.slot(index), tiles.slot(index - 1)
            ahead = feed.before_products(course, index, ahead)
            plgpu.barrier_wait(tiles.k_full.at[slot])
            take_turn()

            def soften(scores: Array) -> Any:
                feed.after_keys(course, index)
                new = self._soften(tiles, scores, index, largest, total, is_masked=is_masked)
                # What is made meanwhile, compilers would rather make after the wait for answers: LLVM
                # is kept from it by the barrier, ptxas by the loop that the next wait is.
                new = lax.optimization_barrier(new)
                feed.before_values(course, index, ahead)
                return new

            sums = out, shares, tiles.values.at[before]
            new, out = self._multiply(tiles, slot, sums, end_turn, soften)
            largest, total, fade, shares = new
            feed.after_values(course, index - 1)
            # Registers of a product under way may not be written: shares are rounded after it.
            out, shares = lax.optimization_barrier((out, shares))
            out = out * lax.broadcast_in_dim(fade, out.shape, [0])
            return largest, total, out, shares.astype(operand), ahead

        zero = jnp.int32(0)
        first, last = tiles.slot(zero), tiles.slot(tiles.num_tiles - 1)
        ahead = feed.before_products(course, zero, tiles.ahead)
        plgpu.barrier_wait(tiles.k_full.at[first])
        take_turn()
        scores = self._scores(tiles.queries, tiles.keys.at[first], end_turn)
        feed.after_keys(course, zero)
        nothing = _nothing(self.rows, self.layout)
        # 0, which the compiler must not know: it would make the mask's columns ahead, and fill registers.
        unknown = tiles.begun >> 31
        largest, total, _, shares = self._soften(tiles, scores, unknown, *nothing, is_masked=True)
        feed.before_values(course, zero, ahead)
        out = plgpu.layout_cast(jnp.zeros((self.rows, HEAD_DIM), jnp.float32), self.layout)
        carry = largest, total, out, shares.astype(operand), ahead
        _, total, out, shares, ahead = tiles.walk(visit, carry, first=1)
        ahead = feed.before_last(course, ahead)
        out = self._add(out, shares, tiles.values.at[last])
        feed.after_values(course, tiles.num_tiles - 1)
        out = out * lax.broadcast_in_dim(tiles.inverse(total), out.shape, [0])
        tiles.await_answers()
        tiles.answers[...] = out.astype(jnp.bfloat16)
        return ahead

    def _soften(
        self,
        tiles: Tiles,
        scores: Array,
        index: Array,
        largest: Array,
        total: Array,
        *,
        is_masked: bool,
    ) -> tuple[Array, Array, Array, Array]:
        """The maximum and the sum with tile `index`, what fades earlier answers, and shares."""
        if is_masked:
            scores = tiles.masked(scores, index, self.layout)
        new_largest = jnp.maximum(largest, scores.max(axis=1) * _SCALE)
        fade = jnp.exp2(largest - new_largest)
        along = lax.broadcast_in_dim(new_largest, scores.shape, [0])
        shares = jnp.exp2(scores * _SCALE - along)
        return new_largest, total * fade + shares.sum(axis=1), fade, shares

    def _scores(self, queries: Array, keys: Any, issued: Callable[[], None]) -> Array:
        if self._interpret:
            issued()
            return _interpreted(queries, keys, is_transposed=True)

        def product(acc: Any) -> Array:
            plgpu.wgmma(acc, queries, keys.transpose((1, 0)))
            issued()
            return acc[...]

        accumulator = plgpu.WGMMAAccumulatorRef((self.rows, keys.shape[0]), jnp.float32)
        return pl.run_scoped(product, accumulator)

    def _add(self, out: Array, shares: Array, values: Any) -> Array:
        if self._interpret:
            return out + _interpreted(shares, values)
        initial: Any = plgpu.WGMMAAccumulatorRef.init(out)
        return pl.run_state(lambda acc: plgpu.wgmma(acc, shares, values))(initial)

    def _multiply(
        self,
        tiles: Tiles,
        slot: Array,
        sums: tuple[Array, Array, Any],
        issued: Callable[[], None],
        soften: Callable[[Array], Any],
    ) -> tuple[Any, Array]:
        """soften(scores of the tile in `slot`), and meanwhile out + shares @ values, which `sums` are."""
        keys, (out, shares, values) = tiles.keys.at[slot], sums
        if self._interpret:
            new = soften(self._scores(tiles.queries, keys, issued))
            return new, self._add(out, shares, values)

        def products(scores_acc: Any, out_acc: Any) -> tuple[Any, Array]:
            out_acc[...] = out
            plgpu.wgmma(scores_acc, tiles.queries, keys.transpose((1, 0)))
            plgpu.wgmma(out_acc, shares, values)
            issued()
            new = soften(plgpu.wgmma_accumulator_load(scores_acc, wait_n=1))
            return new, plgpu.wgmma_accumulator_load(out_acc, wait_n=0)

        return pl.run_scoped(
            products,
            plgpu.WGMMAAccumulatorRef((self.rows, keys.shape[0]), jnp.float32),
            plgpu.WGMMAAccumulatorRef((self.rows, HEAD_DIM), jnp.float32),
        )


class Tcgen05:
    """sm100's form, which the interpreter knows every instruction of."""

    rows = 128
    tile_size = 64
    layout = plgpu.Layout.TCGEN05
    widening_registers = registers = 104, 200
    keeps_queries = False

    def __init__(self, interpret: bool) -> None:
        del interpret

    def scratch_types(self, warpgroups: int, tile: int, operand: Any) -> dict[str, Any]:
        """A part of each for every warpgroup."""
        done = plgpu.Barrier(num_barriers=warpgroups, orders_tensor_core=True)
        shares = plgpu.TMEM((self.rows, warpgroups * tile), operand, packed=True)
        return {
            "scores": plgpu.TMEM((self.rows, warpgroups * tile), jnp.float32),
            "shares": shares,
            "out": plgpu.TMEM((self.rows, warpgroups * HEAD_DIM), jnp.float32),
            "scores_done": done,
            "out_done": done,
        } | self._operands(warpgroups, operand)

    def _operands(self, warpgroups: int, operand: Any) -> dict[str, Any]:
        if operand == jnp.bfloat16:
            return {}
        shape = (warpgroups, self.rows, HEAD_DIM)
        return {"queries": plgpu.SMEM(shape, operand, transforms=transforms(operand))}

    def begin(self, scratch: dict[str, Any], warpgroup: Array) -> None:
        """Once, before anything is prepared."""
        del scratch, warpgroup

    def prepare(self, queries: Any, operand: Any, scratch: Any, warpgroup: Array) -> Any:
        """Queries as products take them, of bfloat16[rows, 128] in shared memory."""
        if operand == jnp.bfloat16:
            return queries
        prepared = scratch["queries"].at[warpgroup]
        for start in range(0, HEAD_DIM, _STORED):
            part = pl.ds(start, _STORED)
            some = plgpu.load(queries.at[:, part], layout=self.layout)
            prepared[:, part] = some.astype(jnp.float32).astype(operand)
        plgpu.commit_smem()
        return prepared

    def consume(self, tiles: Tiles) -> Any:
        """Leaves the answers in `answers`; returns what is ahead then."""
        tile, number = tiles.keys.shape[1], tiles.warpgroup
        part = pl.ds(number * tile, tile)
        scores, shares = (tiles.scratch[name].at[:, part] for name in ("scores", "shares"))
        out = tiles.scratch["out"].at[:, pl.ds(number * HEAD_DIM, HEAD_DIM)]

        def columns(start: int, width: int) -> Any:
            return tiles.scratch["out"].at[:, pl.ds(number * HEAD_DIM + start, width)]

        scores_done = tiles.scratch["scores_done"].at[number]
        out_done = tiles.scratch["out_done"].at[number]

        def start_scores(index: Array) -> None:
            slot = tiles.slot(index)
            plgpu.barrier_wait(tiles.k_full.at[slot])
            keys = tiles.keys.at[slot].transpose((1, 0))
            plgpu.tcgen05_mma(scores, tiles.queries, keys, scores_done, accumulate=False)

        def visit(index: Array, carry: Any, *, is_masked: bool) -> Any:
            largest, total = carry
            slot = tiles.slot(index)
            plgpu.barrier_wait(scores_done)
            plgpu.barrier_arrive(tiles.k_empty.at[slot])
            mine = plgpu.async_load_tmem(scores, layout=self.layout)
            plgpu.wait_load_tmem()
            pl.when(index + 1 < tiles.num_tiles)(lambda: start_scores(index + 1))
            mine = mine * _SCALE
            if is_masked:
                mine = tiles.masked(mine, index, self.layout)
            # A maximum of long ago still serves, as long as shares stay below 2^8.
            highest = mine.max(axis=1)
            new_largest = jnp.where(highest > largest + _GROWTH, highest, largest)
            fade = jnp.exp2(largest - new_largest)
            mine = jnp.exp2(mine - lax.broadcast_in_dim(new_largest, mine.shape, [0]))
            total = total * fade + mine.sum(axis=1)

            @pl.when(index > 0)
            def _() -> None:
                plgpu.barrier_wait(out_done)
                plgpu.barrier_arrive(tiles.v_empty.at[tiles.slot(index - 1)])

                @pl.when(jnp.min(fade) < 1.0)
                def _() -> None:
                    for start in range(0, HEAD_DIM, _SCALED):
                        some = columns(start, _SCALED)
                        old = plgpu.async_load_tmem(some, layout=self.layout)
                        along = lax.broadcast_in_dim(fade, old.shape, [0])
                        plgpu.async_store_tmem(some, old * along)

            plgpu.async_store_tmem(shares, mine.astype(tiles.queries.dtype))
            plgpu.commit_tmem()
            plgpu.barrier_wait(tiles.v_full.at[slot])
            values = tiles.values.at[slot]
            plgpu.tcgen05_mma(out, shares, values, out_done, accumulate=index > 0)
            return new_largest, total

        @pl.when(tiles.num_tiles > 0)
        def _() -> None:
            start_scores(jnp.int32(0))

        _, total = tiles.walk(visit, _nothing(self.rows, self.layout))

        @pl.when(tiles.num_tiles > 0)
        def _() -> None:
            plgpu.barrier_wait(out_done)
            inverse = tiles.inverse(total)
            for start in range(0, HEAD_DIM, _STORED):
                attended = plgpu.async_load_tmem(columns(start, _STORED), layout=self.layout)
                attended = attended * lax.broadcast_in_dim(inverse, attended.shape, [0])
                tiles.answers[:, pl.ds(start, _STORED)] = attended.astype(jnp.bfloat16)

        @pl.when(tiles.num_tiles == 0)
        def _() -> None:
            nothing = jnp.zeros((self.rows, HEAD_DIM), jnp.bfloat16)
            tiles.answers[...] = plgpu.layout_cast(nothing, self.layout)

        return tiles.ahead


def _nothing(rows: int, layout: Any) -> tuple[Array, Array]:
    """The maximum and the sum of a softmax over no keys."""
    row_layout = layout.reduce(1)
    return (
        plgpu.layout_cast(jnp.full((rows,), _LOWEST, jnp.float32), row_layout),
        plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), row_layout),
    )


def _interpreted(a: Array, memory: Any, *, is_transposed: bool = False) -> Array:
    """a @ b in float32, where the interpreter does not know the instruction as used here."""
    b = memory[...].astype(jnp.float32)
    # Unlike the instruction's, these reads are not among those that copies are ordered with.
    plgpu.commit_smem()
    return jnp.dot(a.astype(jnp.float32), b.T if is_transposed else b)
