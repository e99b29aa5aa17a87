"""Attention of a decode step over the paged cache: a few queries a row, every key and value read once.

Knows neither requests nor how the pages were filled.

A row's positions are cut into splits at fixed places, so that an answer depends neither on the rows
beside it nor on how many there are. A CTA takes one split of one KV head: pages come by TMA, several
ahead; scores and sums are mma.sync's, which takes queries 16 at a time (a group of 12 wastes a
quarter, where wgmma and tcgen05 would take 64) and its operands from registers, so that FP8 pages are
widened on the way to it. The same code therefore serves sm90 and sm100. A second kernel combines the
splits of a row in their order, and may quantize what it made for the projection that follows.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas.chip import Chip

HEAD_DIM = 128
FP8 = jnp.float8_e4m3fn
_FP8_MAX = 448.0
_TINY = float(jnp.finfo(jnp.float32).tiny)
_SCALE = HEAD_DIM**-0.5 * math.log2(math.e)
# Below any score. A maximum that starts here, not at -inf, never makes a difference of infinities.
_LOWEST = -1e30
_SWIZZLE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
      split_size: positions per CTA. Part of the answer: it decides the order of sums.
      tile_size: keys per step of a CTA. Part of the answer too.
      stages: tiles of keys and values in shared memory at a time.
    """

    split_size: int = 512
    tile_size: int = 64
    stages: int = 3

    def __post_init__(self) -> None:
        if self.tile_size % 64:
            raise ValueError(f"{self.tile_size=} must be a multiple of 64")
        if self.split_size % self.tile_size:
            raise ValueError(f"{self.split_size=} must be a multiple of {self.tile_size=}")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")


@dataclass(frozen=True, slots=True)
class _Shape:
    num_rows: int
    num_tokens: int
    kv_heads: int
    query_groups: int
    page_size: int
    pages_per_sequence: int
    cache_dtype: Any

    @property
    def queries(self) -> int:
        """Queries that share a KV head."""
        return self.num_tokens * self.query_groups

    @property
    def mma_rows(self) -> int:
        # What fills whole tiles of one, two or four warps: all four go through a tile's softmax.
        return next(
            (rows for rows in (16, 32) if self.queries <= rows), pl.cdiv(self.queries, 64) * 64
        )

    @property
    def stored_rows(self) -> int:
        """Rows of a partial answer: the combining kernel reads each token's in fours."""
        last = (self.num_tokens - 1) * self.query_groups + pl.cdiv(self.query_groups, 4) * 4
        return max(self.mma_rows, last)

    def num_splits(self, config: TuningConfig) -> int:
        return pl.cdiv(self.pages_per_sequence * self.page_size, config.split_size)


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

    Raises:
      NotImplementedError: the head is not 128 wide, or pages do not tile `config.tile_size`.
    """
    del chip  # The same instructions on all of them.
    operands = q, k_pages, v_pages, layer, page_table, positions
    shape, config, partials = _partials(operands, config, interpret)
    return _combine_kernel(shape, config, False, interpret)(positions, *partials)


def attend_quantized(
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
) -> tuple[Float8e4m3fn[Array, "rows K GH"], Float32[Array, "rows K"]]:
    """As `attend`, for an FP8 projection that follows: values, and a scale for each KV head.

    They are what fp8.quantize_rows makes of `attend`'s answer [B * T, K, G * H].
    """
    del chip
    operands = q, k_pages, v_pages, layer, page_table, positions
    shape, config, partials = _partials(operands, config, interpret)
    values, scale = _combine_kernel(shape, config, True, interpret)(positions, *partials)
    return values.reshape(-1, shape.kv_heads, shape.query_groups * HEAD_DIM), scale


def _partials(
    operands: tuple[Any, ...], config: TuningConfig | None, interpret: bool
) -> tuple[_Shape, TuningConfig, tuple[Array, ...]]:
    q, k_pages, v_pages, layer, page_table, positions = operands
    num_rows, num_tokens, kv_heads, query_groups, head_dim = q.shape
    config = config or TuningConfig()
    shape = _Shape(
        num_rows, num_tokens, kv_heads, query_groups, k_pages.shape[3], page_table.shape[1],
        jnp.dtype(k_pages.dtype),
    )  # fmt: skip
    if head_dim != HEAD_DIM:
        raise NotImplementedError(f"{head_dim=}: heads are {HEAD_DIM} wide")
    if config.tile_size % shape.page_size or shape.page_size % 8:
        raise NotImplementedError(
            f"{shape.page_size=}: tiles of {config.tile_size=} are whole pages"
        )
    if shape.cache_dtype not in (jnp.bfloat16, FP8):
        raise NotImplementedError(f"{shape.cache_dtype=}: pages are bfloat16 or FP8")
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    kernel = _split_kernel(shape, config, interpret)
    return shape, config, kernel(q, layers, page_table, positions, k_pages, v_pages)


def _mma(acc: Array, a: Array, b: Array, interpret: bool) -> Array:
    """acc + a @ b, accumulated in float32 by mma.sync, which the interpreter does not know."""
    if interpret:
        return acc + jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))
    return plgpu.mma(acc, a, b)


def _swizzled(columns: int, num_bytes: int = _SWIZZLE) -> tuple[Any, ...]:
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(num_bytes)  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzle


def _mma_layout(kind: plgpu.Layout, rows: int) -> Any:
    # The four warps stand side by side along keys, and along the head, unless rows fill more tiles.
    return kind(
        jnp.bfloat16, m_warps=next(warps for warps in (4, 2, 1) if rows % (16 * warps) == 0)
    )


def _split_kernel(shape: _Shape, config: TuningConfig, interpret: bool) -> Any:
    rows, groups, tile = shape.mma_rows, shape.query_groups, config.tile_size
    pages_per_tile = tile // shape.page_size
    pages_per_split = config.split_size // shape.page_size
    is_fp8 = shape.cache_dtype == FP8
    # An FP8 number is exact in float16, and its conversion one instruction for two of them.
    operand = jnp.float16 if is_fp8 else jnp.bfloat16
    lhs, rhs, accumulator = (
        _mma_layout(kind, rows)
        for kind in (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
    )

    # Warps that have no rows of their own exchange scores, so that the softmax of a tile needs no other
    # warp; those that have exchange nothing, but products want shares laid out as they read them.
    has_own_rows = rows % 64 == 0
    soft = accumulator if has_own_rows else lhs

    def body(
        q_gmem, layer_gmem, table_gmem, positions_gmem, k_gmem, v_gmem,
        out_gmem, largest_gmem, total_gmem,
        k_smem, v_smem, union_smem, largest_smem, total_smem, q_barrier, k_barrier, v_barrier,
    ):  # fmt: skip
        q_smem, (wide_smem, queries_smem, exchange_smem), out_smem = union_smem
        row, kv_head = lax.axis_index("row"), lax.axis_index("kv_head")
        split = lax.axis_index("split")
        first = split * config.split_size
        row_positions = [positions_gmem[row, token] for token in range(shape.num_tokens)]
        last = row_positions[0]
        for position in row_positions[1:]:
            last = jnp.maximum(last, position)
        place = (row, kv_head, split)

        @pl.when(first <= last)
        def _work():
            layer = layer_gmem[0]
            for token in range(shape.num_tokens):
                plgpu.copy_gmem_to_smem(
                    q_gmem.at[row, token, kv_head],
                    q_smem.at[pl.ds(token * groups, groups)],
                    q_barrier,
                )
            # All of them at once, ahead of their use: one latency instead of one a tile.
            last_page = last // shape.page_size
            pages = [
                table_gmem[row, jnp.minimum(split * pages_per_split + i, last_page)]
                for i in range(pages_per_split)
            ]
            num_tiles = jnp.minimum(config.split_size, last + 1 - first + tile - 1) // tile

            def fetch(index):
                slot = lax.rem(index, config.stages)
                for i in range(pages_per_tile):
                    page = pages[i]
                    for other in range(i + pages_per_tile, pages_per_split, pages_per_tile):
                        page = jnp.where(index * pages_per_tile + i == other, pages[other], page)
                    part = pl.ds(i * shape.page_size, shape.page_size)
                    for gmem, smem, barrier in (
                        (k_gmem, k_smem, k_barrier),
                        (v_gmem, v_smem, v_barrier),
                    ):
                        plgpu.copy_gmem_to_smem(
                            gmem.at[layer, page, kv_head], smem.at[slot, part], barrier.at[slot]
                        )

            for index in range(config.stages - 1):
                pl.when(index < num_tiles)(lambda index=index: fetch(jnp.int32(index)))
            plgpu.barrier_wait(q_barrier)
            queries = plgpu.load(q_smem, layout=lhs, optimized=False)
            queries_smem[...] = queries.astype(jnp.float32).astype(operand)
            row_of = plgpu.broadcasted_iota(jnp.int32, (rows, tile), 0, layout=soft)
            column_of = plgpu.broadcasted_iota(jnp.int32, (rows, tile), 1, layout=soft)

            def visible():
                last_visible = jnp.full((rows, tile), row_positions[-1], jnp.int32)
                for token in reversed(range(shape.num_tokens - 1)):
                    is_earlier = row_of < (token + 1) * groups
                    last_visible = jnp.where(is_earlier, row_positions[token], last_visible)
                return last_visible

            def widened(slot, start, is_masked):
                """A tile's values, where shares can meet them."""
                values_smem = v_smem.at[slot]
                if is_fp8:
                    narrow = plgpu.load(values_smem, layout=plgpu.Layout.WGMMA_UPCAST_2X)
                    wide_smem[...] = narrow.astype(operand)
                    values_smem = wide_smem
                if is_masked:
                    # A share of 0 does not silence what another sequence left there: 0 * inf is NaN.
                    values = plgpu.load(values_smem, layout=plgpu.Layout.WGMMA)
                    key = plgpu.broadcasted_iota(
                        jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA
                    )
                    values_smem[...] = jnp.where(start + key <= last, values, 0)
                return values_smem

            def visit(index, carry, *, is_masked):
                largest, total, out = carry
                ahead = index + config.stages - 1
                pl.when(ahead < num_tiles)(lambda: fetch(ahead))
                slot = lax.rem(index, config.stages)
                start = first + index * tile
                queries = plgpu.load(queries_smem, layout=lhs)
                plgpu.barrier_wait(k_barrier.at[slot])
                keys = plgpu.load(k_smem.at[slot].transpose((1, 0)), layout=rhs).astype(operand)
                zeros = plgpu.layout_cast(jnp.zeros((rows, tile), jnp.float32), accumulator)
                scores = _mma(zeros, queries, keys, interpret)
                if not has_own_rows:
                    exchange_smem[...] = scores
                plgpu.barrier_wait(v_barrier.at[slot])
                values_smem = widened(slot, start, is_masked)
                if not has_own_rows:
                    scores = plgpu.load(exchange_smem, layout=soft)
                if is_masked:
                    scores = jnp.where(start + column_of <= visible(), scores, -jnp.inf)
                new_largest = jnp.maximum(largest, scores.max(axis=1) * _SCALE)
                along = lax.broadcast_in_dim(new_largest, (rows, tile), [0])
                shares = jnp.exp2(scores * _SCALE - along)
                fade = jnp.exp2(largest - new_largest)
                total = total * fade + shares.sum(axis=1)
                fade = plgpu.layout_cast(fade, accumulator.reduce(1))
                out = out * lax.broadcast_in_dim(fade, (rows, HEAD_DIM), [0])
                weights = shares.astype(operand)
                if has_own_rows:
                    exchange_smem[...] = weights
                    weights = plgpu.load(exchange_smem, layout=lhs)
                values = plgpu.load(values_smem, layout=rhs)
                return new_largest, total, _mma(out, weights, values, interpret)

            row_layout = soft.reduce(1)
            carry = (
                plgpu.layout_cast(jnp.full((rows,), _LOWEST, jnp.float32), row_layout),
                plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), row_layout),
                plgpu.layout_cast(jnp.zeros((rows, HEAD_DIM), jnp.float32), accumulator),
            )
            # Up to where every token sees all keys, and past it.
            least = row_positions[0]
            for position in row_positions[1:]:
                least = jnp.minimum(least, position)
            num_whole = jnp.clip((least + 1 - first) // tile, 0, num_tiles)
            carry = lax.fori_loop(0, num_whole, partial(visit, is_masked=False), carry)
            carry = lax.fori_loop(num_whole, num_tiles, partial(visit, is_masked=True), carry)
            largest, total, out = carry
            largest_smem[...] = largest
            total_smem[...] = total
            out_smem[...] = out
            plgpu.commit_smem()
            for smem, gmem in (
                (out_smem, out_gmem),
                (largest_smem, largest_gmem),
                (total_smem, total_gmem),
            ):
                plgpu.copy_smem_to_gmem(smem, gmem.at[(*place, pl.ds(0, rows))])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    split_shape = (shape.num_rows, shape.kv_heads, shape.num_splits(config), shape.stored_rows)
    elements = _SWIZZLE // shape.cache_dtype.itemsize
    transforms, wide_transforms = _swizzled(elements), _swizzled(64)
    pages = plgpu.SMEM((config.stages, tile, HEAD_DIM), shape.cache_dtype, transforms=transforms)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*split_shape, HEAD_DIM), jnp.float32),
            jax.ShapeDtypeStruct(split_shape, jnp.float32),
            jax.ShapeDtypeStruct(split_shape, jnp.float32),
        ),
        grid=(shape.num_splits(config), shape.kv_heads, shape.num_rows),
        grid_names=("split", "kv_head", "row"),
        scratch_types=(
            pages,
            pages,
            plgpu.RefUnion(
                plgpu.SMEM((rows, HEAD_DIM), jnp.bfloat16),
                (
                    # Not less than the queries, as they came, take of the same memory.
                    plgpu.SMEM(
                        (tile if is_fp8 else rows, HEAD_DIM), operand, transforms=wide_transforms
                    ),
                    plgpu.SMEM((rows, HEAD_DIM), operand, transforms=wide_transforms),
                    plgpu.SMEM((rows, tile), operand, transforms=wide_transforms)
                    if has_own_rows
                    else plgpu.SMEM((rows, tile), jnp.float32, transforms=_swizzled(8, 32)),
                ),
                plgpu.SMEM((rows, HEAD_DIM), jnp.float32),
            ),
            plgpu.SMEM((rows,), jnp.float32),
            plgpu.SMEM((rows,), jnp.float32),
            plgpu.Barrier(num_arrivals=shape.num_tokens),
            plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=config.stages),
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="decode_attention_split",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


# A warp takes a row at a time.
_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


def _combine_kernel(
    shape: _Shape, config: TuningConfig, is_quantized: bool, interpret: bool
) -> Any:
    groups = shape.query_groups
    rows = pl.cdiv(groups, 4) * 4
    tile = (rows, HEAD_DIM)

    def body(positions_gmem, out_gmem, largest_gmem, total_gmem, *rest):
        *results_gmem, smem = rest
        token, kv_head = lax.axis_index("token"), lax.axis_index("kv_head")
        row, column = token // shape.num_tokens, token % shape.num_tokens
        part = pl.ds(column * groups, rows)
        num_splits = (positions_gmem[row, column] + config.split_size) // config.split_size

        def visit(split, carry):
            largest, total, out = carry
            place = (row, kv_head, split, part)
            row_layout = _ROWS.reduce(1)
            split_largest, split_total = (
                plgpu.load(gmem.at[place], layout=row_layout, optimized=False)
                for gmem in (largest_gmem, total_gmem)
            )
            split_out = plgpu.load(out_gmem.at[place], layout=_ROWS, optimized=False)
            new_largest = jnp.maximum(largest, split_largest)
            fade, share = jnp.exp2(largest - new_largest), jnp.exp2(split_largest - new_largest)
            out = out * lax.broadcast_in_dim(fade, tile, [0])
            out = out + split_out * lax.broadcast_in_dim(share, tile, [0])
            return new_largest, total * fade + split_total * share, out

        carry = (
            plgpu.layout_cast(jnp.full((rows,), _LOWEST, jnp.float32), _ROWS.reduce(1)),
            plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), _ROWS.reduce(1)),
            plgpu.layout_cast(jnp.zeros(tile, jnp.float32), _ROWS),
        )
        _, total, out = lax.fori_loop(0, num_splits, visit, carry)
        out = out / lax.broadcast_in_dim(jnp.where(total > 0, total, 1.0), tile, [0])
        attended = out.astype(jnp.bfloat16)
        if not is_quantized:
            smem[...] = attended
            plgpu.commit_smem()
            (attended_gmem,) = results_gmem
            plgpu.copy_smem_to_gmem(
                smem.at[pl.ds(0, groups)], attended_gmem.at[row, column, kv_head]
            )
        else:
            wide = attended.astype(jnp.float32)
            is_row = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=_ROWS) < groups
            # First within rows: the compiler finds no layouts for both at once.
            largest = jnp.max(jnp.max(jnp.where(is_row, jnp.abs(wide), 0.0), axis=1))
            scale = jnp.where(largest > _FP8_MAX * _TINY, largest / _FP8_MAX, 1.0)
            smem[...] = jnp.clip(wide / scale, -_FP8_MAX, _FP8_MAX).astype(FP8)
            plgpu.commit_smem()
            values_gmem, scale_gmem = results_gmem
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, groups)], values_gmem.at[token, kv_head])
            scale_gmem[token, kv_head] = scale
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    num_tokens = shape.num_rows * shape.num_tokens
    heads = (shape.kv_heads, groups, HEAD_DIM)
    attended = jax.ShapeDtypeStruct((shape.num_rows, shape.num_tokens, *heads), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((num_tokens, *heads), FP8)
    scale = jax.ShapeDtypeStruct((num_tokens, shape.kv_heads), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=(values, scale) if is_quantized else attended,
        grid=(num_tokens, shape.kv_heads),
        grid_names=("token", "kv_head"),
        scratch_types=(plgpu.SMEM(tile, FP8 if is_quantized else jnp.bfloat16),),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="decode_attention_combine",
    )
