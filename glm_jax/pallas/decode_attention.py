"""Attention of a decode step over the paged cache: a few queries a row, every key and value read once.

Knows neither requests nor how the pages were filled.

A row's positions are cut into splits at fixed places, so that an answer depends neither on the rows
beside it nor on how many there are. A CTA takes one split of one KV head: pages come by TMA, several
tiles ahead; its warps share out a tile's keys, keep a softmax and a sum each (warp_products), and add
them up in their order at the end. A second kernel does the same with the splits of a row, and may
quantize what it made for the projection that follows. The same code serves sm90 and sm100.
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
from glm_jax.pallas.warp_products import ROWS, WARP_ROWS, WarpProducts

HEAD_DIM = 128
FP8 = jnp.float8_e4m3fn
_FP8_MAX = 448.0
_TINY = float(jnp.finfo(jnp.float32).tiny)
_SCALE = HEAD_DIM**-0.5 * math.log2(math.e)
# Below any score. A maximum that starts here, not at -inf, never makes a difference of infinities.
_LOWEST = -1e30
# Splits whose partial answers are under way at a time.
_AHEAD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
      split_size: positions that are summed up by themselves. Part of the answer: it decides the order of
        sums.
      tile_size: keys per step of a CTA. Part of the answer too.
      stages: tiles of keys and values in shared memory at a time.
      pair_from: splits of a batch of rows as long as a CTA's own from which it takes two of them, one
        after the other: so many CTAs keep every multiprocessor busy, and a second split's first tiles
        come while the first one is finished. No part of the answer.
    """

    split_size: int = 1024
    tile_size: int = 128
    stages: int = 2
    pair_from: int = 384

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
    def stored_rows(self) -> int:
        """Rows of a partial answer: the combining kernel reads each token's in fours."""
        last = (self.num_tokens - 1) * self.query_groups + pl.cdiv(self.query_groups, 4) * 4
        return pl.cdiv(last, 4) * 4

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
      NotImplementedError: the head is not 128 wide, pages do not tile `config.tile_size`, or more than
        64 queries share a KV head.
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
    shape = _Shape(
        num_rows, num_tokens, kv_heads, query_groups, k_pages.shape[3], page_table.shape[1],
        jnp.dtype(k_pages.dtype),
    )  # fmt: skip
    # Twice the bytes, or four times the scores, of what is best otherwise.
    is_wide = shape.cache_dtype != FP8 or shape.queries > 2 * WARP_ROWS
    config = config or (TuningConfig(tile_size=64) if is_wide else TuningConfig())
    if head_dim != HEAD_DIM:
        raise NotImplementedError(f"{head_dim=}: heads are {HEAD_DIM} wide")
    if config.tile_size % shape.page_size or shape.page_size % 8:
        raise NotImplementedError(
            f"{shape.page_size=}: tiles of {config.tile_size=} are whole pages"
        )
    if shape.queries > ROWS:
        raise NotImplementedError(
            f"{shape.num_tokens=} of {shape.query_groups=}: at most {ROWS} queries share a KV head"
        )
    if shape.cache_dtype not in (jnp.bfloat16, FP8):
        raise NotImplementedError(f"{shape.cache_dtype=}: pages are bfloat16 or FP8")
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    kernel = _split_kernel(shape, config, interpret)
    return shape, config, kernel(q, layers, page_table, positions, k_pages, v_pages)


# A warp takes a row at a time.
_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


def _fold(carry: tuple[Array, Array, Array], more: tuple[Array, Array, Array]) -> Any:
    """Adds a softmax's (maximum, sum, answer) over some keys to that over the keys before them."""
    (largest, total, out), (more_largest, more_total, more_out) = carry, more
    new_largest = jnp.maximum(largest, more_largest)
    fade, share = jnp.exp2(largest - new_largest), jnp.exp2(more_largest - new_largest)
    out = out * lax.broadcast_in_dim(fade, out.shape, [0])
    out = out + more_out * lax.broadcast_in_dim(share, out.shape, [0])
    return new_largest, total * fade + more_total * share, out


def _nothing(rows: int, row_layout: Any, layout: Any) -> tuple[Array, Array, Array]:
    """The same over no keys."""
    return (
        plgpu.layout_cast(jnp.full((rows,), _LOWEST, jnp.float32), row_layout),
        plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), row_layout),
        plgpu.layout_cast(jnp.zeros((rows, HEAD_DIM), jnp.float32), layout),
    )


def _split_kernel(shape: _Shape, config: TuningConfig, interpret: bool) -> Any:
    groups, tile = shape.query_groups, config.tile_size
    pages_per_tile = tile // shape.page_size
    pages_per_split = config.split_size // shape.page_size
    tiles_per_split = config.split_size // tile
    products = WarpProducts(shape.queries, tile, shape.cache_dtype, interpret)
    query_rows, warp_keys = products.query_rows, products.keys_per_warp
    stored = min(query_rows, shape.stored_rows)
    layout, row_layout = products.score_layout, products.score_layout.reduce(1)

    def body(
        q_gmem, layer_gmem, table_gmem, positions_gmem, k_gmem, v_gmem,
        out_gmem, largest_gmem, total_gmem,
        k_smem, v_smem, out_smem, largest_smem, total_smem, queries_smem,
        q_barrier, k_barrier, v_barrier,
    ):  # fmt: skip
        q_smem, kept_smem = queries_smem
        row, kv_head = lax.axis_index("row"), lax.axis_index("kv_head")
        split = lax.axis_index("split")
        row_positions = [positions_gmem[row, token] for token in range(shape.num_tokens)]
        layer = layer_gmem[0]

        def pages_from(page):
            """Where a tile's pages lie; what a row does not own may be any number."""
            places = [
                jnp.minimum(page + i, shape.pages_per_sequence - 1) for i in range(pages_per_tile)
            ]
            return [jnp.clip(table_gmem[row, at], 0, k_gmem.shape[1] - 1) for at in places]

        def some_pages(first_page):
            return [pages_from(first_page + i * pages_per_tile) for i in range(config.stages)]

        # Ahead of what the positions say, so that one latency is all.
        either = [some_pages(count * split * pages_per_split) for count in (1, 2)]
        last = row_positions[0]
        for position in row_positions[1:]:
            last = jnp.maximum(last, position)
        num_splits = (last + config.split_size) // config.split_size
        is_paired = num_splits * shape.num_rows * shape.kv_heads >= config.pair_from
        count = jnp.where(is_paired, 2, 1)
        first = split * count * config.split_size

        @pl.when(first <= last)
        def _work():
            for token in range(shape.num_tokens):
                plgpu.copy_gmem_to_smem(
                    q_gmem.at[row, token, kv_head],
                    q_smem.at[pl.ds(token * groups, groups)],
                    q_barrier,
                )
            num_tiles = jnp.minimum(count * config.split_size, last + 1 - first + tile - 1) // tile

            def fetch(index, pages):
                slot = lax.rem(index, config.stages)
                for gmem, smem, barrier in (
                    (k_gmem, k_smem, k_barrier),
                    (v_gmem, v_smem, v_barrier),
                ):
                    for i, page in enumerate(pages):
                        part = pl.ds(i * shape.page_size, shape.page_size)
                        plgpu.copy_gmem_to_smem(
                            gmem.at[layer, page, kv_head], smem.at[slot, part], barrier.at[slot]
                        )

            *before, pages = [
                [jnp.where(is_paired, two, one) for one, two in zip(*pair, strict=True)]
                for pair in zip(*either, strict=True)
            ]
            for index, some in enumerate(before):
                pl.when(index < num_tiles)(
                    lambda index=index, some=some: fetch(jnp.int32(index), some)
                )
            plgpu.barrier_wait(q_barrier)
            queries = plgpu.load(q_smem, layout=products.query_layout, optimized=False)
            products.keep(queries, kept_smem)
            row_of, column_of = (
                plgpu.broadcasted_iota(jnp.int32, (ROWS, warp_keys), axis, layout=layout)
                for axis in range(2)
            )

            def is_visible(start):
                last_visible = jnp.full((ROWS, warp_keys), row_positions[-1], jnp.int32)
                for token in reversed(range(shape.num_tokens - 1)):
                    is_earlier = row_of % query_rows < (token + 1) * groups
                    last_visible = jnp.where(is_earlier, row_positions[token], last_visible)
                return start + row_of // query_rows * warp_keys + column_of <= last_visible

            def silence(start, values_smem):
                # A share of 0 does not silence what another sequence left there: 0 * inf is NaN.
                @pl.when(start + tile > last + 1)
                def _silence():
                    values = plgpu.load(values_smem, layout=silenced)
                    key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=silenced)
                    wide = jnp.where(start + key <= last, values.astype(jnp.float32), 0.0)
                    values_smem[...] = wide.astype(values.dtype)

            def visit(index, carry, *, is_masked):
                largest, total, out, pages = carry
                slot = lax.rem(index, config.stages)
                start = first + index * tile
                ahead = index + config.stages - 1
                # Where the next copies go, the tile before may still be read.
                plgpu.commit_smem()
                pl.when(ahead < num_tiles)(lambda: fetch(ahead, pages))
                # For the next tile's turn to fetch, by when they are here.
                pages = pages_from((first + (ahead + 1) * tile) // shape.page_size)
                plgpu.barrier_wait(k_barrier.at[slot])
                scores = products.scores(kept_smem, k_smem.at[slot])
                if is_masked:
                    scores = jnp.where(is_visible(start), scores, -jnp.inf)
                new_largest = jnp.maximum(largest, scores.max(axis=1) * _SCALE)
                along = lax.broadcast_in_dim(new_largest, scores.shape, [0])
                shares = jnp.exp2(scores * _SCALE - along)
                fade = jnp.exp2(largest - new_largest)
                total = total * fade + shares.sum(axis=1)
                out = out * lax.broadcast_in_dim(fade, out.shape, [0])
                plgpu.barrier_wait(v_barrier.at[slot])
                if is_masked:
                    silence(start, v_smem.at[slot])
                out = products.add(out, shares.astype(products.operand), v_smem.at[slot])
                return new_largest, total, out, pages

            # Up to where every token sees all keys, and past it.
            least = row_positions[0]
            for position in row_positions[1:]:
                least = jnp.minimum(least, position)
            num_whole = jnp.clip((least + 1 - first) // tile, 0, num_tiles)

            def of_part(part):
                rows = pl.ds(part * query_rows, query_rows)
                row_layout = _ROWS.reduce(1)
                return (
                    plgpu.load(largest_smem.at[rows], layout=row_layout, optimized=False),
                    plgpu.load(total_smem.at[rows], layout=row_layout, optimized=False),
                    plgpu.load(out_smem.at[rows], layout=_ROWS, optimized=False),
                )

            answers_smem = largest_smem, total_smem, out_smem

            def store(split, carry):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for smem, values in zip(answers_smem, carry, strict=True):
                    smem[...] = values
                if products.num_parts > 1:
                    folded = of_part(0)
                    for part in range(1, products.num_parts):
                        folded = _fold(folded, of_part(part))
                    for smem, values in zip(answers_smem, folded, strict=True):
                        smem[pl.ds(0, query_rows)] = values
                plgpu.commit_smem()
                part = pl.ds(0, stored)
                for smem, gmem in zip(
                    answers_smem, (largest_gmem, total_gmem, out_gmem), strict=True
                ):
                    plgpu.copy_smem_to_gmem(smem.at[part], gmem.at[row, kv_head, split, part])

            def sum_up(number, pages):
                start = number * tiles_per_split
                end = jnp.minimum(start + tiles_per_split, num_tiles)
                whole = jnp.clip(num_whole, start, end)
                carry = (*_nothing(ROWS, row_layout, products.out_layout), pages)
                carry = lax.fori_loop(start, whole, partial(visit, is_masked=False), carry)
                carry = lax.fori_loop(whole, end, partial(visit, is_masked=True), carry)
                *answers, pages = carry
                store(split * count + number, answers)
                return pages

            lax.fori_loop(0, (num_tiles + tiles_per_split - 1) // tiles_per_split, sum_up, pages)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    is_fp8 = shape.cache_dtype == FP8
    silenced = plgpu.Layout.WGMMA_UPCAST_2X if is_fp8 else plgpu.Layout.WGMMA
    split_shape = (shape.num_rows, shape.kv_heads, shape.num_splits(config), shape.stored_rows)
    pages = plgpu.SMEM(
        (config.stages, tile, HEAD_DIM), shape.cache_dtype, transforms=products.transforms
    )
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
            plgpu.SMEM((ROWS, HEAD_DIM), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.RefUnion(
                plgpu.SMEM((query_rows, HEAD_DIM), jnp.bfloat16),
                plgpu.SMEM((query_rows, HEAD_DIM), products.operand),
            ),
            plgpu.Barrier(num_arrivals=shape.num_tokens),
            plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=pages_per_tile, num_barriers=config.stages),
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="decode_attention_split",
        compiler_params=plgpu.CompilerParams(approx_math=True),
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

        def partials(step):
            """What is there of some splits, and of those past the row's last one whatever is there."""
            found = []
            for i in range(_AHEAD):
                split = step * _AHEAD + i
                place = (row, kv_head, jnp.minimum(split, shape.num_splits(config) - 1), part)
                largest, total = (
                    plgpu.load(gmem.at[place], layout=_ROWS.reduce(1), optimized=False)
                    for gmem in (largest_gmem, total_gmem)
                )
                found.append(
                    (largest, total, plgpu.load(out_gmem.at[place], layout=_ROWS, optimized=False))
                )
            return found

        def fold(step, carry, found):
            for i, (largest, total, out) in enumerate(found):
                is_row_there, is_there = (
                    jnp.full(x.shape, step * _AHEAD + i, jnp.int32) < num_splits
                    for x in (total, out)
                )
                some = (
                    jnp.where(is_row_there, largest, _LOWEST),
                    jnp.where(is_row_there, total, 0.0),
                    jnp.where(is_there, out, 0.0),
                )
                carry = _fold(carry, some)
            return carry

        # The first ones do not wait for the position, which says only how many there are.
        first = partials(jnp.int32(0))
        num_splits = (positions_gmem[row, column] + config.split_size) // config.split_size
        carry = fold(jnp.int32(0), _nothing(rows, _ROWS.reduce(1), _ROWS), first)
        num_steps = (num_splits + _AHEAD - 1) // _AHEAD
        _, total, out = lax.fori_loop(
            1, num_steps, lambda step, carry: fold(step, carry, partials(step)), carry
        )
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
