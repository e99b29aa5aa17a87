"""Attention of a decode step over the paged cache: a few queries a row, every key and value read once.

Knows neither requests nor how the pages were filled.

A row's positions are cut at fixed places (decode_cut), so that an answer depends neither on the rows
beside it nor on how many there are. A CTA attends to one part of a row for one KV head (decode_splits).
The last CTA of a row to arrive combines what all of them made, and may quantize it for the projection
that follows (decode_combine); where nothing counts arrivals, a second kernel does that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import decode_splits, last_arrival
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.decode_combine import combine, result_scratch, result_types
from glm_jax.pallas.decode_cut import FP8, HEAD_DIM, Cut, TuningConfig, memory_types
from glm_jax.pallas.warp_products import ROWS, WARP_ROWS

__all__ = ["HEAD_DIM", "TuningConfig", "attend", "attend_quantized", "make_counters"]

# Bits of powers depend on it, so it is the same for all. Barriers stand where threads read what others stored.
_COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


def make_counters(num_rows: int, kv_heads: int) -> jax.Ref:
    """What counts the arrivals of a step's CTAs, for all its layers."""
    return last_arrival.make_counters(num_rows, kv_heads)


def attend(
    q: BFloat16[Array, "B T K G H"],
    k_pages: Any,
    v_pages: Any,
    layer: Int32[Array, ""] | int,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
    *,
    chip: Chip,
    counters: Any = None,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "B T K G H"]:
    """Attends each query to positions 0 … its own of its row's pages.

    Args:
      k_pages, v_pages: [L, pages, K, page_size, H], bfloat16 or FP8 of scale 1; arrays or Refs.
      layer: index into the pages.
      positions: of each query; one at -1 sees nothing and gets zeros. What pages hold beyond a row's
        last position is not seen, whatever it is.
      counters: of make_counters, by which one kernel does it all; not for interpretation.

    Raises:
      NotImplementedError: the head is not 128 wide, pages do not tile `config.tile_size`, or more than
        64 queries share a KV head.
    """
    del chip  # The same instructions on all of them.
    operands = q, k_pages, v_pages, layer, page_table, positions
    (attended,) = _attend(operands, config, False, counters, interpret)
    return attended


def attend_quantized(
    q: BFloat16[Array, "B T K G H"],
    k_pages: Any,
    v_pages: Any,
    layer: Int32[Array, ""] | int,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
    *,
    chip: Chip,
    counters: Any = None,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> tuple[Float8e4m3fn[Array, "rows K GH"], Float32[Array, "rows K"]]:
    """As `attend`, for an FP8 projection that follows: values, and a scale for each KV head.

    They are what fp8.quantize_rows makes of `attend`'s answer [B * T, K, G * H].
    """
    del chip
    operands = q, k_pages, v_pages, layer, page_table, positions
    values, scale = _attend(operands, config, True, counters, interpret)
    return values.reshape(*values.shape[:2], -1), scale


def _attend(
    operands: tuple[Any, ...],
    config: TuningConfig | None,
    is_quantized: bool,
    counters: Any,
    interpret: bool,
) -> Any:
    q, k_pages, v_pages, layer, page_table, positions = operands
    cut = _cut_of(q, k_pages, page_table, config)
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    arguments = (q, layers, page_table, positions, k_pages, v_pages)
    if counters is not None:
        results = _whole_kernel(cut, is_quantized)(*arguments, counters)
        return results[: len(result_types(cut, is_quantized))]
    partials = _parts_kernel(cut, interpret)(*arguments)
    return _combine_kernel(cut, is_quantized, interpret)(positions, *partials)


def _cut_of(q: Any, k_pages: Any, page_table: Any, config: TuningConfig | None) -> Cut:
    num_rows, num_tokens, kv_heads, query_groups, head_dim = q.shape
    page_size, cache_dtype = k_pages.shape[3], jnp.dtype(k_pages.dtype)
    # Twice the bytes, or four times the scores, of what is best otherwise.
    is_wide = cache_dtype != FP8 or num_tokens * query_groups > 2 * WARP_ROWS
    config = config or (TuningConfig(tile_size=64) if is_wide else TuningConfig())
    if head_dim != HEAD_DIM:
        raise NotImplementedError(f"{head_dim=}: heads are {HEAD_DIM} wide")
    if config.tile_size % page_size or page_size % 8:
        raise NotImplementedError(f"{page_size=}: tiles of {config.tile_size=} are whole pages")
    if num_tokens * query_groups > ROWS:
        raise NotImplementedError(
            f"{num_tokens=} of {query_groups=}: at most {ROWS} queries share a KV head"
        )
    if cache_dtype not in (jnp.bfloat16, FP8):
        raise NotImplementedError(f"{cache_dtype=}: pages are bfloat16 or FP8")
    return Cut(
        num_rows, num_tokens, kv_heads, query_groups, page_size, page_table.shape[1], cache_dtype,
        config,
    )  # fmt: skip


def _partial_types(cut: Cut) -> tuple[jax.ShapeDtypeStruct, ...]:
    return memory_types(cut.num_rows, cut.kv_heads, cut.num_parts, cut.stored_rows)


def _parts_kernel(cut: Cut, interpret: bool) -> Any:
    """(q, layer, page table, positions, pages …) -> partial answers."""
    products = decode_splits.products_of(cut, interpret)
    num_inputs = len(decode_splits.Inputs._fields)

    def body(*refs: Any) -> None:
        inputs = decode_splits.Inputs(*refs[:num_inputs])
        partials, scratch = refs[num_inputs : num_inputs + 2], refs[num_inputs + 2 :]
        part = decode_splits.part_here(cut, inputs)

        @pl.when(part.number < cut.num_ctas(part.last))
        def _work() -> None:
            of_cta = decode_splits.Scratch(*scratch)
            decode_splits.attend_part(cut, products, inputs, of_cta, part, partials)

    return plgpu.kernel(
        body,
        out_type=_partial_types(cut),
        scratch_types=tuple(decode_splits.scratch_types(cut, products)),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="decode_attention_split",
        **_grid(cut),
    )


def _whole_kernel(cut: Cut, is_quantized: bool) -> Any:
    """(q, layer, page table, positions, pages …, counters) -> results, and partial answers."""
    products = decode_splits.products_of(cut, False)
    num_inputs = len(decode_splits.Inputs._fields)
    results = result_types(cut, is_quantized)

    def body(*refs: Any) -> None:
        inputs, refs = decode_splits.Inputs(*refs[:num_inputs]), refs[num_inputs:]
        counters, refs = refs[0], refs[1:]
        results_gmem, refs = refs[: len(results)], refs[len(results) :]
        partials, words, scratch = refs[:2], refs[2], decode_splits.Scratch(*refs[3:])
        part = decode_splits.part_here(cut, inputs)
        num_ctas = cut.num_ctas(part.last)

        @pl.when(part.number < num_ctas)
        def _work() -> None:
            decode_splits.attend_part(cut, products, inputs, scratch, part, partials)
            place = part.row * cut.kv_heads + part.kv_head
            is_last = last_arrival.is_last(counters, words, place, num_ctas)
            _, (_, result_smem) = scratch.warps

            @pl.when(is_last)
            def _combine() -> None:
                at = (part.row, part.kv_head)
                combine(cut, *at, part.last, partials, results_gmem, result_smem)

    scratch = decode_splits.scratch_types(cut, products, result_scratch(cut, is_quantized))
    return plgpu.kernel(
        body,
        out_type=(*results, *_partial_types(cut)),
        scratch_types=(plgpu.SMEM((last_arrival.WORDS,), jnp.int32), *scratch),
        kernel_name="decode_attention",
        **_grid(cut),
    )


def _grid(cut: Cut) -> dict[str, Any]:
    """Rows are started side by side, so that parts that are not there come last."""
    return {
        "grid": (cut.num_parts, cut.kv_heads, cut.num_rows),
        "grid_names": ("part", "kv_head", "row"),
        "compiler_params": _COMPILER_PARAMS,
    }


def _combine_kernel(cut: Cut, is_quantized: bool, interpret: bool) -> Any:
    """(positions, partial answers …) -> results."""

    def body(positions: Any, *refs: Any) -> None:
        partials, results, smem = refs[:2], refs[2:-1], refs[-1]
        row, kv_head = lax.axis_index("row"), lax.axis_index("kv_head")
        last = decode_splits.last_position(cut, positions, row)
        combine(cut, row, kv_head, last, partials, results, smem)

    return plgpu.kernel(
        body,
        out_type=result_types(cut, is_quantized),
        grid=(cut.kv_heads, cut.num_rows),
        grid_names=("kv_head", "row"),
        scratch_types=(result_scratch(cut, is_quantized),),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="decode_attention_combine",
        compiler_params=_COMPILER_PARAMS,
    )
