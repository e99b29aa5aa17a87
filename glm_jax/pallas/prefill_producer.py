"""Brings a CTA of prefill attention its tiles of keys and values: pages to shared memory, ahead of use.

A warpgroup does nothing else; where none can be spared, it is prefill_feeder.
Knows neither queries nor what is made of the tiles. FP8 pages land apart, and are widened on their way
to the tensor cores, once for all warpgroups.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.pallas.widen import widen

# Rows and columns of values in registers, of which there are few.
_AT_ONCE = 64


class Item(NamedTuple):
    """A tile of queries.

    Attributes:
      row, kv_head: whose.
      number: of the row's and head's tiles.
      least, last: of its queries' last visible positions, the least and the largest.
    """

    row: Array | int
    kv_head: Array | int
    number: Array
    least: Array
    last: Array


# The item of a CTA's turn; past the last one, any item.
ItemAt = Callable[[Array], Item]
_Pages = list[Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where tiles come from and go to.

    Attributes:
      layer: whose pages are read.
      table: int32[rows, pages per row] in device memory.
      in_order: pages are as the table would have them, one row's after the other's.
      pages: of keys and of values, [layers, pages, kv_heads, page_size, 128].
      pages_per_row: of the table or, in order, of as many pages.
      tiles: of keys and of values in shared memory, [stages, tile, 128].
      full, empty: of keys and of values, of each stage.
      interpret: the interpreter runs it.
    """

    layer: Array
    table: Any
    in_order: bool
    pages: tuple[Any, Any]
    pages_per_row: int
    tiles: tuple[Any, Any]
    full: tuple[Any, Any]
    empty: tuple[Any, Any]
    interpret: bool

    @property
    def _stages(self) -> int:
        return self.tiles[0].shape[0]

    @property
    def _tile(self) -> int:
        return self.tiles[0].shape[1]

    @property
    def _page_size(self) -> int:
        return self.pages[0].shape[3]

    def num_tiles(self, item: Item) -> Array:
        return (item.last + self._tile) // self._tile

    def _found(self, row: Array | int, places: Iterable[Array]) -> list[Array]:
        """A row's pages at those places of its own."""
        if self.in_order:
            return [row * self.pages_per_row + place for place in places]
        return [self.table[row, place] for place in places]

    def _fetch(
        self, which: int, pages: list[Array], kv_head: Array | int, smem: Any, barrier: Any
    ) -> None:
        """Copies a tile's pages of keys or of values, which the barrier tells of."""
        for i, page in enumerate(pages):
            plgpu.copy_gmem_to_smem(
                self.pages[which].at[self.layer, page, kv_head],
                smem.at[pl.ds(i * self._page_size, self._page_size)],
                barrier,
            )

    def _await_empty(self, which: int, count: Array) -> None:
        """Waits until tile `count` of all the CTA's may be written where it goes."""
        slot = lax.rem(count, self._stages)
        pl.when(count >= self._stages)(lambda: plgpu.barrier_wait(self.empty[which].at[slot]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer(Source):
    """What brings tiles.

    Attributes:
      narrow: FP8 pages land here, [2, tile, 128]; None where pages need no widening.
      landed: of FP8 keys and values, or of each stage's values.
    """

    narrow: Any
    landed: Any

    def bring(self, num_turns: Array, item_at: ItemAt) -> None:
        """Brings all tiles of a CTA's items, one after the other."""
        zero = jnp.int32(0)
        item = item_at(zero)
        if self.narrow is None:

            def visit(turn: Array, carry: Any) -> Any:
                begun, item = carry
                following = item_at(turn + 1)
                self._bring_plain(begun, item)
                return begun + self.num_tiles(item), following

            lax.fori_loop(0, num_turns, visit, (zero, item))
            return

        def visit_narrow(turn: Array, carry: Any) -> Any:
            begun, item, second = carry
            following = item_at(turn + 1)
            self._bring_narrow(begun, item, second)
            # While the others are at this item's last tiles, the next one's first are on their way.
            pl.when(turn + 1 < num_turns)(lambda: self._begin_narrow(following))
            return begun + self.num_tiles(item), following, self._pages_of(following, 1)

        self._begin_narrow(item)
        lax.fori_loop(0, num_turns, visit_narrow, (zero, item, self._pages_of(item, 1)))

    def _pages_of(self, item: Item, index: Array | int) -> _Pages:
        """Of tile `index`; past the item's last position, that position's."""
        last = jnp.maximum(item.last, 0)
        starts = (index * self._tile + start for start in range(0, self._tile, self._page_size))
        places = [jnp.minimum(x, last) // self._page_size for x in starts]
        return self._found(item.row, places)

    def _silence(self, index: Array, last: Array, values: Any) -> None:
        silence(values, last - index * self._tile)

    def _begin_narrow(self, item: Item) -> None:
        @pl.when(self.num_tiles(item) > 0)
        def _() -> None:
            pages = self._pages_of(item, 0)
            for which in range(2):
                self._fetch(
                    which, pages, item.kv_head, self.narrow.at[which], self.landed.at[which]
                )

    def _bring_narrow(self, begun: Array, item: Item, second: _Pages) -> None:
        """Brings FP8 tiles of an item whose first is on its way.

        Args:
          begun: tiles that were before.
          second: pages of its second tile.
        """
        num_tiles = self.num_tiles(item)

        def visit(index: Array, pages: _Pages) -> _Pages:
            slot = lax.rem(begun + index, self._stages)
            # Asked for a tile ahead, so that no copy waits for them.
            following = self._pages_of(item, index + 2)
            for which in range(2):
                narrow, landed = self.narrow.at[which], self.landed.at[which]
                wide = self.tiles[which].at[slot]
                self._await_empty(which, begun + index)
                plgpu.barrier_wait(landed)
                widen(narrow, wide, interpret=self.interpret)
                if which == 1:
                    self._silence(index, item.last, wide)
                plgpu.commit_smem()
                plgpu.barrier_arrive(self.full[which].at[slot])
                pl.when(index + 1 < num_tiles)(
                    lambda: self._fetch(which, pages, item.kv_head, narrow, landed)
                )
            return following

        lax.fori_loop(0, num_tiles, visit, second)

    def _bring_plain(self, begun: Array, item: Item) -> None:
        """Brings tiles that need no widening: keys land where they are used, and so do values."""
        num_tiles = self.num_tiles(item)
        barriers = self.full[0], self.landed

        def start(which: int, index: Array | int, pages: _Pages) -> None:
            slot = lax.rem(begun + index, self._stages)
            self._await_empty(which, begun + index)
            tile, barrier = self.tiles[which].at[slot], barriers[which].at[slot]
            self._fetch(which, pages, item.kv_head, tile, barrier)

        def visit(index: Array, pages: _Pages) -> _Pages:
            ahead = index + self._stages - 1
            pl.when(ahead < num_tiles)(lambda: start(0, ahead, pages))
            slot = lax.rem(begun + index, self._stages)
            plgpu.barrier_wait(self.landed.at[slot])
            self._silence(index, item.last, self.tiles[1].at[slot])
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.full[1].at[slot])
            # Last, since nobody is done with earlier values before these have been handed on.
            pl.when(ahead < num_tiles)(lambda: start(1, ahead, pages))
            return self._pages_of(item, ahead + 1)

        for index in range(self._stages - 1):

            @pl.when(index < num_tiles)
            def _(index: int = index) -> None:
                pages = self._pages_of(item, index)
                start(0, index, pages)
                start(1, index, pages)

        lax.fori_loop(0, num_tiles, visit, self._pages_of(item, self._stages - 1))


def silence(values: Any, last: Array) -> None:
    """Zeroes the rows of values past `last`.

    A share of 0 does not silence what another sequence left there: 0 * inf is NaN.
    """
    rows, columns = values.shape

    @pl.when(rows > last + 1)
    def _() -> None:
        parts = product(range(0, rows, _AT_ONCE), range(0, columns, _AT_ONCE))
        for start, column in parts:
            part = values.at[pl.ds(start, _AT_ONCE), pl.ds(column, _AT_ONCE)]
            some = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            key = plgpu.broadcasted_iota(jnp.int32, some.shape, 0, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(start + key <= last, some, 0)
