"""Attention of a prefill step over the paged cache: tiles of a prompt's queries, flash style.

Knows neither requests nor how the pages were filled.

Queries that share a KV head are rows of one matrix, tokens times heads of the group, cut without
regard to tokens: each row has its own last visible position. A CTA takes some warpgroups' rows past
the keys they see (prefill_consumer), first those that all of them see, then those that need masks. One
more warpgroup fetches pages ahead by TMA, widens FP8 ones, and silences what no row may see.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int32

from glm_jax.pallas.chip import Chip
from glm_jax.pallas.prefill_consumer import HEAD_DIM, Tcgen05, Tiles, Wgmma

FP8 = jnp.float8_e4m3fn
_SWIZZLE = 128
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 104, 200


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


def attend(
    q: BFloat16[Array, "B T K G H"],
    k_pages: Any,
    v_pages: Any,
    layer: Int32[Array, ""] | int,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
    *,
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
    tile_rows = consumer.rows * config.warpgroups
    last_visible, bounds = _visibility(positions, query_groups, tile_rows)
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    kernel = _kernel(queries.shape, page_size, dtype, chip, config, interpret)
    attended = kernel(queries, last_visible, bounds, layers, page_table, k_pages, v_pages)
    return attended.reshape(num_rows, kv_heads, num_tokens, query_groups, HEAD_DIM).swapaxes(1, 2)


def _visibility(
    positions: Int32[Array, "B T"], query_groups: int, tile_rows: int
) -> tuple[Int32[Array, "B padded"], Int32[Array, "B tiles 2"]]:
    """Each query row's last visible position; of each tile, the least of its rows' and the largest.

    Rows at -1 do not count for the least. It depends on positions alone: once a step, when XLA has
    merged what is the same in all layers.
    """
    rows = jnp.repeat(positions, query_groups, axis=1)
    padding = -rows.shape[1] % tile_rows
    rows = jnp.pad(rows, ((0, 0), (0, padding)), constant_values=-1)
    tiles = rows.reshape(rows.shape[0], -1, tile_rows)
    least = jnp.where(tiles >= 0, tiles, jnp.iinfo(jnp.int32).max - 1).min(-1)
    return rows, jnp.stack([least, tiles.max(-1)], axis=-1)


def _swizzled(columns: int) -> tuple[Any, ...]:
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(_SWIZZLE)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzle


def _consumer_of(chip: Chip) -> type[Wgmma] | type[Tcgen05]:
    return Wgmma if chip.architecture == "sm90" else Tcgen05


def _kernel(
    queries_shape: tuple[int, ...],
    page_size: int,
    cache_dtype: Any,
    chip: Chip,
    config: TuningConfig,
    interpret: bool,
) -> Any:
    num_rows, kv_heads, num_queries, _ = queries_shape
    tile, stages, warpgroups = config.tile_size, config.stages, config.warpgroups
    consumer = _consumer_of(chip)(interpret)
    wg_rows = consumer.rows
    num_tiles_q = pl.cdiv(num_queries, wg_rows * warpgroups)
    is_fp8 = cache_dtype == FP8
    pages_per_tile = tile // page_size

    def body(
        q_gmem, visible_gmem, bounds_gmem, layer_gmem, table_gmem, k_gmem, v_gmem, out_gmem,
        q_smem, k_smem, v_smem, narrow_smem, q_barrier, landed, k_full, v_full, empty, scratch,
    ):  # fmt: skip
        row, kv_head = lax.axis_index("row"), lax.axis_index("kv_head")
        # The last tiles see most: they come first, and the others fill the end of the launch.
        q_tile = num_tiles_q - 1 - lax.axis_index("tile")
        least, last = bounds_gmem[row, q_tile, 0], bounds_gmem[row, q_tile, 1]
        num_tiles = (last + tile) // tile
        num_unmasked = jnp.minimum((least + 1) // tile, num_tiles)
        wg = lax.axis_index("wg")

        def fetch(index, gmem, smem, barrier):
            for i in range(pages_per_tile):
                position = index * tile + i * page_size
                page = table_gmem[row, jnp.minimum(position, last) // page_size]
                plgpu.copy_gmem_to_smem(
                    gmem.at[layer_gmem[0], page, kv_head],
                    smem.at[pl.ds(i * page_size, page_size)],
                    barrier,
                )

        def silence(index, smem):
            # A share of 0 does not silence what another sequence left there: 0 * inf is NaN.
            @pl.when((index + 1) * tile > last + 1)
            def _silence():
                for start in range(0, tile, 64):
                    part = smem.at[pl.ds(start, 64)]
                    values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                    key = plgpu.broadcasted_iota(
                        jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA
                    )
                    part[...] = jnp.where(index * tile + start + key <= last, values, 0)

        def widen(narrow, wide):
            for start in range(0, tile, 64):
                part = pl.ds(start, 64)
                values = plgpu.load(narrow.at[part], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                wide[part] = values.astype(jnp.float32).astype(jnp.bfloat16)

        caches = ((k_gmem, k_smem), (v_gmem, v_smem))
        full = (k_full, v_full)

        def produce_wide(index, _):
            """Hands tile `index`, landed as FP8, to the consumers; fetches the next."""
            slot = lax.rem(index, stages)
            for which, (gmem, smem) in enumerate(caches):
                plgpu.barrier_wait(landed.at[which])
                pl.when(index >= stages)(lambda: plgpu.barrier_wait(empty[which].at[slot]))
                widen(narrow_smem.at[which], smem.at[slot])
                if which == 1:
                    silence(index, smem.at[slot])
                plgpu.commit_smem()
                plgpu.barrier_arrive(full[which].at[slot])
                pl.when(index + 1 < num_tiles)(
                    lambda: fetch(index + 1, gmem, narrow_smem.at[which], landed.at[which])
                )

        def produce_plain(index, _):
            """Hands on the values of tile `index`; fetches what comes stages - 1 later."""
            slot = lax.rem(index, stages)
            plgpu.barrier_wait(landed.at[slot])
            silence(index, v_smem.at[slot])
            plgpu.commit_smem()
            plgpu.barrier_arrive(v_full.at[slot])
            ahead = index + stages - 1

            @pl.when(ahead < num_tiles)
            def _fetch():
                ahead_slot = lax.rem(ahead, stages)
                for which, (gmem, smem) in enumerate(caches):
                    pl.when(index >= 1)(lambda: plgpu.barrier_wait(empty[which].at[ahead_slot]))
                    barrier = landed.at[ahead_slot] if which == 1 else k_full.at[ahead_slot]
                    fetch(ahead, gmem, smem.at[ahead_slot], barrier)

        # Also where there is nothing to bring: the others' increase waits for the registers given up here.
        @pl.when(wg == warpgroups)
        def _producer():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            if is_fp8:

                @pl.when(num_tiles > 0)
                def _fetch():
                    for which, (gmem, _) in enumerate(caches):
                        fetch(0, gmem, narrow_smem.at[which], landed.at[which])

            else:
                for index in range(stages - 1):

                    @pl.when(index < num_tiles)
                    def _fetch():
                        fetch(index, k_gmem, k_smem.at[index], k_full.at[index])
                        fetch(index, v_gmem, v_smem.at[index], landed.at[index])

            lax.fori_loop(0, num_tiles, produce_wide if is_fp8 else produce_plain, None)

        @pl.when(wg < warpgroups)
        def _consumer():
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            rows = pl.ds((q_tile * warpgroups + wg) * wg_rows, wg_rows)
            my_q = q_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_gmem.at[row, kv_head, rows], my_q, q_barrier.at[wg])
            visible = plgpu.load(
                visible_gmem.at[row, rows], layout=consumer.layout.reduce(1), optimized=False
            )
            plgpu.barrier_wait(q_barrier.at[wg])
            consumer.consume(
                Tiles(
                    queries=my_q,
                    visible=visible,
                    keys=k_smem,
                    values=v_smem,
                    k_full=k_full,
                    v_full=v_full,
                    k_empty=empty[0],
                    v_empty=empty[1],
                    num_tiles=num_tiles,
                    num_unmasked=num_unmasked,
                    warpgroup=wg,
                    scratch=scratch,
                )
            )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(my_q, out_gmem.at[row, kv_head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    wide = plgpu.SMEM((stages, tile, HEAD_DIM), jnp.bfloat16, transforms=_swizzled(64))
    narrow = (2, tile if is_fp8 else 8, HEAD_DIM)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(queries_shape, jnp.bfloat16),
        grid=(num_tiles_q, kv_heads, num_rows),
        grid_names=("tile", "kv_head", "row"),
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((warpgroups, wg_rows, HEAD_DIM), jnp.bfloat16, transforms=_swizzled(64)),
            wide,
            wide,
            plgpu.SMEM(narrow, FP8, transforms=_swizzled(128)),
            plgpu.Barrier(num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=2 if is_fp8 else stages),
            # Plain keys land where they are used, page by page; all else is handed on at once.
            plgpu.Barrier(num_arrivals=1 if is_fp8 else pages_per_tile, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            [plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)] * 2,
            consumer.scratch_types(warpgroups, tile),
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="prefill_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
