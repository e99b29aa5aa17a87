"""Attention of a prefill step over the paged cache: tiles of a prompt's queries, flash style.

Knows neither requests nor how the pages were filled.

Queries that share a KV head are rows of one matrix, tokens times heads of the group, cut without
regard to tokens: each row has its own last visible position. A CTA takes some warpgroups' rows past
the keys they see (prefill_consumer), first those that all of them see, then those that need masks. One
more warpgroup brings pages ahead (prefill_producer). On sm90 there are as many CTAs as
multiprocessors, and they go through the tiles of queries, each with the next one's loads under way.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int32

from glm_jax.pallas import launch_order, linked
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.prefill_consumer import HEAD_DIM, Tcgen05, Tiles, Wgmma
from glm_jax.pallas.prefill_feeder import STAGES, Copier, Course, Widener
from glm_jax.pallas.prefill_producer import Item, Producer
from glm_jax.pallas.widen import ROWS, transforms, widen_pages

FP8 = jnp.float8_e4m3fn
# Bytes that widened pages may take for a while, and rows of queries that are worth it: as many tiles of
# queries otherwise widen the same pages again.
_MOST_WIDENED, _FEWEST_QUERIES = 1 << 27, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
      tile_size: keys per step. Part of the answer: it decides the order of sums.
      stages: tiles of keys and values in shared memory at a time.
      warpgroups: warpgroups of queries per CTA, each of 64 rows on sm90 and 128 on sm100.
    """

    tile_size: int = 128
    stages: int = 2
    warpgroups: int = 2

    def __post_init__(self) -> None:
        if self.tile_size % 64:
            raise ValueError(f"{self.tile_size=} must be a multiple of 64")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")
        if self.warpgroups not in (1, 2):
            raise ValueError(f"{self.warpgroups=} must be 1 or 2")


class Plan(NamedTuple):
    """What depends on positions alone.

    Attributes:
      visible: each query row's last position.
      items: of each tile of query rows, its row of positions, its number there, and the least and the
        largest of its rows' last positions; the largest first. Rows at -1 do not count for the least.
      last: of each row of positions, the largest.
    """

    visible: Int32[Array, "B padded"]
    items: Int32[Array, "items 4"]
    last: Int32[Array, " B"]


def make_plan(
    positions: Int32[Array, "B T"],
    query_groups: int,
    *,
    chip: Chip,
    config: TuningConfig | None = None,
) -> Plan:
    """The plan for all layers of a step: XLA would make it in each anew."""
    consumer = _consumer_of(chip)
    config = config or TuningConfig(tile_size=consumer.tile_size)
    tile_rows = consumer.rows * config.warpgroups
    rows = jnp.repeat(positions, query_groups, axis=1)
    padding = -rows.shape[1] % tile_rows
    rows = jnp.pad(rows, ((0, 0), (0, padding)), constant_values=-1)
    tiles = rows.reshape(rows.shape[0], -1, tile_rows)
    least = jnp.where(tiles >= 0, tiles, jnp.iinfo(jnp.int32).max - 1).min(-1)
    last = tiles.max(-1)
    row, number = (lax.broadcasted_iota(jnp.int32, last.shape, axis) for axis in range(2))
    items = jnp.stack([row, number, least, last], axis=-1).reshape(-1, 4)
    # Few enough that counting what comes before each is less than a sort is to XLA.
    ours, others = last.reshape(-1, 1), last.reshape(1, -1)
    is_earlier = jnp.tri(last.size, k=-1, dtype=bool)
    place = jnp.sum((others > ours) | ((others == ours) & is_earlier), axis=1)
    ordered = jnp.zeros_like(items).at[place].set(items, unique_indices=True)
    return Plan(rows, ordered, last.max(-1))


def attend(
    q: BFloat16[Array, "B T K G H"],
    k_pages: Any,
    v_pages: Any,
    layer: Int32[Array, ""] | int,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
    *,
    plan: Plan | None = None,
    chip: Chip,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "B T K G H"]:
    """Attends each query to positions 0 … its own of its row's pages.

    Args:
      k_pages, v_pages: [L, pages, K, page_size, H], bfloat16 or FP8 of scale 1; arrays or Refs.
      layer: index into the pages.
      positions: of each query; one at -1 sees nothing and gets zeros. What pages hold beyond a row's
        last position is not seen, whatever it is.
      plan: what make_plan makes of the positions, for all layers.

    With several KV heads on a device, queries and answers are transposed by XLA around the kernel.

    Raises:
      NotImplementedError: the head is not 128 wide, or pages do not tile `config.tile_size`.
    """
    num_rows, num_tokens, kv_heads, query_groups, head_dim = q.shape
    consumer = _consumer_of(chip)
    config = config or TuningConfig(tile_size=consumer.tile_size)
    page_size, dtype = k_pages.shape[3], jnp.dtype(k_pages.dtype)
    if head_dim != HEAD_DIM:
        raise NotImplementedError(f"{head_dim=}: heads are {HEAD_DIM} wide")
    if config.tile_size % page_size or page_size % 8:
        raise NotImplementedError(f"{page_size=}: tiles of {config.tile_size=} are whole pages")
    if dtype not in (jnp.bfloat16, FP8):
        raise NotImplementedError(f"{dtype=}: pages are bfloat16 or FP8")
    queries = q.swapaxes(1, 2).reshape(num_rows, kv_heads, num_tokens * query_groups, HEAD_DIM)
    plan = plan or make_plan(positions, query_groups, chip=chip, config=config)
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    in_order = dtype == FP8 and _widens_before(queries.shape, page_table.shape, page_size)
    if in_order:
        pages = k_pages, v_pages
        k_pages, v_pages = widen_pages(*pages, layers, page_table, plan.last, interpret=interpret)
        dtype = jnp.dtype(k_pages.dtype)
        tile = config.tile_size
        if kv_heads == 1 and page_table.shape[1] * page_size % tile == 0:
            # A copy a tile, not a page.
            k_pages, v_pages = (x.reshape(1, -1, 1, tile, HEAD_DIM) for x in (k_pages, v_pages))
    kernel = _kernel(queries.shape, k_pages.shape[3], dtype, in_order, chip, config, interpret)
    operands = plan.visible, plan.items, layers, page_table, k_pages, v_pages
    attended = kernel(queries, *operands)
    return attended.reshape(num_rows, kv_heads, num_tokens, query_groups, HEAD_DIM).swapaxes(1, 2)


def _widens_before(
    queries_shape: tuple[int, ...], table_shape: tuple[int, ...], page_size: int
) -> bool:
    """Whether a kernel of its own widens FP8 pages, once, or every tile of queries those it sees."""
    _, kv_heads, num_queries, _ = queries_shape
    widened = 2 * math.prod(table_shape) * page_size * kv_heads * HEAD_DIM * 2
    is_worth_it = num_queries >= _FEWEST_QUERIES and page_size % ROWS == 0
    return is_worth_it and widened <= _MOST_WIDENED


def _consumer_of(chip: Chip) -> type[Wgmma] | type[Tcgen05]:
    return Wgmma if chip.architecture == "sm90" else Tcgen05


def _kernel(
    queries_shape: tuple[int, ...],
    page_size: int,
    cache_dtype: Any,
    in_order: bool,
    chip: Chip,
    config: TuningConfig,
    interpret: bool,
) -> Any:
    num_rows, kv_heads, num_queries, _ = queries_shape
    tile, stages, warpgroups = config.tile_size, config.stages, config.warpgroups
    consumer = _consumer_of(chip)(interpret)
    wg_rows = consumer.rows
    num_items = pl.cdiv(num_queries, wg_rows * warpgroups) * num_rows * kv_heads
    walks = consumer.keeps_queries
    # Where registers can be shared out, a warpgroup that only brings tiles is faster.
    is_fed = walks and stages == STAGES and warpgroups == 2 and linked.is_linked()
    registers = consumer.widening_registers if cache_dtype == FP8 else consumer.registers
    num_ctas = min(chip.num_cores, num_items) if walks else num_items
    is_fp8 = cache_dtype == FP8
    # FP8 numbers are exact in float16, and widen two at a time.
    operand = jnp.float16 if is_fp8 else cache_dtype

    def body(
        q_gmem, visible_gmem, items_gmem, layer_gmem, table_gmem, k_gmem, v_gmem,
        out_gmem, q_smem, out_smem, tiles_smem, narrow_smem, q_barrier, landed, full, empty, scratch,
    ):  # fmt: skip
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        def item_at(turn: Array) -> Item:
            """CTAs go through all there are, the longest first, in turns back and forth."""
            place = jnp.where(lax.rem(turn, 2) == 0, cta, num_ctas - 1 - cta)
            place = jnp.minimum(turn * num_ctas + place, num_items - 1)
            row, *rest = (items_gmem[place // kv_heads, i] for i in range(4))
            return Item(row, place % kv_heads, *rest)

        whole, rest = divmod(num_items, num_ctas)
        is_in_last = cta < rest if whole % 2 == 0 else num_ctas - 1 - cta < rest
        num_turns = whole + is_in_last.astype(jnp.int32)
        # Widened pages are one layer's.
        layer = jnp.int32(0) if in_order else layer_gmem[0]
        pages: dict[str, Any] = {
            "layer": layer, "table": table_gmem, "in_order": in_order, "pages": (k_gmem, v_gmem),
            "pages_per_row": k_gmem.shape[1] // num_rows if in_order else table_gmem.shape[1],
            "tiles": tiles_smem, "full": full, "empty": empty, "interpret": interpret,
        }  # fmt: skip

        def feeder() -> Copier | Widener:
            pages.update(warpgroup=wg, num_turns=num_turns, item_at=item_at)
            if is_fp8:
                return Widener(**pages, narrow=narrow_smem, landed=landed)
            return Copier(**pages, silenced=landed)

        def produce() -> None:
            plgpu.set_max_registers(registers[0], action="decrease")
            producer = Producer(**pages, narrow=narrow_smem if is_fp8 else None, landed=landed)
            producer.bring(num_turns, item_at)

        def consume() -> None:
            if not is_fed:
                plgpu.set_max_registers(registers[1], action="increase")
            feed = feeder() if is_fed else None
            my_q = q_smem.at[wg]
            my_out = out_smem.at[wg] if consumer.keeps_queries else my_q
            consumer.begin(scratch, wg)

            def rows_of(item: Item) -> Any:
                return pl.ds((item.number * warpgroups + wg) * wg_rows, wg_rows)

            def fetch_queries(item: Item) -> None:
                rows = q_gmem.at[item.row, item.kv_head, rows_of(item)]
                plgpu.copy_gmem_to_smem(rows, my_q, q_barrier.at[wg])

            def visit(turn: Array, carry: Any) -> Any:
                begun, ahead = carry
                # Asked for again, not kept: it is near by now, and registers are full.
                item = item_at(turn)
                num_tiles = (item.last + tile) // tile
                visible = plgpu.load(
                    visible_gmem.at[item.row, rows_of(item)],
                    layout=consumer.layout.reduce(1),
                    optimized=False,
                )
                plgpu.barrier_wait(q_barrier.at[wg])
                queries = consumer.prepare(my_q, operand, scratch, wg)
                if walks:
                    pl.when(turn + 1 < num_turns)(lambda: fetch_queries(item_at(turn + 1)))
                ahead = consumer.consume(
                    Tiles(
                        queries=queries,
                        answers=my_out,
                        await_answers=lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True),
                        visible=visible,
                        keys=tiles_smem[0],
                        values=tiles_smem[1],
                        k_full=full[0],
                        v_full=full[1],
                        k_empty=empty[0],
                        v_empty=empty[1],
                        num_tiles=num_tiles,
                        num_unmasked=jnp.minimum((item.least + 1) // tile, num_tiles),
                        begun=begun,
                        warpgroup=wg,
                        scratch=scratch,
                        feed=feed and (feed, Course(turn, begun, item)),
                        ahead=ahead,
                    )
                )
                plgpu.commit_smem()
                rows = out_gmem.at[item.row, item.kv_head, rows_of(item)]
                plgpu.copy_smem_to_gmem(my_out, rows)
                return begun + num_tiles, ahead

            zero = jnp.int32(0)
            first = item_at(zero)
            fetch_queries(first)
            ahead = feed.begin(Course(zero, zero, first)) if feed else ()
            lax.fori_loop(0, num_turns, visit, (zero, ahead))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if is_fed:
            consume()
            return
        # Also where there is nothing to bring: the others' increase waits for the registers given up there.
        pl.when(wg == warpgroups)(produce)
        pl.when(wg < warpgroups)(consume)

    def memory(*shape: int, dtype: Any) -> Any:
        return plgpu.SMEM((*shape, HEAD_DIM), dtype, transforms=transforms(dtype))

    pages_per_tile = tile // page_size
    queries = memory(warpgroups, wg_rows, dtype=jnp.bfloat16)
    wide = memory(stages, tile, dtype=operand)
    once = plgpu.Barrier(num_barriers=stages)
    # What lands does so page by page; all else is handed on at once.
    landing = plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=2 if is_fp8 else stages)
    if is_fed and not is_fp8:
        landed, full = plgpu.Barrier(num_barriers=2), (landing, landing)
    else:
        landed, full = landing, (once if is_fp8 else landing, once)
    # Who copies knows what it has read itself.
    readers = 1 if is_fed and not is_fp8 else warpgroups
    read = plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
    return launch_order.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(queries_shape, jnp.bfloat16),
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=warpgroups + (not is_fed),
        thread_name="wg",
        scratch_types=(
            queries,
            queries if consumer.keeps_queries else [],
            (wide, wide),
            memory(2, tile, dtype=FP8) if is_fp8 else [],
            plgpu.Barrier(num_barriers=warpgroups),
            landed,
            full,
            (read, read),
            consumer.scratch_types(warpgroups, tile, operand),
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="prefill_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
