"""Which rows each expert multiplies: the router's picks, sorted by the experts of this device.

Knows neither scores nor weights. Every expert's rows start at a multiple of the tile, so that a tile
of tokens meets one expert and is stored whole; rows that only fill a tile belong to nobody.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import launch_order
from glm_jax.pallas.chip import Chip

_LANES = 128
# Rows and columns of the arrays in which a warpgroup compares and counts.
_COUNTED_ROWS, _COUNTED_COLUMNS = 64, 32
# Rows of choices begin at multiples of 16 bytes.
_PICKS = 4
# Rows in flight when tokens are copied: 80 KiB of the model's.
_CHUNK = 16
# CTAs of an SM that copy, so that some load while others store.
_COPIERS = 2
# Every CTA counts all picks: above so many tokens that takes longer than sorting them once.
_MOST_COUNTED = 256


class Dispatch(NamedTuple):
    """Rows of this device's experts, R = tiles * tile of them.

    Attributes:
      tokens: the token of each row; 0 where a row only fills a tile.
      rows: the row of each choice of each token; R where its expert lives elsewhere.
      tile_experts: the local expert of each tile that is in use, those in use first.
      num_tiles: how many tiles are in use.
      values, scale: the quantized token of each row, where stage has copied it; nothing was written
        for rows of tiles that are not in use.
    """

    tokens: Int32[Array, " R"]
    rows: Int32[Array, "T k"]
    tile_experts: Int32[Array, " tiles"]
    num_tiles: Int32[Array, "1"]
    values: Float8e4m3fn[Array, "R D"] | None = None
    scale: Float32[Array, "R 1"] | None = None

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.tokens.shape[0] // self.tile_experts.shape[0]


def default_tile(num_tokens: int, chip: Chip | None = None) -> int:
    """Rows of a tile: about twice an expert's share of a step, where 160 experts take 8 picks.

    An instruction of sm100 takes 16 tokens at least. On one H200, gate_up of 64 tokens took 74.0 us in
    tiles of 8, 77.0 of 16.
    """
    if num_tokens <= 64 and chip is not None and chip.architecture == "sm90":
        return 8
    if num_tokens <= 128:
        return 16
    if num_tokens <= 512:
        return 32
    return 64 if num_tokens <= 1024 else 128


def max_tiles(num_tokens: int, num_choices: int, num_local: int, tile: int) -> int:
    """The most tiles that any picks can take: each expert with picks wastes at most tile - 1 rows."""
    picks = num_tokens * min(num_choices, num_local)
    return (picks + min(picks, num_local) * (tile - 1)) // tile


def dispatch(
    experts: Int32[Array, "T k"],
    first_expert: Int32[Array, ""],
    num_local: int,
    *,
    tile: int | None = None,
) -> Dispatch:
    """Sorts the picks that are of this device's experts, by expert and then by token.

    Args:
      experts: distinct experts for each token, of all devices.
      first_expert: the first of this device's num_local.
      tile: rows of a tile.
    """
    num_tokens, num_choices = experts.shape
    tile = tile or default_tile(num_tokens)
    tiles = max_tiles(num_tokens, num_choices, num_local, tile)
    local_experts = jnp.arange(num_local, dtype=jnp.int32)
    local = experts - first_expert
    is_local = (local >= 0) & (local < num_local)
    picked = (local[:, :, None] == local_experts[None, None]).any(1).astype(jnp.int32)
    before = jnp.cumsum(picked, axis=0) - picked
    tile_ends = jnp.cumsum(pl.cdiv(picked.sum(0), jnp.int32(tile)))
    first_rows = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_ends[:-1]]) * tile
    clipped = jnp.clip(local, 0, num_local - 1)
    rows = first_rows[clipped] + jnp.take_along_axis(before, clipped, axis=1)
    rows = jnp.where(is_local, rows, tiles * tile)
    order = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], rows.shape)
    tokens = jnp.zeros(tiles * tile, jnp.int32).at[rows].set(order, mode="drop")
    ends_passed = (jnp.arange(tiles)[:, None] >= tile_ends[None]).sum(1).astype(jnp.int32)
    tile_experts = jnp.minimum(ends_passed, num_local - 1)
    return Dispatch(tokens, rows, tile_experts, tile_ends[-1:])


def stage(
    x: Float8e4m3fn[Array, "T D"],
    x_scale: Float32[Array, "T 1"],
    experts: Int32[Array, "T k"],
    first_expert: Int32[Array, ""],
    num_local: int,
    *,
    chip: Chip,
    tile: int | None = None,
    interpret: bool = False,
) -> Dispatch:
    """dispatch, and each row's token copied to its place, so that a tile is read at once.

    Few tokens are sorted and copied by one kernel, each CTA counting all picks for itself; many are
    sorted by dispatch, and copied by a kernel that copies tiles in use only.

    Args:
      x, x_scale: quantized tokens.
      experts: distinct experts for each token, of all devices.
      first_expert: the first of this device's num_local.
      tile: rows of a tile.

    Raises:
      NotImplementedError: D is no multiple of 128.
    """
    num_tokens, num_choices = experts.shape
    width = x.shape[1]
    if width % _LANES:
        raise NotImplementedError(f"{x.shape=}: D must be a multiple of {_LANES}")
    tile = tile or default_tile(num_tokens, chip)
    tiles = max_tiles(num_tokens, num_choices, num_local, tile)
    sorted_already = None
    if num_tokens > _MOST_COUNTED:
        sorted_already = dispatch(experts, first_expert, num_local, tile=tile)
    is_local = (experts >= first_expert) & (experts < first_expert + num_local)
    padding = -num_choices % _PICKS
    sizes = Sizes(num_tokens, num_choices, num_choices + padding, num_local, tile, tiles, width)
    if sorted_already:
        num_ctas = min(tiles * (tile // sizes.chunk), _COPIERS * chip.num_cores)
    else:
        num_ctas = min(tiles, chip.num_cores)
    kernel = launch_order.kernel(
        functools.partial(_copy_body if sorted_already else _sort_body, sizes, num_ctas=num_ctas),
        out_type=sizes.row_types() if sorted_already else sizes.row_types() + sizes.plan_types(),
        scratch_types=sizes.scratch(is_sorting=sorted_already is None),
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="dispatch",
    )
    if sorted_already:
        operands = sorted_already.tokens, sorted_already.num_tiles
        values, scale = kernel(*sizes.tokens(x, x_scale), *operands)
        plan = sorted_already
    else:
        by_choice = jnp.pad(experts.T, ((0, 0), (0, sizes.padded_tokens - num_tokens)))
        operands = by_choice, first_expert.reshape(1)
        values, scale, *fields = kernel(*sizes.tokens(x, x_scale), *operands)
        plan = Dispatch(*fields)
        rows = plan.rows[:, :num_choices] if padding else plan.rows
        plan = plan._replace(rows=jnp.where(is_local, rows, tiles * tile))
    return plan._replace(values=values.reshape(-1, width), scale=scale[:, None])


class Sizes(NamedTuple):
    """What the kernels that sort or copy are made for.

    Attributes:
      num_choices, padded_choices: picks of a token, and what they take in memory.
      tile, tiles: rows of a tile, and the most tiles that there can be.
      width: of a token.
    """

    num_tokens: int
    num_choices: int
    padded_choices: int
    num_local: int
    tile: int
    tiles: int
    width: int

    @property
    def chunk(self) -> int:
        """Rows of a tile that are copied at once."""
        return min(self.tile, _CHUNK)

    @property
    def padded_experts(self) -> int:
        """Local experts, as they are counted."""
        return -(-self.num_local // _COUNTED_ROWS) * _COUNTED_ROWS

    @property
    def padded_tokens(self) -> int:
        """Tokens, as they are sorted."""
        return -(-self.num_tokens // _COUNTED_ROWS) * _COUNTED_ROWS

    @property
    def padded_tile(self) -> int:
        """Rows of a tile, as its tokens are found."""
        return -(-self.tile // 8) * 8

    def picks_type(self) -> jax.ShapeDtypeStruct:
        """Of picks as they are sorted: by choice, then by token; past the tokens anything."""
        return jax.ShapeDtypeStruct((self.num_choices, self.padded_tokens), jnp.int32)

    def tokens(self, x: Array, x_scale: Array) -> tuple[Array, Array]:
        """The tokens as the kernels read them: in lines that TMA copies at once."""
        return x.reshape(self.num_tokens, -1, _LANES), x_scale.reshape(-1)

    def row_types(self) -> list[jax.ShapeDtypeStruct]:
        """Of the tokens in the order of their experts, and their scales."""
        rows = self.tiles * self.tile
        return [
            jax.ShapeDtypeStruct((rows, self.width // _LANES, _LANES), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ]

    def plan_types(self) -> list[jax.ShapeDtypeStruct]:
        """Of the first fields of Dispatch, rows with padded choices."""
        return [
            jax.ShapeDtypeStruct((self.tiles * self.tile,), jnp.int32),
            jax.ShapeDtypeStruct((self.num_tokens, self.padded_choices), jnp.int32),
            jax.ShapeDtypeStruct((self.tiles,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ]

    def scratch(self, *, is_sorting: bool) -> dict[str, Any]:
        """The shared memory of sort_and_copy, or of copies alone."""
        shape = (self.chunk, self.width // _LANES, _LANES)
        types: dict[str, Any] = {
            "staged": plgpu.SMEM(shape, jnp.float8_e4m3fn),
            "arrived": plgpu.Barrier(num_arrivals=self.chunk),
        }
        if is_sorting:
            types["picks"] = plgpu.SMEM(self.picks_type().shape, jnp.int32)
            types["picks_full"] = plgpu.Barrier()
            per_expert = plgpu.SMEM((self.padded_experts,), jnp.int32)
            types |= dict.fromkeys(("counts", "tiles", "ends"), per_expert)
            types["taken"] = plgpu.SMEM((self.padded_tile,), jnp.int32)
        return types


def _copy_rows(
    x_ref: Any,
    x_scale_ref: Any,
    values_ref: Any,
    scale_ref: Any,
    token_of: Callable[[int], jax.Array],
    first_row: jax.Array,
    scratch: Mapping[str, Any],
) -> None:
    """Copies the tokens of as many rows as are in flight at a time."""
    staged, arrived = scratch["staged"], scratch["arrived"]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tokens = [token_of(row) for row in range(staged.shape[0])]
    for row, token in enumerate(tokens):
        plgpu.copy_gmem_to_smem(x_ref.at[token], staged.at[row], arrived)
    # All loads before the first store, which waits for its load: one by one they would take 6 us.
    scales = [x_scale_ref[token] for token in tokens]
    for row, scale in enumerate(scales):
        scale_ref[first_row + row] = scale
    plgpu.barrier_wait(arrived)
    plgpu.copy_smem_to_gmem(staged, values_ref.at[pl.ds(first_row, staged.shape[0])])


def _over(number: jax.Array, num_ctas: int, visit: Callable[[jax.Array], None]) -> None:
    """Visits this CTA's share of so many."""
    cta = lax.axis_index("cta")
    count = lax.div(number - cta + num_ctas - 1, jnp.int32(num_ctas))
    lax.fori_loop(0, count, lambda index, _: visit(cta + index * num_ctas), None)
    plgpu.wait_smem_to_gmem(0)


def _copy_body(
    sizes: Sizes,
    x_ref: Any,
    x_scale_ref: Any,
    tokens_ref: Any,
    num_tiles_ref: Any,
    values_ref: Any,
    scale_ref: Any,
    num_ctas: int,
    **scratch: Any,
) -> None:
    """Copies the tokens of tiles that were sorted before; a tile's rows are many CTAs' work."""

    def copy_chunk(index: jax.Array) -> None:
        first_row = index * sizes.chunk
        refs = (x_ref, x_scale_ref, values_ref, scale_ref)
        _copy_rows(*refs, lambda row: tokens_ref[first_row + row], first_row, scratch)

    _over(num_tiles_ref[0] * (sizes.tile // sizes.chunk), num_ctas, copy_chunk)


def _sort_body(sizes: Sizes, *refs: Any, num_ctas: int, **scratch: Any) -> None:
    x_ref, x_scale_ref, picks_ref, first_ref, *outs = refs
    sort_and_copy(sizes, (x_ref, x_scale_ref), picks_ref, first_ref, outs, num_ctas, scratch)


def sort_and_copy(
    sizes: Sizes,
    token_refs: tuple[Any, Any],
    picks_ref: Any,
    first_ref: Any,
    outs: Sequence[Any],
    num_ctas: int,
    scratch: Mapping[str, Any],
) -> None:
    """Counts all picks, then finds and copies the tokens of this CTA's tiles.

    Nothing is written to the row of a choice whose expert lives elsewhere.

    Args:
      picks_ref: of picks_type.
      outs: refs of row_types and plan_types.
    """
    x_ref, x_scale_ref = token_refs
    values_ref, scale_ref, tokens_ref, rows_ref, tile_experts_ref, num_tiles_ref = outs
    picks, ends, taken = scratch["picks"], scratch["ends"], scratch["taken"]
    plgpu.copy_gmem_to_smem(picks_ref, picks, scratch["picks_full"])
    plgpu.barrier_wait(scratch["picks_full"])
    first_expert = first_ref[0]
    _count(sizes, first_expert, scratch)
    num_tiles = ends[sizes.num_local - 1]

    @pl.when(lax.axis_index("cta") == 0)
    def _():
        num_tiles_ref[0] = num_tiles

    def sort_tile(index: jax.Array) -> None:
        passed = [ends[expert] <= index for expert in range(sizes.num_local)]
        expert = sum((is_passed.astype(jnp.int32) for is_passed in passed), jnp.int32(0))
        tile_experts_ref[index] = expert
        begin = jnp.where(expert > 0, ends[jnp.maximum(expert - 1, 0)], 0)
        first_row, before = index * sizes.tile, (index - begin) * sizes.tile
        _find(sizes, first_expert + expert, before, scratch)
        tokens = [taken[row] for row in range(sizes.tile)]
        choices = [
            sum(
                (
                    jnp.where(picks[choice, token] == first_expert + expert, choice, 0)
                    for choice in range(1, sizes.num_choices)
                ),
                jnp.int32(0),
            )
            for token in tokens
        ]
        num_taken = scratch["counts"][expert] - before
        for row, (token, choice) in enumerate(zip(tokens, choices, strict=True)):
            tokens_ref[first_row + row] = token

            @pl.when(row < num_taken)
            def _(row: int = row, token: jax.Array = token, choice: jax.Array = choice):
                rows_ref[token, choice] = first_row + row

        refs = (x_ref, x_scale_ref, values_ref, scale_ref)

        def copy_chunk(number: jax.Array, _: None) -> None:
            first = number * sizes.chunk
            _copy_rows(*refs, lambda row: taken[first + row], first_row + first, scratch)

        lax.fori_loop(0, sizes.tile // sizes.chunk, copy_chunk, None)

    _over(num_tiles, num_ctas, sort_tile)


def _rows(values: jax.Array) -> jax.Array:
    """A vector as it meets the rows of an array."""
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(1))


def _columns(values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A vector as every row of an array."""
    values = plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(values, shape, (1,))


def _count(sizes: Sizes, first_expert: jax.Array, scratch: Mapping[str, Any]) -> None:
    """Counts the picks of each local expert, and finds the tile at which its tiles end."""
    picks, tiles = scratch["picks"], scratch["tiles"]
    shape = sizes.padded_experts, _COUNTED_COLUMNS
    expert, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    named = first_expert + expert

    def count(number: jax.Array, counts: jax.Array) -> jax.Array:
        first = number * _COUNTED_COLUMNS
        hits = sum(
            jnp.where(_columns(picks[choice, pl.ds(first, _COUNTED_COLUMNS)], shape) == named, 1, 0)
            for choice in range(sizes.num_choices)
        )
        is_local = (first + column < sizes.num_tokens) & (expert < sizes.num_local)
        return counts + jnp.sum(jnp.where(is_local, hits, 0), axis=1)

    zeros = _rows(jnp.zeros(sizes.padded_experts, jnp.int32))
    counts = lax.fori_loop(0, sizes.padded_tokens // _COUNTED_COLUMNS, count, zeros)
    scratch["counts"][...] = counts
    tiles[...] = lax.div(counts + (sizes.tile - 1), sizes.tile)
    plgpu.commit_smem()
    ends = zeros
    for first in range(0, sizes.padded_experts, _COUNTED_COLUMNS):
        each = _columns(tiles[pl.ds(first, _COUNTED_COLUMNS)], shape)
        ends = ends + jnp.sum(jnp.where(first + column <= expert, each, 0), axis=1)
    scratch["ends"][...] = ends
    plgpu.commit_smem()


def _find(sizes: Sizes, expert: jax.Array, before: jax.Array, scratch: Mapping[str, Any]) -> None:
    """Finds the tokens of a tile: those that picked the expert, but for so many of them before.

    Rows of the tile past the last of them get token 0.
    """
    picks = scratch["picks"]

    def picked(first: jax.Array | int, count: int, lay: Callable[[jax.Array], jax.Array]) -> Any:
        # A token picks an expert once at most.
        return sum(
            jnp.where(lay(picks[choice, pl.ds(first, count)]) == expert, 1, 0)
            for choice in range(sizes.num_choices)
        )

    shape = sizes.padded_tokens, _COUNTED_COLUMNS
    token, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))

    def rank(number: jax.Array, ranks: jax.Array) -> jax.Array:
        first = number * _COUNTED_COLUMNS
        is_picked = picked(first, _COUNTED_COLUMNS, lambda values: _columns(values, shape))
        return ranks + jnp.sum(jnp.where(first + column < token, is_picked, 0), axis=1)

    zeros = _rows(jnp.zeros(sizes.padded_tokens, jnp.int32))
    ranks = lax.fori_loop(0, sizes.padded_tokens // _COUNTED_COLUMNS, rank, zeros)
    shape = sizes.padded_tokens, sizes.padded_tile
    token, row = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    is_picked = lax.broadcast_in_dim(picked(0, sizes.padded_tokens, _rows), shape, (0,)) > 0
    is_here = lax.broadcast_in_dim(ranks - before, shape, (0,)) == row
    is_here &= is_picked & (token < sizes.num_tokens)
    scratch["taken"][...] = jnp.max(jnp.where(is_here, token, 0), axis=0)
    plgpu.commit_smem()
