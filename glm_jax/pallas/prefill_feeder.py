"""Brings tiles of keys and values to shared memory in passing: the two warpgroups that multiply do it.

Knows neither queries nor what is made of the tiles. A warpgroup of its own would leave those that
multiply too few registers, unless setmaxnreg shared them out; and that is ignored in code that is
compiled to be linked, as jax 0.12 does by nvJitLink (docs/kernel-log.md).

Whatever is brought is brought while the other warpgroup's products are made. Plain pages are copied where
they are used, by the second warpgroup, which is the last to have read what was there. FP8 pages land
apart: the first warpgroup widens values, a tile before it needs them, and the second keys, a tile
before anybody does.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.pallas.prefill_producer import Item, ItemAt, Source, silence
from glm_jax.pallas.widen import widen

STAGES = 2
_KEYS, _VALUES = range(2)


class Course(NamedTuple):
    """A CTA's tiles from an item's first on.

    Attributes:
      turn: the item's.
      begun: tiles of the CTA that were before.
      item: the item.
    """

    turn: Array
    begun: Array
    item: Item


class Ahead(NamedTuple):
    """What a warpgroup that widens knows of the tiles it brings next.

    Attributes:
      is_coming: whether the next one is on its way.
      pages: of the one after it, the first of them -1 where there is none; of which KV head.
    """

    is_coming: Array
    pages: list[Array]
    kv_head: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Feeder(Source):
    """What both ways have in common. There are STAGES of tiles; who has read one arrives at `empty`.

    Attributes:
      warpgroup: which of the two this is.
      num_turns, item_at: the CTA's items.
    """

    warpgroup: Array
    num_turns: Array
    item_at: ItemAt

    def _pages_of(self, course: Course, index: Array | int) -> tuple[list[Array], Array]:
        """Of tile `index` from the item's first on, at most two past its last: and its KV head.

        The first page is -1 where there is none. What a table has past a row's last position is fetched,
        and not seen.
        """
        none = jnp.int32(-1), jnp.int32(0), jnp.int32(0)

        def find(turn: Array, item: Item, count: Array, index: Array, depth: int) -> Any:
            def later() -> Any:
                if depth == STAGES + 1:
                    return none
                # Items see ever less: where one has no tiles, none after it has.
                following = self.item_at(turn + 1)
                is_one = turn + 1 < self.num_turns
                others = jnp.where(is_one, self.num_tiles(following), 0)
                return lax.cond(
                    others > 0,
                    lambda: find(turn + 1, following, others, index - count, depth + 1),
                    lambda: none,
                )

            here = jnp.asarray(item.row), jnp.asarray(item.kv_head), index
            return lax.cond(index < count, lambda: here, later)

        index = jnp.asarray(index, jnp.int32)
        row, kv_head, place = find(course.turn, course.item, self.num_tiles(course.item), index, 0)
        per_tile = self._tile // self._page_size
        places = [
            jnp.minimum(place * per_tile + i, self.pages_per_row - 1) for i in range(per_tile)
        ]
        pages = self._found(jnp.maximum(row, 0), places)
        return [jnp.where(row < 0, -1, pages[0]), *pages[1:]], kv_head

    def _await_values(self, course: Course, index: Array) -> None:
        plgpu.barrier_wait(self.full[_VALUES].at[lax.rem(course.begun + index, STAGES)])

    def _last_values(self, course: Course) -> tuple[Any, Array]:
        """The item's last tile of values, and the last row of it that a query sees."""
        index = self.num_tiles(course.item) - 1
        slot = lax.rem(course.begun + index, STAGES)
        return self.tiles[_VALUES].at[slot], course.item.last - index * self._tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Copier(Feeder):
    """Tiles that need no widening.

    Attributes:
      silenced: two, arrived at when an item's last values are.
    """

    silenced: Any

    def begin(self, course: Course) -> tuple[()]:
        """Brings a CTA's first tiles."""
        for index in range(STAGES):
            for which in (_KEYS, _VALUES):
                pl.when(self.warpgroup == 1)(
                    lambda index=index, which=which: self._bring(which, course, jnp.int32(index))
                )
        return ()

    def before_products(self, course: Course, index: Array, ahead: Any) -> Any:
        del course, index
        return ahead

    def before_values(self, course: Course, index: Array, ahead: Any) -> None:
        del ahead
        self._await_values(course, index)

    def after_keys(self, course: Course, index: Array) -> None:
        self._after(_KEYS, course, index)

    def after_values(self, course: Course, index: Array) -> None:
        self._after(_VALUES, course, index)

    def before_last(self, course: Course, ahead: Any) -> Any:
        # By the first warpgroup, which is ahead of the other one, by less than two items.
        silenced = self.silenced.at[lax.rem(course.turn, 2)]

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            silence(*self._last_values(course))
            plgpu.commit_smem()
            plgpu.barrier_arrive(silenced)

        pl.when(self.warpgroup > 0)(lambda: plgpu.barrier_wait(silenced))
        return ahead

    def _after(self, which: int, course: Course, index: Array) -> None:
        """Says that the first warpgroup has read a tile, or brings what takes its place."""
        empty = self.empty[which].at[lax.rem(course.begun + index, STAGES)]
        pl.when(self.warpgroup == 0)(lambda: plgpu.barrier_arrive(empty))
        pl.when(self.warpgroup == 1)(lambda: self._bring(which, course, index + STAGES))

    def _bring(self, which: int, course: Course, index: Array) -> None:
        count = course.begun + index
        pages, kv_head = self._pages_of(course, index)
        slot = lax.rem(count, STAGES)

        @pl.when(pages[0] >= 0)
        def _() -> None:
            # That this warpgroup itself has read what was there, it makes sure of before any copy.
            self._await_empty(which, count)
            tile, full = self.tiles[which].at[slot], self.full[which].at[slot]
            self._fetch(which, pages, kv_head, tile, full)


@dataclass(frozen=True, slots=True, kw_only=True)
class Widener(Feeder):
    """FP8 tiles.

    Attributes:
      narrow: they land here, [2, tile, 128], keys and values.
      landed: of keys and of values.
    """

    narrow: Any
    landed: Any

    def begin(self, course: Course) -> Ahead:
        """Brings a CTA's first tiles."""
        (first, kv_head), (second, its_head) = (self._pages_of(course, index) for index in range(2))

        @pl.when((self.warpgroup == 0) & (first[0] >= 0))
        def _() -> None:
            self._start(_VALUES, first, kv_head)

        @pl.when((self.warpgroup == 1) & (first[0] >= 0))
        def _() -> None:
            self._start(_KEYS, first, kv_head)
            plgpu.barrier_wait(self.landed.at[_KEYS])
            self._widen(_KEYS, course.begun)

            @pl.when(second[0] >= 0)
            def _() -> None:
                self._start(_KEYS, second, its_head)
                plgpu.barrier_wait(self.landed.at[_KEYS])

        is_coming = (self.warpgroup == 0) | (second[0] >= 0)
        return Ahead(is_coming, *self._pages_of(course, 1 + self.warpgroup))

    def before_products(self, course: Course, index: Array, ahead: Ahead) -> Ahead:
        ahead = self._bring(course, index, ahead, is_last=False)
        # Nothing is before an item's first values.
        pl.when(index > 0)(lambda: self._await_values(course, index + 1))
        return ahead

    def before_values(self, course: Course, index: Array, ahead: Ahead) -> None:
        del course, index
        landed = self.landed.at[jnp.where(self.warpgroup == 0, _VALUES, _KEYS)]
        pl.when(ahead.is_coming)(lambda: plgpu.barrier_wait(landed))

    def after_keys(self, course: Course, index: Array) -> None:
        plgpu.barrier_arrive(self.empty[_KEYS].at[lax.rem(course.begun + index, STAGES)])

    def after_values(self, course: Course, index: Array) -> None:
        plgpu.barrier_arrive(self.empty[_VALUES].at[lax.rem(course.begun + index, STAGES)])

    def before_last(self, course: Course, ahead: Ahead) -> Ahead:
        index = self.num_tiles(course.item)
        ahead = self._bring(course, index, ahead, is_last=True)
        self._await_values(course, index + 1)
        return ahead

    def _bring(self, course: Course, index: Array, ahead: Ahead, *, is_last: bool) -> Ahead:
        """Widens values of the tile before `index`, or keys of the one after it, which have landed."""
        of_values = (self.warpgroup == 0) & (is_last or index > 0)
        of_keys = jnp.bool_(False) if is_last else self.warpgroup == 1

        @pl.when(of_values)
        def _() -> None:
            count = course.begun + index - 1
            self._await_empty(_VALUES, count)
            self._widen(_VALUES, count, course if is_last else None)
            pl.when(ahead.pages[0] >= 0)(lambda: self._start(_VALUES, *ahead[1:]))

        if not is_last:

            @pl.when(of_keys & ahead.is_coming)
            def _() -> None:
                count = course.begun + index + 1
                self._await_empty(_KEYS, count)
                self._widen(_KEYS, count)
                pl.when(ahead.pages[0] >= 0)(lambda: self._start(_KEYS, *ahead[1:]))

        def following() -> Ahead:
            # Asked for a tile ahead, so that no copy waits for them.
            return Ahead(
                ahead.pages[0] >= 0, *self._pages_of(course, index + 1 + 2 * self.warpgroup)
            )

        return lax.cond(of_values | of_keys, following, lambda: ahead)

    def _start(self, which: int, pages: list[Array], kv_head: Array) -> None:
        self._fetch(which, pages, kv_head, self.narrow.at[which], self.landed.at[which])

    def _widen(self, which: int, count: Array, course_ended: Course | None = None) -> None:
        slot = lax.rem(count, STAGES)
        widen(self.narrow.at[which], self.tiles[which].at[slot], interpret=self.interpret)
        if course_ended is not None:
            silence(*self._last_values(course_ended))
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full[which].at[slot])
