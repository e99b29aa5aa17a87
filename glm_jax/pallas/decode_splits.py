"""Attention to one CTA's positions of a row: its pages come, and partial answers go.

Knows neither what becomes of partial answers nor who else makes some. Pages come by TMA, a tile ahead;
the warps share out a tile's keys, keep a softmax and a sum each (warp_products), and add them up in their
order once a leaf. Two tokens of a row have each of these for themselves, and only tiles in common. The same
code serves sm90 and sm100.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fragmented
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Array

from glm_jax.pallas import last_arrival
from glm_jax.pallas.decode_cut import (
    HEAD_DIM,
    SCALE,
    Answers,
    Cut,
    fold,
    load,
    nothing,
    put,
    store,
    where_below,
)
from glm_jax.pallas.decode_write import NewTokens
from glm_jax.pallas.warp_products import ROWS, WarpProducts

# Not put off, moved or left out.
_LOAD = "ld.global.b32 $0, [$1];"
_SCALAR = plgpu.Layout.WG_SPLAT


class Inputs(NamedTuple):
    """What there is to read, in device memory."""

    q: Any
    layer: Any
    page_table: Any
    positions: Any
    k_pages: Any
    v_pages: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a CTA.

    Attributes:
      words: last_arrival's, then positions of the row's tokens, then the row.
      keys, values: tiles, as many as there are stages.
      rows: maxima and sums of one token's warps, then of a split's leaves so far. Each place in shared
        memory takes up 1 KB at least.
      warps: each part's answers of one token, to be added up.
      split: answers over a split's leaves so far, if it has more than one.
      queries: of each token, as they come, and as warp_products reads them, in one place.
    """

    words: Any
    keys: Any
    values: Any
    rows: Any
    warps: Any
    split: Any
    queries: Any
    query_barrier: Any
    key_barrier: Any
    value_barrier: Any


class Part(NamedTuple):
    """Which positions are a CTA's, and what is known before its row's length is.

    Attributes:
      sequence: whose pages the row has.
      number: of the row's parts.
      layer: whose pages are read.
      positions: of the row's tokens.
      last: the largest of them.
      ahead: the first tiles' pages for each of Cut.spans.
    """

    row: Array
    sequence: Array
    kv_head: Array
    number: Array
    layer: Array
    positions: list[Array]
    last: Array
    ahead: list[list[list[Array]]]


def products_of(cut: Cut, interpret: bool) -> WarpProducts:
    shape = cut.query_groups, cut.num_tokens, cut.config.tile_size
    return WarpProducts(*shape, cut.cache_dtype, interpret)


def scratch_types(cut: Cut, products: WarpProducts, *over_warps: Any) -> Scratch:
    """What a CTA needs.

    Args:
      over_warps: what may lie where warps' answers are, before or once all is done.
    """

    config = cut.config
    pages = plgpu.SMEM(
        (config.stages, config.tile_size, HEAD_DIM), cut.cache_dtype, transforms=products.transforms
    )
    arrivals = config.tile_size // cut.page_size
    tiles = plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.stages)
    stored = cut.stored_rows if config.leaves_per_split > 1 else 0

    def answers(rows: int) -> Any:
        return plgpu.SMEM((rows, HEAD_DIM), jnp.float32)

    query_rows = cut.num_tokens * products.query_rows
    return Scratch(
        words=plgpu.SMEM((last_arrival.WORDS + cut.num_tokens + 1,), jnp.int32),
        keys=pages,
        values=pages,
        rows=plgpu.SMEM((2, ROWS + stored), jnp.float32),
        warps=plgpu.RefUnion(answers(products.num_parts * cut.token_rows), *over_warps),
        split=answers(stored) if stored else [],
        queries=plgpu.RefUnion(
            plgpu.SMEM((query_rows, HEAD_DIM), jnp.bfloat16),
            plgpu.SMEM((query_rows, HEAD_DIM), products.operand),
        ),
        query_barrier=plgpu.Barrier(num_arrivals=cut.num_tokens),
        key_barrier=tiles,
        value_barrier=tiles,
    )


def part_here(cut: Cut, inputs: Inputs, interpret: bool) -> Part:
    """This CTA's, of the axes row, kv_head and part."""
    row, kv_head = lax.axis_index("row"), lax.axis_index("kv_head")
    number, sequence = lax.axis_index("part"), cut.sequence_of(row)
    tokens = [cut.token_of(row, index) for index in range(cut.num_tokens)]
    starts = [
        number * span + index * cut.config.tile_size
        for span in cut.spans
        for index in range(cut.config.stages)
    ]
    places = [_places_of_tile(cut, start) for start in starts]
    words = _words(
        [
            (inputs.layer, (0,)),
            *((inputs.positions, (sequence, token)) for token in tokens),
            *((inputs.page_table, (sequence, at)) for place in places for at in place),
        ],
        interpret,
    )
    layer, *words = words
    positions, pages = words[: cut.num_tokens], iter(words[cut.num_tokens :])
    tiles = iter([[_page(inputs, next(pages)) for _ in place] for place in places])
    ahead = [[next(tiles) for _ in range(cut.config.stages)] for _ in cut.spans]
    last = reduce(jnp.maximum, positions)
    return Part(row, sequence, kv_head, number, layer, positions, last, ahead)


def _words(places: list[tuple[Any, tuple[Any, ...]]], interpret: bool) -> list[Array]:
    """Words of device memory, ref[at] of each place, that are all on their way at once.

    Where one of them decides whether a CTA has work, the compiler would ask for the others after that.
    """
    if interpret:
        return [ref[at] for ref, at in places]

    def load(_: Any, *refs: Any) -> tuple[Any, ...]:
        i32 = ir.IntegerType.get_signless(32)
        words = [
            utils.inline_ptx(_LOAD, utils.memref_ptr(ref), result_types=i32, has_side_effects=True)
            for ref in refs
        ]
        splat = fragmented.FragmentedArray.splat
        return tuple(splat(word, (), is_signed=True) for word in words)

    kinds = tuple(plgpu.RefType() for _ in places)
    words = tuple(plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=_SCALAR) for _ in places)
    inline: Any = plgpu.inline_mgpu(arg_types=kinds, return_type=words)
    return list(inline(load)(*(ref.at[(*at[:-1], pl.ds(at[-1], 1))] for ref, at in places)))


def positions_of(cut: Cut, positions: Any, row: Array) -> list[Array]:
    """Positions of a row's tokens."""
    sequence = cut.sequence_of(row)
    return [positions[sequence, cut.token_of(row, index)] for index in range(cut.num_tokens)]


def positions_again(cut: Cut, scratch: Scratch, part: Part) -> list[Array]:
    """Positions of a row's tokens, once attend_part has begun: two tokens leave no registers for them."""
    if cut.num_tokens == 1:
        return part.positions
    return [scratch.words[last_arrival.WORDS + token] for token in range(cut.num_tokens)]


def row_again(cut: Cut, scratch: Scratch, part: Part) -> Array:
    """The row, likewise."""
    return part.row if cut.num_tokens == 1 else scratch.words[last_arrival.WORDS + cut.num_tokens]


def place_again(cut: Cut, scratch: Scratch, part: Part) -> Array:
    """Which of all rows' KV heads it is, likewise."""
    return cut.place_of(part.row, part.kv_head) if cut.num_tokens == 1 else scratch.words[1]


def _places_of_tile(cut: Cut, start: Array) -> list[Array]:
    """Where a row of the page table has a tile's pages."""
    page = start // cut.page_size
    return [
        jnp.minimum(page + i, cut.pages_per_sequence - 1)
        for i in range(cut.config.tile_size // cut.page_size)
    ]


def _page(inputs: Inputs, word: Array) -> Array:
    """A page as the table has it; what a row does not own may be any number."""
    return jnp.clip(word, 0, inputs.k_pages.shape[1] - 1)


def attend_part(
    cut: Cut,
    products: WarpProducts,
    inputs: Inputs,
    scratch: Scratch,
    part: Part,
    partials: tuple[Any, ...],
    new: NewTokens | None = None,
) -> None:
    """Stores the partial answers of a part that begins at or before the row's last position.

    Args:
      partials: refs of memory_types of [rows * kv_heads, num_parts, stored_rows].
      new: the row's tokens, if they are still to be written. They are all of their sequence's.
    """
    config, groups, tile = cut.config, cut.query_groups, cut.config.tile_size
    query_rows, warp_keys = products.query_rows, products.keys_per_warp
    tiles_per_leaf, tokens = config.leaf_size // tile, range(cut.num_tokens)
    layout, row_layout = products.score_layout, products.score_layout.reduce(1)
    q_smem, kept_smem = scratch.queries
    row, layer, row_positions, last = part.row, part.layer, part.positions, part.last
    table = inputs.page_table.at[part.sequence]

    place = cut.place_of(row, part.kv_head)
    last_arrival.prepare(scratch.words, place, cut.num_ctas(last))
    for token in tokens:
        scratch.words[last_arrival.WORDS + token] = row_positions[token]
    scratch.words[last_arrival.WORDS + cut.num_tokens] = row
    span = cut.choose(last, [jnp.int32(size) for size in cut.spans])
    first = part.number * span
    num_tiles = jnp.minimum(span, last + 1 - first + tile - 1) // tile
    turnings: Any = None
    if new is None:
        for token in tokens:
            plgpu.copy_gmem_to_smem(
                inputs.q.at[part.sequence, cut.token_of(row, token), part.kv_head],
                q_smem.at[pl.ds(token * query_rows, groups)],
                scratch.query_barrier,
            )
    else:
        turnings = new.fetch(row, part.kv_head, layer)

    def fetch(index: Array, pages: list[Array]) -> None:
        slot = lax.rem(index, config.stages)
        for gmem, smem, barrier in (
            (inputs.k_pages, scratch.keys, scratch.key_barrier),
            (inputs.v_pages, scratch.values, scratch.value_barrier),
        ):
            for i, page in enumerate(pages):
                at = pl.ds(i * cut.page_size, cut.page_size)
                plgpu.copy_gmem_to_smem(
                    gmem.at[layer, page, part.kv_head], smem.at[slot, at], barrier.at[slot]
                )

    def pages_of(index: Array | int) -> list[Array]:
        places = _places_of_tile(cut, first + index * tile)
        return [_page(inputs, table[at]) for at in places]

    firsts = [
        [cut.choose(last, choice) for choice in zip(*page, strict=True)]
        for page in zip(*part.ahead, strict=True)
    ]

    def new_places(position: Array) -> tuple[Any, Any]:
        position = jnp.maximum(position, 0)
        word = table[position // cut.page_size]
        at = pl.ds(position % cut.page_size, 1)
        place = layer, _page(inputs, word), part.kv_head, at
        return inputs.k_pages.at[place], inputs.v_pages.at[place]

    # Tiles that are still to be written come last.
    are_here = [(first <= x) & (x < first + span) for x in row_positions]
    is_owner, num_ready = reduce(jnp.logical_or, are_here), num_tiles
    if new is not None:
        ready = [
            jnp.where(is_here, (x - first) // tile, num_tiles)
            for x, is_here in zip(row_positions, are_here, strict=True)
        ]
        num_ready = reduce(jnp.minimum, ready)

    def fetch_firsts(is_time: Callable[[int], Array], before: Callable[[], None]) -> None:
        for index, pages in enumerate(firsts):

            @pl.when(is_time(index))
            def _fetch(index: int = index, pages: list[Array] = pages) -> None:
                before()
                fetch(jnp.int32(index), pages)

    # Every place is filled before anything is waited for.
    fetch_firsts(lambda index: index < num_ready, lambda: None)
    of_tokens = [pl.ds(token * query_rows, query_rows) for token in tokens]
    if new is None:
        plgpu.barrier_wait(scratch.query_barrier)
        made = [q_smem.at[rows] for rows in of_tokens]
    else:
        turned = new.turn(turnings, are_here, [new_places(x) for x in row_positions])
        made = [rows.at[pl.ds(0, query_rows)] for rows in turned]
        fetch_firsts(
            lambda index: (index >= num_ready) & (index < num_tiles), new.wait_until_written
        )
    # All are read before one is kept where they lay.
    queries = [plgpu.load(x, layout=products.query_layout, optimized=False) for x in made]
    for rows, of_token in zip(of_tokens, queries, strict=True):
        products.keep(of_token, kept_smem.at[rows])
    row_of, column_of = (
        plgpu.broadcasted_iota(jnp.int32, (ROWS, warp_keys), axis, layout=layout)
        for axis in range(2)
    )

    def is_visible(start: Array, position: Array) -> Array:
        last_visible = jnp.full((ROWS, warp_keys), position, jnp.int32)
        return start + row_of // query_rows * warp_keys + column_of <= last_visible

    def silence(start: Array, last: Array, values_smem: Any) -> None:
        # A share of 0 does not silence what another sequence left there: 0 * inf is NaN.
        @pl.when(start + tile > last + 1)
        def _silence() -> None:
            products.silence(values_smem, last + 1 - start)
            plgpu.commit_smem()

    def visit(index: Array, carry: Any, *, is_masked: bool) -> Any:
        streams, pages = carry
        slot = lax.rem(index, config.stages)
        start = first + index * tile
        ahead = index + config.stages - 1
        # Where the next copies go, the tile before may still be read.
        plgpu.commit_smem()
        if new is not None:
            # Before the last tiles are copied, and before warps' answers take the place of keys.
            is_time = index == min(tiles_per_leaf - 1, 1)
            pl.when(is_owner & is_time)(new.wait_until_written)
        pl.when((index > 0) & (ahead < num_tiles))(lambda: fetch(ahead, pages))
        # For the next tile's turn to fetch, by when they are here.
        pages = pages_of(ahead + 1)
        plgpu.barrier_wait(scratch.key_barrier.at[slot])
        of_tokens = products.scores(kept_smem, scratch.keys.at[slot])
        made, ends = [], positions_again(cut, scratch, part) if is_masked else row_positions
        for scores, (largest, total, out), end in zip(of_tokens, streams, ends, strict=True):
            if is_masked:
                scores = jnp.where(is_visible(start, end), scores, -jnp.inf)
            new_largest = jnp.maximum(largest, scores.max(axis=1) * SCALE)
            along = lax.broadcast_in_dim(new_largest, scores.shape, [0])
            shares = jnp.exp2(scores * SCALE - along)
            fade = jnp.exp2(largest - new_largest)
            total = total * fade + shares.sum(axis=1)
            out = out * lax.broadcast_in_dim(fade, out.shape, [0])
            made.append((new_largest, total, out, shares.astype(products.operand)))
        all_largest, totals, outs, all_shares = zip(*made, strict=True)
        plgpu.barrier_wait(scratch.value_barrier.at[slot])
        if is_masked:
            silence(start, reduce(jnp.maximum, ends), scratch.values.at[slot])
        outs = products.add(list(outs), list(all_shares), scratch.values.at[slot])
        return list(zip(all_largest, totals, outs, strict=True)), pages

    # Up to where every token sees all keys, and past it.
    # One that sees nothing may see all: its answers are zeros in the end.
    least = reduce(jnp.minimum, [jnp.where(x < 0, last, x) for x in row_positions])
    num_whole = jnp.clip((least + 1 - first) // tile, 0, num_tiles)
    num_leaves = (num_tiles + tiles_per_leaf - 1) // tiles_per_leaf
    warp_out, *_ = scratch.warps

    def add_up(token: int, of_warps: Answers) -> Answers:
        """A leaf's answers of a token, from its warps' in the order of their keys."""
        # Since the leaf before was read from there, all threads have met in a visit.
        if token:
            plgpu.commit_smem()
        *of_rows, out = of_warps
        for i, values in enumerate(of_rows):
            put(scratch.rows, (i, pl.ds(0, ROWS)), values)
        products.store(out, cut.token_rows, warp_out)
        plgpu.commit_smem()

        def load_part(number: int) -> Answers:
            of_rows = scratch.rows.at[:, pl.ds(number * query_rows, cut.token_rows)]
            return load((of_rows, warp_out.at[cut.rows_of(number)]), pl.ds(0, cut.token_rows))

        return reduce(fold, map(load_part, range(products.num_parts)))

    def finish(number: Array, token: int, of_leaf: Answers) -> None:
        """Stores a leaf's answers of a token, or a split's after its last leaf."""
        rows = cut.rows_of(token)
        if config.leaves_per_split == 1:
            place = (first + number * config.leaf_size) // config.split_size
            store(partials, of_leaf, rows, (place_again(cut, scratch, part), place))
            return
        at = lax.rem(number, config.leaves_per_split)
        # Each thread reads there what it has stored itself.
        split = scratch.rows.at[:, pl.ds(ROWS, cut.stored_rows)], scratch.split
        of_split = fold(where_below(0, at, load(split, rows)), of_leaf)
        store(split, of_split, rows)
        is_last = (at == config.leaves_per_split - 1) | (number == num_leaves - 1)
        start = first + number * config.leaf_size

        @pl.when(is_last)
        def _store() -> None:
            # A leaf that is a part by itself stands where a split of that number would.
            sizes = config.leaf_size, config.split_size
            place = jnp.where(span < config.split_size, *(start // size for size in sizes))
            store(partials, of_split, rows, (place_again(cut, scratch, part), place))

    def sum_up(number: Array, pages: list[Array]) -> list[Array]:
        start = number * tiles_per_leaf
        end = jnp.minimum(start + tiles_per_leaf, num_tiles)
        whole = jnp.clip(num_whole, start, end)
        empty = nothing(ROWS, products.out_layout, row_layout)
        carry = [empty for _ in tokens], pages
        carry = lax.fori_loop(start, whole, partial(visit, is_masked=False), carry)
        carry = lax.fori_loop(whole, end, partial(visit, is_masked=True), carry)
        streams, pages = carry
        for token, of_warps in enumerate(streams):
            finish(number, token, add_up(token, of_warps))
        return pages

    lax.fori_loop(0, num_leaves, sum_up, firsts[-1])
