"""The main loop of every FP8 product: weights stream through shared memory and meet a few tokens.

Knows neither experts nor layers: its callers say which tiles there are, where a tile's operands lie,
and what becomes of its products.

The roles of the tensor core's two operands are swapped: weight rows are its M side, in tiles of 64 or
128, and tokens its N side, so that a decode step of few tokens wastes nothing and prefill still fills
the unit. A kernel is persistent: one CTA per SM takes tiles cta, cta + num_ctas, ..., and a ring of
stages carries on from tile to tile, so that the next tile's weights are under way while this one's
products are being stored.

K is walked from the front, 32 columns an instruction, whatever the number of tokens, tiles or SMs and
however wide a step is: the bits of a product depend on its own two rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm_jax.pallas import launch_order
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.product_loop import SCALE_SLOTS, WGMMA_ROWS, Loop, Streams
from glm_jax.pallas.tiling import LINE, TuningConfig

FP8 = jnp.float8_e4m3fn
_ACC_SLOTS = 2


def _tiled(columns: int, dtype: Any) -> tuple[plgpu.Transform, ...]:
    """The layout tensor cores and TMA share: rows by eight, swizzled as wide as the columns are."""
    swizzle = columns * jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def _swizzles(chip: Chip, widths: Sequence[int], interpret: bool) -> list[int]:
    """Columns of each swizzle that the ring is used with, the wider first.

    TMA cuts what is in device memory along the swizzle, so each K must be a multiple of its own. Down of 64
    tokens takes 38.6 us on one H200 where weights come in lines of 128, 41.6 where in halves of them.
    """
    needed = {LINE if width % LINE == 0 else LINE // 2 for width in widths}
    # The interpreter takes memory that is used in turns for a race, and knows no swizzle.
    is_shared = chip.architecture == "sm90" and not interpret
    return sorted(needed, reverse=True) if is_shared else [min(needed)]


def padding(num_tokens: int) -> int:
    """Tokens to add so that TMA, which counts them by eights, can address the last ones."""
    return -num_tokens % 8 if num_tokens > 8 else 0


def scratch_types(
    chip: Chip,
    config: TuningConfig,
    widths: Sequence[int],
    *,
    halves: int,
    num_copies: int,
    num_scale_copies: int,
    interpret: bool,
) -> dict[str, Any]:
    """The main loop's own memory and barriers.

    Args:
      widths: every K that is walked.
      halves: 1, or 2 where gate rows and up rows are multiplied side by side.
      num_copies: copies that fetch_weights and fetch_tokens issue.
      num_scale_copies: copies that fetch_row_scales and fetch_token_scales issue.
    """
    is_sm100 = chip.architecture == "sm100"
    stages, warpgroups, step = config.stages, config.warpgroups, config.step
    # Who takes turns never waits for what the other one reads, so barriers of one's own count that.
    readers, teams = (1, warpgroups) if config.takes_turns else (warpgroups, 1)
    weights = (stages, halves, config.cta_rows, step)
    if config.is_compact:
        weights = (1, halves, stages * config.tile_rows + WGMMA_ROWS - config.tile_rows, step)
    shapes = weights, (stages, config.tokens, step)
    rings = [
        [plgpu.SMEM(shape, FP8, transforms=_tiled(columns, FP8)) for shape in shapes]
        for columns in _swizzles(chip, widths, interpret)
    ]
    types = {
        "ring": plgpu.RefUnion(*rings) if len(rings) > 1 else rings,
        "full": plgpu.Barrier(num_arrivals=num_copies, num_barriers=teams * stages),
        "empty": plgpu.Barrier(
            num_arrivals=1 if is_sm100 else readers,
            num_barriers=stages,
            orders_tensor_core=is_sm100,
        ),
        "staged": plgpu.SMEM(
            (warpgroups, config.store_tokens, config.rows),
            jnp.bfloat16,
            transforms=_tiled(math.gcd(config.store_rows // config.last_cuts, 64), jnp.bfloat16),
        ),
        "scales_full": plgpu.Barrier(num_arrivals=num_scale_copies, num_barriers=SCALE_SLOTS),
        "scales_empty": plgpu.Barrier(num_arrivals=readers, num_barriers=SCALE_SLOTS),
    }
    if is_sm100:
        accumulator = plgpu.TMEM((config.rows, config.tokens), jnp.float32)
        types["accumulators"] = [accumulator] * (_ACC_SLOTS * warpgroups * halves)
        types["products_full"] = plgpu.Barrier(num_barriers=_ACC_SLOTS, orders_tensor_core=True)
        types["products_empty"] = plgpu.Barrier(
            num_arrivals=warpgroups, num_barriers=_ACC_SLOTS, orders_tensor_core=True
        )
    return types


def token_scales(config: TuningConfig) -> Any:
    """Slots for the scales of a tile's tokens, each at a multiple of the 128 bytes that TMA needs."""
    return plgpu.SMEM((SCALE_SLOTS, pl.cdiv(config.tokens, 32) * 32), jnp.float32)


def send(
    config: TuningConfig, staged: Any, out: Any, token: jax.Array, row: jax.Array, cuts: int = 1
) -> None:
    """Stores what was staged, of a tile cut into so many, to out[token..., row...]; what lies outside of
    it is dropped."""
    rows = config.store_rows // cuts
    # A part of the columns is contiguous in the tiled memory only eight tokens at a time.
    group = config.store_tokens if rows == config.rows else 8
    # A group past the end must not be sent where fewer than eight tokens make up the whole array:
    # device memory is then addressed without the number of eights, and it would land on the first.
    for first in range(0, min(config.store_tokens, out.shape[0]), group):
        plgpu.copy_smem_to_gmem(
            staged.at[pl.ds(first, group), pl.ds(0, rows)],
            out.at[pl.ds(token + first, group), pl.ds(row, rows)],
        )


def launch(
    body: Callable[..., None],
    *,
    name: str,
    chip: Chip,
    config: TuningConfig,
    out_type: Any,
    scratch: Mapping[str, Any],
    num_ctas: int,
    waits: bool,
    interpret: bool,
) -> Callable[..., Any]:
    """A kernel with a warpgroup for each share of the weight rows, and one that feeds them.

    Args:
      waits: whether all threads wait for the kernel ahead at once; where not, the body does.
    """
    return launch_order.kernel(
        body,
        out_type=out_type,
        scratch_types=dict(scratch),
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        waits=waits,
        kernel_name=name,
    )


def stream(
    chip: Chip, config: TuningConfig, num_ctas: int, streams: Streams, scratch: Mapping[str, Any]
) -> None:
    """Runs the main loop inside a kernel body, over every tile of this CTA."""
    warpgroup = lax.axis_index("warpgroup")
    is_feeder = warpgroup == config.warpgroups
    loop = Loop(chip, config, num_ctas, streams, scratch)
    if chip.architecture == "sm90":
        _stream_sm90(loop, warpgroup, is_feeder)
    else:
        _stream_sm100(loop, warpgroup, is_feeder)


def _take_registers(config: TuningConfig, count: int) -> None:
    """Shares out registers where three warpgroups would have 168 each, too few for large tiles."""
    if config.warpgroups == 2:
        plgpu.set_max_registers(count, action="decrease" if count < 168 else "increase")


def _stream_sm90(
    loop: Loop,
    warpgroup: jax.Array,
    is_feeder: jax.Array,
) -> None:
    """wgmma: each warpgroup issues its own products and keeps them in registers."""
    config, empty = loop.config, loop.scratch["empty"]
    blocks = [
        (half, pl.ds(config.first_row(warpgroup) + first, WGMMA_ROWS))
        for first in range(0, config.rows, WGMMA_ROWS)
        for half in range(loop.halves)
    ]

    @pl.when(is_feeder)
    def _():
        _take_registers(config, 40)
        if config.is_fed_by_warp or loop.streams.await_tokens:
            plgpu.warp_map(lambda warp: _feed_by_warps(loop, warp, 0, 1))
        else:
            loop.feed()

    @pl.when(jnp.logical_not(is_feeder))
    def _():
        _take_registers(config, 232)

        def multiply_with(ring: Any, number: jax.Array, place: Any, first_step: jax.Array) -> None:
            weights, tokens = ring
            num_steps = loop.streams.num_steps(place)

            def multiply(*accumulators: Any) -> list[jax.Array]:
                def step(index: jax.Array, _: None) -> None:
                    stage = loop.stage(first_step + index)
                    plgpu.barrier_wait(loop.full(number, stage))
                    for (half, rows), accumulator in zip(blocks, accumulators, strict=True):
                        plgpu.wgmma(
                            accumulator,
                            loop.weights(weights, stage, WGMMA_ROWS).at[half, rows],
                            tokens.at[stage].transpose((1, 0)),
                        )
                    # All but this step's products are done: the stage before is free.
                    plgpu.wgmma_wait(len(accumulators))

                    @pl.when(index > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[loop.stage(first_step + index - 1)])

                lax.fori_loop(0, num_steps, step, None)
                products = [accumulator[...] for accumulator in accumulators]
                plgpu.barrier_arrive(empty.at[loop.stage(first_step + num_steps - 1)])
                return products

            accumulator = plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, config.tokens), jnp.float32)
            products = pl.run_scoped(multiply, *[accumulator] * len(blocks))

            def of_block(block: int, first: int, count: int) -> list[jax.Array]:
                mine = products[block * loop.halves : (block + 1) * loop.halves]
                if count == config.tokens:
                    return mine
                mine = [plgpu.layout_cast(half, plgpu.Layout.WGMMA) for half in mine]
                return [half[:, first : first + count] for half in mine]

            loop.finish(number, place, warpgroup, of_block)

        def multiply_tile(number: jax.Array, place: Any, first_step: jax.Array) -> None:
            if loop.streams.is_narrow is None or len(loop.rings) == 1:
                multiply_with(loop.rings[0], number, place, first_step)
                return
            is_narrow = loop.streams.is_narrow(place)
            for ring, is_of in zip(
                loop.rings, (jnp.logical_not(is_narrow), is_narrow), strict=True
            ):

                @pl.when(is_of)
                def _(ring: Any = ring):
                    multiply_with(ring, number, place, first_step)

        def multiply_mine(number: jax.Array, place: Any, first_step: jax.Array) -> None:
            @pl.when(loop.turn(number) == warpgroup)
            def _():
                multiply_tile(number, place, first_step)

        loop.over_tiles(multiply_mine if config.takes_turns else multiply_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _feed_by_warps(loop: Loop, warp: jax.Array, of_all: int, of_tokens: int) -> None:
    """Feeds from one warp, or tokens that are to be waited for from another."""
    await_tokens = loop.streams.await_tokens

    @pl.when(warp == of_all)
    def _():
        loop.feed(tokens=await_tokens is None)

    if await_tokens:

        @pl.when(warp == of_tokens)
        def _():
            await_tokens()
            loop.feed(weights=False)


def _stream_sm100(loop: Loop, warpgroup: jax.Array, is_feeder: jax.Array) -> None:
    """tcgen05: one warp issues every product into tensor memory, the warpgroups only finish them."""
    config, scratch = loop.config, loop.scratch
    products_full, products_empty = scratch["products_full"], scratch["products_empty"]

    def accumulators(slot: int, group: int) -> list[Any]:
        first = (slot * config.warpgroups + group) * loop.halves
        return scratch["accumulators"][first : first + loop.halves]

    def multiply_tile(number: jax.Array, place: Any, first_step: jax.Array) -> None:
        for slot in range(_ACC_SLOTS):

            @pl.when(lax.rem(number, jnp.int32(_ACC_SLOTS)) == slot)
            def _(slot: int = slot):
                @pl.when(number >= _ACC_SLOTS)
                def _():
                    plgpu.barrier_wait(products_empty.at[slot])

                _multiply_sm100(loop, accumulators, slot, place, first_step)
                plgpu.tcgen05_commit_arrive(products_full.at[slot])

    def finish_tile(number: jax.Array, place: Any, first_step: jax.Array) -> None:
        del first_step
        for slot in range(_ACC_SLOTS):
            for group in range(config.warpgroups):
                is_mine = lax.rem(number, jnp.int32(_ACC_SLOTS)) == slot
                if config.warpgroups > 1:
                    is_mine &= warpgroup == group

                @pl.when(is_mine)
                def _(slot: int = slot, group: int = group):
                    def products(_: int, first: int, count: int) -> list[jax.Array]:
                        part = pl.ds(first, count)
                        halves = accumulators(slot, group)
                        return [plgpu.async_load_tmem(half.at[:, part]) for half in halves]

                    plgpu.barrier_wait(products_full.at[slot])
                    loop.finish(number, place, warpgroup, products)
                    plgpu.wait_load_tmem()
                    plgpu.barrier_arrive(products_empty.at[slot])

    @pl.when(is_feeder)
    def _():
        _take_registers(config, 40)

        @plgpu.warp_map
        def _(warp: jax.Array):
            _feed_by_warps(loop, warp, 0, 2)

            @pl.when(warp == 1)
            def _():
                loop.over_tiles(multiply_tile)

    @pl.when(jnp.logical_not(is_feeder))
    def _():
        _take_registers(config, 232)
        loop.over_tiles(finish_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _multiply_sm100(
    loop: Loop,
    accumulators: Callable[[int, int], list[Any]],
    slot: int,
    place: Any,
    first_step: jax.Array,
) -> None:
    """Issues the products of one tile; the tensor core itself frees each stage when it has read it."""
    config, scratch = loop.config, loop.scratch
    [(weights, tokens)] = loop.rings

    def step(index: jax.Array, _: None) -> None:
        stage = loop.stage(first_step + index)
        plgpu.barrier_wait(scratch["full"].at[stage])
        pending = [
            (accumulator, weights.at[stage, half, pl.ds(group * config.rows, config.rows)])
            for group in range(config.warpgroups)
            for half, accumulator in enumerate(accumulators(slot, group))
        ]
        for number, (accumulator, operand) in enumerate(pending):
            is_last = number == len(pending) - 1
            plgpu.tcgen05_mma(
                accumulator,
                operand,
                tokens.at[stage].transpose((1, 0)),
                scratch["empty"].at[stage] if is_last else None,
                accumulate=index > 0,
            )

    lax.fori_loop(0, loop.streams.num_steps(place), step, None)
