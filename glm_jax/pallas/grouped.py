"""FP8 products of many experts in one kernel, and of the expert that every token passes.

Knows neither activations nor what the two products of an expert mean. Tiles of the shared expert come
first, then the tiles of experts in use; an expert without tokens costs nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import fp8_product, grid, launch_order
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch
from glm_jax.pallas.product_loop import SCALE_SLOTS, Streams
from glm_jax.pallas.quantize import GROUP, num_groups, quantize_groups, quantized_types
from glm_jax.pallas.tiling import LINE, TuningConfig


class Weights(NamedTuple):
    """What an expert's rows are multiplied with; H is 2 where gate and up stand side by side."""

    values: Float8e4m3fn[Array, "L E H N K"]
    scale: Float32[Array, "L E H N"]


class Tokens(NamedTuple):
    """Quantized tokens and the scale of each; or, without one, tokens that the product is to quantize."""

    values: Float8e4m3fn[Array, "T K"] | BFloat16[Array, "T K"]
    scale: Float32[Array, "T 1"] | None


class _Place(NamedTuple):
    """Where a tile, or a part of one that is cut, lies."""

    is_shared: jax.Array
    expert: jax.Array
    row: jax.Array
    token: jax.Array
    cuts: jax.Array


class _Side(NamedTuple):
    """The refs of one kind of tile, routed or shared."""

    tokens: Any
    token_scales: Any
    values: Any
    scales: Any
    out: Any
    num_experts: int


def product(
    name: str,
    rows: Tokens,
    weights: Weights,
    shared: tuple[Tokens, Weights] | None,
    dispatch: Dispatch,
    layer: Int32[Array, ""],
    combine_halves: Callable[[list[jax.Array]], jax.Array],
    *,
    chip: Chip,
    config: TuningConfig,
    shift: int,
    counter: Any = None,
    interpret: bool,
) -> tuple[BFloat16[Array, "R N"], BFloat16[Array, "T N"] | None]:
    """Each row times its expert's weights, scaled; each token times the shared expert's.

    Args:
      rows: in the order of dispatch.
      shared: every token, and weights as of a single expert; or None.
      layer, shift: their sum is the place in the stacks.
      combine_halves: makes one float32[rows, tokens] of the scaled products of each half.
      counter: of a product that quantizes its rows, by which its CTAs tell each other; or of the
        product before, which sets it to zero and makes whole groups of rows: up to 3 more for tokens.

    Raises:
      ValueError: the tile of dispatch is not the tokens of config.
      NotImplementedError: K or N is no multiple of 64.
    """
    if dispatch.tile != config.tokens:
        raise ValueError(f"dispatch is in tiles of {dispatch.tile} rows, {config.tokens=}")
    num_tokens = shared[0].values.shape[0] if shared else 0
    quantizes = rows.scale is None
    if quantizes and counter is None:
        raise ValueError("rows that are to be quantized need a counter")
    if shared and (padding := fp8_product.padding(num_tokens)):
        padded = jax.tree.map(lambda each: jnp.pad(each, ((0, padding), (0, 0))), shared[0])
        shared = padded, shared[1]
    sides = [(rows, weights)] if shared is None else [(rows, weights), shared]
    for _, side_weights in sides:
        if side_weights.values.shape[-1] % 64 or side_weights.values.shape[-2] % 64:
            raise NotImplementedError(f"{side_weights.values.shape=}: N and K are multiples of 64")
    row_tiles = [pl.cdiv(side.values.shape[-2], config.tile_rows) for _, side in sides]
    num_shared = row_tiles[1] * pl.cdiv(shared[0].values.shape[0], config.tokens) if shared else 0
    most_tiles = dispatch.tile_experts.shape[0] * row_tiles[0] + num_shared
    num_ctas = min(most_tiles * config.last_cuts, config.ctas_per_sm * chip.num_cores)
    halves = weights.values.shape[2]
    operands = [
        operand
        for tokens, side in sides
        for operand in (
            tokens.values, *([] if tokens.scale is None else [tokens.scale.reshape(-1)]), *_flat(side)
        )
    ]  # fmt: skip

    counters = [] if counter is None else [counter]
    out_types = [
        jax.ShapeDtypeStruct(
            (tokens.values.shape[0] + (-tokens.values.shape[0] % GROUP if counters else 0),
             side.values.shape[-2]), jnp.bfloat16
        )
        for tokens, side in sides
    ]  # fmt: skip
    if quantizes:
        out_types += [out for tokens, _ in sides for out in quantized_types(*tokens.values.shape)]
    of_side = len(operands) // len(sides)
    num_operands = 3 + len(counters) + len(operands)

    def body(*refs: Any, **scratch: Any) -> None:
        layer_ref, tile_experts_ref, num_tiles_ref, *inputs = refs[:num_operands]
        counter_refs, inputs = inputs[: len(counters)], inputs[len(counters) :]
        outs, quantized = refs[num_operands:][: len(sides)], refs[num_operands:][len(sides) :]
        plain, side_refs = inputs[::of_side], []
        for index, (out, side) in enumerate(zip(outs, sides, strict=True)):
            *given, values, scales = inputs[of_side * index : of_side * (index + 1)]
            tokens, token_scales = quantized[2 * index : 2 * index + 2] if quantizes else given
            side_refs.append(
                _Side(tokens, token_scales, values, scales, out, side[1].values.shape[1])
            )
        await_tokens = None
        if quantizes:
            await_tokens = _quantize(
                config, min(num_ctas, chip.num_cores), num_tiles_ref, plain, quantized, counter_refs[0]
            )  # fmt: skip
        elif counters:

            @pl.when((lax.axis_index("cta") == 0) & (lax.axis_index("warpgroup") == 0))
            def _():
                grid.reset(counter_refs[0])

        walk = _Walk(config, num_ctas, row_tiles, num_shared, tile_experts_ref, num_tiles_ref)
        loads = _Loads(config, side_refs, layer_ref[0] + shift, scratch, halves)
        streams = _streams_of(walk, loads, combine_halves, await_tokens)
        fp8_product.stream(chip, config, num_ctas, streams, scratch)

    stage_halves = 1 if config.is_stacked else halves
    scratch = fp8_product.scratch_types(
        chip,
        config,
        [side.values.shape[-1] for _, side in sides],
        halves=stage_halves,
        num_copies=halves + 1,
        num_scale_copies=halves + 1,
        interpret=interpret,
    )
    all_rows = config.cta_rows
    scratch["token_scales"] = fp8_product.token_scales(config)
    scratch["row_scales"] = plgpu.SMEM((SCALE_SLOTS, stage_halves, all_rows), jnp.float32)
    if config.is_stacked:
        scratch["stacked"] = plgpu.SMEM((2 * config.rows, config.store_tokens), jnp.float32)
    kernel = fp8_product.launch(
        body,
        name=name,
        chip=chip,
        config=config,
        out_type=out_types,
        scratch=scratch,
        num_ctas=num_ctas,
        waits=not quantizes,
        interpret=interpret,
    )
    plan = dispatch.tile_experts, dispatch.num_tiles
    outs = kernel(layer.reshape(1), *plan, *counters, *operands)
    # Rows that only fill a group stay: to cut them off would be a launch each.
    return outs[0], outs[1][: None if counters else num_tokens] if shared else None


def _flat(weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Layers, experts and halves as one axis: a view, since TMA takes few dimensions."""
    return (
        weights.values.reshape(-1, *weights.values.shape[-2:]),
        weights.scale.reshape(-1, weights.scale.shape[-1]),
    )


class _Walk:
    """Tile numbers to places: row tiles vary fastest, so that CTAs side by side share their tokens.

    Where the last round has tiles for a part of the CTAs only, they are cut, and parts count as tiles.
    """

    def __init__(
        self,
        config: TuningConfig,
        num_ctas: int,
        row_tiles: list[int],
        num_shared: int,
        tile_experts_ref: Any,
        num_tiles_ref: Any,
    ) -> None:
        self.config = config
        self.row_tiles = row_tiles
        self.num_shared = num_shared
        self.tile_experts_ref = tile_experts_ref
        num_tiles = num_tiles_ref[0] * self.row_tiles[0] + self.num_shared
        in_last = lax.rem(num_tiles, jnp.int32(num_ctas))
        # Of the first tile of the last round.
        self.last = num_tiles - in_last
        self.cuts = jnp.int32(1)
        for cuts in config.cuts:
            self.cuts = jnp.where(in_last * cuts <= num_ctas, cuts, self.cuts)
        self.num_tiles = self.last + in_last * self.cuts

    def _uncut(self, tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Which tile a tile is a part of, which part, and of how many."""
        if self.config.last_cuts == 1:
            return tile, jnp.int32(0), jnp.int32(1)
        part = jnp.maximum(tile - self.last, 0)
        cuts = jnp.where(tile < self.last, 1, self.cuts)
        return jnp.minimum(tile, self.last) + lax.div(part, cuts), lax.rem(part, cuts), cuts

    def expert(self, tile: jax.Array) -> jax.Array:
        """The expert of a routed tile; of any other anything."""
        tile, _, _ = self._uncut(tile)
        token_tile = lax.div(jnp.maximum(tile - self.num_shared, 0), jnp.int32(self.row_tiles[0]))
        return self.tile_experts_ref[jnp.minimum(token_tile, self.tile_experts_ref.shape[0] - 1)]

    def locate(self, tile: jax.Array, expert: jax.Array) -> _Place:
        tile, part, cuts = self._uncut(tile)
        most = self.config.last_cuts
        is_shared = tile < self.num_shared
        number = jnp.where(is_shared, tile, tile - self.num_shared)
        row_tiles = jnp.where(is_shared, self.row_tiles[-1], self.row_tiles[0])
        token_tile = lax.div(number, row_tiles)
        unit = lax.rem(number, row_tiles) * most + part * lax.div(jnp.int32(most), cuts)
        return _Place(
            is_shared,
            jnp.where(is_shared, 0, expert),
            # Seen to be a multiple of what TMA and shared memory count rows by.
            unit * (self.config.tile_rows // most),
            token_tile * self.config.tokens,
            cuts,
        )


class _Loads:
    """The copies of a place, from the refs of its side."""

    def __init__(
        self,
        config: TuningConfig,
        sides: list[_Side],
        layer: jax.Array,
        scratch: dict[str, Any],
        halves: int,
    ) -> None:
        self.config = config
        self.sides = sides
        self.layer = layer
        self.scratch = scratch
        self.halves = halves

    def index(self, side: _Side, place: _Place, half: int) -> jax.Array:
        return (self.layer * side.num_experts + place.expert) * self.halves + half

    def place_of(self, half: int, count: int) -> tuple[int, Any]:
        """Where in a stage so many rows of a half are: below the other's, or beside them."""
        first = half * self.config.tile_rows
        return (0, pl.ds(first, count)) if self.config.is_stacked else (half, pl.ds(0, count))

    def fetch_weights(
        self, place: _Place, step: jax.Array, weights: list[Any], barrier: Any
    ) -> None:
        columns = pl.ds(step * self.config.step, self.config.step)
        for side, cuts, is_here in _cases(self.config, self.sides, place):
            count = self.config.tile_rows // cuts

            @pl.when(is_here)
            def _(side: _Side = side, count: int = count):
                for half in range(self.halves):
                    plgpu.copy_gmem_to_smem(
                        side.values.at[
                            self.index(side, place, half), pl.ds(place.row, count), columns
                        ],
                        _of(side, weights).at[self.place_of(half, count)],
                        barrier,
                    )

    def fetch_tokens(self, place: _Place, step: jax.Array, tokens: list[Any], barrier: Any) -> None:
        columns = pl.ds(step * self.config.step, self.config.step)
        for is_shared, side in enumerate(self.sides):

            @pl.when(place.is_shared == bool(is_shared))
            def _(side: _Side = side):
                plgpu.copy_gmem_to_smem(
                    side.tokens.at[pl.ds(place.token, self.config.tokens), columns],
                    _of(side, tokens),
                    barrier,
                )

    def fetch_token_scales(self, place: _Place, slot: jax.Array, barrier: Any) -> None:
        for is_shared, side in enumerate(self.sides):

            @pl.when(place.is_shared == bool(is_shared))
            def _(side: _Side = side):
                plgpu.copy_gmem_to_smem(
                    side.token_scales.at[pl.ds(place.token, self.config.tokens)],
                    self.scratch["token_scales"].at[slot, pl.ds(0, self.config.tokens)],
                    barrier,
                )

    def fetch_row_scales(self, place: _Place, slot: jax.Array, barrier: Any) -> None:
        count = self.config.tile_rows if self.config.is_stacked else self.config.cta_rows
        rows = pl.ds(place.row, count)
        for is_shared, side in enumerate(self.sides):

            @pl.when(place.is_shared == bool(is_shared))
            def _(side: _Side = side):
                for half in range(self.halves):
                    plgpu.copy_gmem_to_smem(
                        side.scales.at[self.index(side, place, half), rows],
                        self.scratch["row_scales"].at[(slot, *self.place_of(half, count))],
                        barrier,
                    )


def _cases(
    config: TuningConfig, sides: list[_Side], place: _Place
) -> Iterator[tuple[_Side, int, jax.Array]]:
    """Each side and how its tiles may be cut, and whether a place is of that kind."""
    for is_shared, side in enumerate(sides):
        is_side = place.is_shared == bool(is_shared)
        for cuts in config.cuts:
            yield side, cuts, is_side & (place.cuts == cuts) if config.last_cuts > 1 else is_side


def _of(side: _Side, refs: list[Any]) -> Any:
    """The refs of a stage that have the swizzle a side's K is a multiple of."""
    return refs[0] if side.values.shape[-1] % LINE == 0 else refs[-1]


def _streams_of(
    walk: _Walk,
    loads: _Loads,
    combine_halves: Callable[[list[jax.Array]], jax.Array],
    await_tokens: Callable[[], None] | None,
) -> Streams:
    """What the main loop is to know of a product's tiles."""
    config, sides = loads.config, loads.sides

    def finish(
        slot: jax.Array, row: jax.Array | int, first: int, products: list[jax.Array]
    ) -> jax.Array:
        scaled = _scaled(loads.scratch, slot, row, first, products)
        return combine_halves(_unstacked(loads.scratch, *scaled) if config.is_stacked else scaled)

    def send(place: _Place, warpgroup: jax.Array, first: int, staged: Any) -> None:
        row = place.row + config.first_row(warpgroup)
        for side, cuts, is_here in _cases(config, sides, place):

            @pl.when(is_here)
            def _(side: _Side = side, cuts: int = cuts):
                fp8_product.send(config, staged, side.out, place.token + first, row, cuts)

    num_steps = [pl.cdiv(side.values.shape[-1], config.step) for side in sides]
    return Streams(
        num_tiles=walk.num_tiles,
        look_up=walk.expert,
        locate=walk.locate,
        num_steps=lambda place: (
            num_steps[0]
            if num_steps[-1] == num_steps[0]
            else jnp.where(place.is_shared, num_steps[1], num_steps[0])
        ),
        fetch_weights=loads.fetch_weights,
        fetch_tokens=loads.fetch_tokens,
        fetch_row_scales=loads.fetch_row_scales,
        fetch_token_scales=loads.fetch_token_scales,
        finish=finish,
        send=send,
        await_tokens=await_tokens,
        # Where there are two rings, one side is narrow and the other is not.
        is_narrow=lambda place: place.is_shared == (sides[-1].values.shape[-1] % LINE > 0),
    )


def _quantize(
    config: TuningConfig,
    num_ctas: int,
    num_tiles_ref: Any,
    plain: list[Any],
    quantized: Sequence[Any],
    counter_ref: Any,
) -> Callable[[], None]:
    """Quantizes rows by the warpgroups that multiply of the first num_ctas CTAs, which surely run while
    others wait for them; returns what holds a warp until all rows are there. The plan is older than the
    kernel right ahead, rows are not."""
    in_use = num_tiles_ref[0] * (config.tokens // GROUP)
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")

    @pl.when(warpgroup < config.warpgroups)
    def _():
        launch_order.wait(interpret=False)

        @pl.when(cta < num_ctas)
        def _():
            first, stride = cta * config.warpgroups + warpgroup, num_ctas * config.warpgroups
            tell = partial(grid.add_one, counter_ref)
            quantize_groups(in_use, plain, quantized, first, stride, tell)

    def await_tokens() -> None:
        launch_order.wait(interpret=False)
        grid.wait_for(counter_ref, num_groups(in_use, plain))

    return await_tokens


def _scaled(
    scratch: dict[str, Any],
    slot: jax.Array,
    row: jax.Array | int,
    first: int,
    products: list[jax.Array],
) -> list[jax.Array]:
    shape = products[0].shape
    mine = pl.ds(row, shape[0])
    token_scales = scratch["token_scales"][slot, pl.ds(first, shape[1])]
    token_scales = lax.broadcast_in_dim(token_scales, shape, (1,))
    scaled = []
    for half, values in enumerate(products):
        row_scales = scratch["row_scales"][slot, half, mine]
        scaled.append(values * token_scales * lax.broadcast_in_dim(row_scales, shape, (0,)))
    return scaled


def _unstacked(scratch: dict[str, Any], stacked: jax.Array) -> list[jax.Array]:
    """Both halves of rows that are stacked, each followed by as many others that mean nothing.

    Rows cannot leave their warp but through memory.
    """
    rows, memory = stacked.shape[0], scratch["stacked"]
    for copy in range(2):
        memory[pl.ds(copy * rows, rows)] = stacked
    plgpu.commit_smem()
    below = plgpu.load(
        memory.at[pl.ds(rows // 2, rows)], layout=plgpu.Layout.WGMMA, optimized=False
    )
    return [stacked, below]
