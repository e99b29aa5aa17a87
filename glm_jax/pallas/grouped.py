"""FP8 products of many experts in one kernel, and of the expert that every token passes.

Knows neither activations nor what the two products of an expert mean. Tiles of the shared expert come
first, then the tiles of experts in use; an expert without tokens costs nothing.
"""

from collections.abc import Callable
from itertools import batched
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import fp8_product, grid
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch
from glm_jax.pallas.product_loop import SCALE_SLOTS, Streams
from glm_jax.pallas.quantize import GROUP, quantize_groups, quantized_types
from glm_jax.pallas.tiling import LINE, TuningConfig


class Weights(NamedTuple):
    """What an expert's rows are multiplied with; H is 2 where gate and up stand side by side."""

    values: Float8e4m3fn[Array, "L E H N K"]
    scale: Float32[Array, "L E H N"]


class Tokens(NamedTuple):
    """Quantized tokens and the scale of each."""

    values: Float8e4m3fn[Array, "T K"]
    scale: Float32[Array, "T 1"]


_Inputs = tuple[Any, Any, Any, Any]


class _Place(NamedTuple):
    is_shared: jax.Array
    expert: jax.Array
    row: jax.Array
    token: jax.Array


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
) -> tuple[Any, Any]:
    """Each row times its expert's weights, scaled; each token times the shared expert's.

    Rows and tokens as bfloat16, or, with a counter, quantized: when all CTAs have done their tiles,
    each quantizes its share of the rows.

    Args:
      rows: in the order of dispatch.
      shared: every token, and weights as of a single expert; or None.
      layer, shift: their sum is the place in the stacks.
      combine_halves: makes one float32[rows, tokens] of the scaled products of each half.

    Raises:
      ValueError: the tile of dispatch is not the tokens of config.
      NotImplementedError: K or N is no multiple of 64.
    """
    if dispatch.tile != config.tokens:
        raise ValueError(f"dispatch is in tiles of {dispatch.tile} rows, {config.tokens=}")
    num_tokens = shared[0].values.shape[0] if shared else 0
    if shared and (padding := fp8_product.padding(num_tokens)):
        padded = [jnp.pad(operand, ((0, padding), (0, 0))) for operand in shared[0]]
        shared = Tokens(*padded), shared[1]
    sides = [(rows, weights)] if shared is None else [(rows, weights), shared]
    for _, side_weights in sides:
        if side_weights.values.shape[-1] % 64 or side_weights.values.shape[-2] % 64:
            raise NotImplementedError(f"{side_weights.values.shape=}: N and K are multiples of 64")
    row_tiles = [pl.cdiv(side.values.shape[-2], config.tile_rows) for _, side in sides]
    num_shared = row_tiles[1] * pl.cdiv(shared[0].values.shape[0], config.tokens) if shared else 0
    most_tiles = dispatch.tile_experts.shape[0] * row_tiles[0] + num_shared
    num_ctas = min(most_tiles, config.ctas_per_sm * chip.num_cores)
    halves = weights.values.shape[2]
    operands = [
        operand
        for tokens, side in sides
        for operand in (tokens.values, tokens.scale.reshape(-1), *_flat(side))
    ]

    counters = [] if counter is None else [counter]
    out_types = [
        jax.ShapeDtypeStruct(
            (tokens.values.shape[0] + (-tokens.values.shape[0] % GROUP if counters else 0),
             side.values.shape[-2]), jnp.bfloat16
        )
        for tokens, side in sides
    ]  # fmt: skip
    num_operands = 3 + len(counters) + 4 * len(sides)

    def body(*refs: Any, **scratch: Any) -> None:
        layer_ref, tile_experts_ref, num_tiles_ref, *inputs = refs[:num_operands]
        counter_refs, inputs = inputs[: len(counters)], inputs[len(counters) :]
        outs, quantized = refs[num_operands:][: len(sides)], refs[num_operands:][len(sides) :]
        side_refs = [
            _Side(*cast(_Inputs, inputs[4 * index : 4 * index + 4]), out, side.values.shape[1])
            for index, (out, (_, side)) in enumerate(zip(outs, sides, strict=True))
        ]
        walk = _Walk(config, row_tiles, num_shared, tile_experts_ref, num_tiles_ref)
        loads = _Loads(config, side_refs, layer_ref[0] + shift, scratch, halves)

        streams = _streams_of(walk, loads, combine_halves)
        # Read ahead: when all have met, nothing else is to be waited for.
        in_use = num_tiles_ref[0] * (config.tokens // GROUP)
        fp8_product.stream(chip, config, num_ctas, streams, scratch)
        if counters:
            plgpu.wait_smem_to_gmem(0)
            grid.wait_for_all(counter_refs[0], num_ctas)
            warpgroups = config.warpgroups + 1
            first = lax.axis_index("cta") * warpgroups + lax.axis_index("warpgroup")
            quantize_groups(in_use, outs, quantized, first, num_ctas * warpgroups)

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
    if counters:
        out_types += [out for each in out_types for out in quantized_types(*each.shape)]
    kernel = fp8_product.launch(
        body,
        name=name,
        chip=chip,
        config=config,
        out_type=out_types,
        scratch=scratch,
        num_ctas=num_ctas,
        interpret=interpret,
    )
    plan = dispatch.tile_experts, dispatch.num_tiles
    outs = kernel(layer.reshape(1), *plan, *counters, *operands)
    if not counters:
        return outs[0], outs[1][:num_tokens] if shared else None
    # Rows that only fill a group stay: to cut them off would be a launch each.
    pairs = [(values, scale[:, None]) for values, scale in batched(outs[len(sides) :], 2)]
    return pairs[0], pairs[1] if shared else None


def _flat(weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Layers, experts and halves as one axis: a view, since TMA takes few dimensions."""
    return (
        weights.values.reshape(-1, *weights.values.shape[-2:]),
        weights.scale.reshape(-1, weights.scale.shape[-1]),
    )


class _Walk:
    """Tile numbers to places: row tiles vary fastest, so that CTAs side by side share their tokens."""

    def __init__(
        self,
        config: TuningConfig,
        row_tiles: list[int],
        num_shared: int,
        tile_experts_ref: Any,
        num_tiles_ref: Any,
    ) -> None:
        self.config = config
        self.row_tiles = row_tiles
        self.num_shared = num_shared
        self.tile_experts_ref = tile_experts_ref
        self.num_tiles_ref = num_tiles_ref

    def num_tiles(self) -> jax.Array:
        return self.num_tiles_ref[0] * self.row_tiles[0] + self.num_shared

    def expert(self, tile: jax.Array) -> jax.Array:
        """The expert of a routed tile; of any other anything."""
        token_tile = lax.div(jnp.maximum(tile - self.num_shared, 0), jnp.int32(self.row_tiles[0]))
        return self.tile_experts_ref[jnp.minimum(token_tile, self.tile_experts_ref.shape[0] - 1)]

    def locate(self, tile: jax.Array, expert: jax.Array) -> _Place:
        is_shared = tile < self.num_shared
        number = jnp.where(is_shared, tile, tile - self.num_shared)
        row_tiles = jnp.where(is_shared, self.row_tiles[-1], self.row_tiles[0])
        token_tile = lax.div(number, row_tiles)
        return _Place(
            is_shared,
            jnp.where(is_shared, 0, expert),
            lax.rem(number, row_tiles) * self.config.tile_rows,
            token_tile * self.config.tokens,
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
        is_stacked = self.config.is_stacked
        return (0, pl.ds(half * count, count)) if is_stacked else (half, pl.ds(0, count))

    def fetch_weights(
        self, place: _Place, step: jax.Array, weights: list[Any], barrier: Any
    ) -> None:
        columns = pl.ds(step * self.config.step, self.config.step)
        rows = pl.ds(place.row, self.config.tile_rows)
        for is_shared, side in enumerate(self.sides):

            @pl.when(place.is_shared == bool(is_shared))
            def _(side: _Side = side):
                for half in range(self.halves):
                    plgpu.copy_gmem_to_smem(
                        side.values.at[self.index(side, place, half), rows, columns],
                        _of(side, weights).at[self.place_of(half, self.config.tile_rows)],
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

    def fetch_scales(self, place: _Place, slot: jax.Array, barrier: Any) -> None:
        count = self.config.tile_rows if self.config.is_stacked else self.config.cta_rows
        rows = pl.ds(place.row, count)
        for is_shared, side in enumerate(self.sides):

            @pl.when(place.is_shared == bool(is_shared))
            def _(side: _Side = side):
                plgpu.copy_gmem_to_smem(
                    side.token_scales.at[pl.ds(place.token, self.config.tokens)],
                    self.scratch["token_scales"].at[slot, pl.ds(0, self.config.tokens)],
                    barrier,
                )
                for half in range(self.halves):
                    plgpu.copy_gmem_to_smem(
                        side.scales.at[self.index(side, place, half), rows],
                        self.scratch["row_scales"].at[(slot, *self.place_of(half, count))],
                        barrier,
                    )


def _of(side: _Side, refs: list[Any]) -> Any:
    """The refs of a stage that have the swizzle a side's K is a multiple of."""
    return refs[0] if side.values.shape[-1] % LINE == 0 else refs[-1]


def _streams_of(
    walk: _Walk, loads: _Loads, combine_halves: Callable[[list[jax.Array]], jax.Array]
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
        for is_shared, side in enumerate(sides):

            @pl.when(place.is_shared == bool(is_shared))
            def _(side: _Side = side):
                fp8_product.send(config, staged, side.out, place.token + first, row)

    num_steps = [pl.cdiv(side.values.shape[-1], config.step) for side in sides]
    return Streams(
        num_tiles=walk.num_tiles(),
        look_up=walk.expert,
        locate=walk.locate,
        num_steps=lambda place: (
            num_steps[0]
            if num_steps[-1] == num_steps[0]
            else jnp.where(place.is_shared, num_steps[1], num_steps[0])
        ),
        fetch_weights=loads.fetch_weights,
        fetch_tokens=loads.fetch_tokens,
        fetch_scales=loads.fetch_scales,
        finish=finish,
        send=send,
        # Where there are two rings, one side is narrow and the other is not.
        is_narrow=lambda place: place.is_shared == (sides[-1].values.shape[-1] % LINE > 0),
    )


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
