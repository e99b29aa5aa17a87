"""Attention of a decode step over the paged cache: a few queries a row, every key and value read once.

Knows neither requests nor how the pages were filled.

A row's positions are cut at fixed places (decode_cut), so that an answer depends neither on the rows
beside it nor on how many there are. A CTA attends to one part of a row for one KV head (decode_splits).
The last CTA of a row to arrive combines what all of them made, and may quantize it for the projection
that follows (decode_combine); where nothing counts arrivals, a second kernel does that.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import decode_splits, decode_write, last_arrival, launch_order
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.decode_combine import combine, result_scratch, result_types
from glm_jax.pallas.decode_cut import HEAD_DIM, Cut, TuningConfig, cut_of, memory_types
from glm_jax.pallas.token_heads import TokenHeads

__all__ = [
    "HEAD_DIM",
    "TuningConfig",
    "attend",
    "attend_quantized",
    "make_counters",
    "write_and_attend",
]

# Bits of powers depend on it, so it is the same for all. Barriers stand where threads read what others stored.
_COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


def make_counters(num_tokens: int, kv_heads: int) -> jax.Ref:
    """What counts the arrivals of a step's CTAs, for all its layers; num_tokens of all its rows."""
    return last_arrival.make_counters(num_tokens, kv_heads)


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
        last position is not seen, whatever it is. A token's answer has the bits that it would have as
        a row of its own.
      counters: of make_counters, by which one kernel does it all; not for interpretation.

    Raises:
      NotImplementedError: the head is not 128 wide, pages do not tile `config.tile_size`, or more than
        64 queries of a token share a KV head.
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
    return _flat(values, scale)


def write_and_attend(
    qkv: BFloat16[Array, "B T K heads H"],
    norms: tuple[BFloat16[Array, "L H"], ...],
    angles: BFloat16[Array, "B T 2 half"],
    k_pages: Any,
    v_pages: Any,
    layer: Int32[Array, ""] | int,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
    *,
    eps: float,
    is_quantized: bool,
    chip: Chip,
    counters: Any = None,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> tuple[Any, Any, Any]:
    """As kv_write.write, then `attend` or `attend_quantized`, with the same bits; of one or two tokens a row.

    No two rows may have a page in common that one of them writes to. Returns attended or (values, scale),
    and the pages: arrays' successors, or the Refs themselves.

    Args:
      qkv: of each KV head the queries, then the key, then the value.
      norms: of queries and of keys, or none.
      angles: what kv_write.rotary_table makes, as wide as what is rotated.

    Raises:
      NotImplementedError: as the other two, or a row has more tokens.
    """
    del chip
    num_rows, num_tokens, kv_heads, num_heads, head_dim = qkv.shape
    rotary_dim = 2 * angles.shape[-1]
    if num_tokens > 2 or rotary_dim % 64:
        raise NotImplementedError(
            f"{num_tokens=}, {rotary_dim=}: 1 or 2 tokens, widths of 64 or 128"
        )
    q_shape = num_rows, num_tokens, kv_heads, num_heads - 2, head_dim
    # In CTAs of their own, one would have to wait for the other's key.
    cut = replace(cut_of(q_shape, k_pages, page_table.shape[1], config), num_tokens=num_tokens)
    least = decode_splits.products_of(cut, interpret).query_rows
    heads = TokenHeads(cut.query_groups, rotary_dim, eps, cut.cache_dtype, least)
    new = decode_write.Kind(heads, num_tokens, has_norms=bool(norms))
    pages = k_pages, v_pages
    are_arrays = isinstance(k_pages, jax.Array)
    refs = [jax.new_ref(x) for x in pages] if are_arrays else pages
    operands = qkv, *refs, layer, page_table, positions, angles, *norms
    results = _run(cut, operands, is_quantized, counters, interpret, new)
    made = _flat(*results) if is_quantized else results[0]
    return made, *([jax.freeze(x) for x in refs] if are_arrays else pages)


def _flat(values: Array, scale: Array) -> tuple[Array, Array]:
    return values.reshape(*values.shape[:2], -1), scale


def _attend(
    operands: tuple[Any, ...],
    config: TuningConfig | None,
    is_quantized: bool,
    counters: Any,
    interpret: bool,
) -> Any:
    q, k_pages, _, _, page_table, _ = operands
    cut = cut_of(q.shape, k_pages, page_table.shape[1], config)
    return _run(cut, operands, is_quantized, counters, interpret)


def _run(
    cut: Cut,
    operands: tuple[Any, ...],
    is_quantized: bool,
    counters: Any,
    interpret: bool,
    new: decode_write.Kind | None = None,
) -> Any:
    q, k_pages, v_pages, layer, page_table, positions, *more = operands
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    arguments = (q, layers, page_table, positions, k_pages, v_pages, *more)
    if counters is not None:
        num_counters = math.prod(counters.shape)
        if num_counters < cut.num_rows * cut.kv_heads:
            raise ValueError(f"{num_counters=} for {cut.num_rows} rows of {cut.kv_heads} heads")
        results = _whole_kernel(cut, is_quantized, new)(*arguments, counters)
        return results[: len(result_types(cut, is_quantized))]
    partials = _parts_kernel(cut, interpret, new)(*arguments)
    return _combine_kernel(cut, is_quantized, interpret)(positions, *partials)


def _partial_types(cut: Cut) -> tuple[jax.ShapeDtypeStruct, ...]:
    return memory_types(cut.num_rows * cut.kv_heads, cut.num_parts, cut.stored_rows)


def _parts_kernel(cut: Cut, interpret: bool, new: decode_write.Kind | None) -> Any:
    """(q, layer, page table, positions, pages …) -> partial answers."""
    products = decode_splits.products_of(cut, interpret)
    num_inputs = len(decode_splits.Inputs._fields)
    num_more = new.num_operands if new else 0

    def body(*refs: Any) -> None:
        inputs, refs = decode_splits.Inputs(*refs[:num_inputs]), refs[num_inputs:]
        more, refs = refs[:num_more], refs[num_more:]
        partials, scratch = refs[:2], decode_splits.Scratch(*refs[2:])
        part = decode_splits.part_here(cut, inputs, interpret)
        token = new.here(inputs.q, more, scratch, interpret) if new else None

        @pl.when(part.number < cut.num_ctas(part.last))
        def _work() -> None:
            decode_splits.attend_part(cut, products, inputs, scratch, part, partials, token)

    return launch_order.kernel(
        body,
        out_type=_partial_types(cut),
        scratch_types=tuple(
            decode_splits.scratch_types(cut, products, *(new.scratch_types() if new else ()))
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="decode_attention_split",
        **_grid(cut),
    )


def _whole_kernel(cut: Cut, is_quantized: bool, new: decode_write.Kind | None) -> Any:
    """(q, layer, page table, positions, pages …, counters) -> results, and partial answers."""
    products = decode_splits.products_of(cut, False)
    num_inputs = len(decode_splits.Inputs._fields)
    num_more = new.num_operands if new else 0
    results = result_types(cut, is_quantized)

    def body(*refs: Any) -> None:
        inputs, refs = decode_splits.Inputs(*refs[:num_inputs]), refs[num_inputs:]
        more, counters, refs = refs[:num_more], refs[num_more], refs[num_more + 1 :]
        results_gmem, refs = refs[: len(results)], refs[len(results) :]
        partials, scratch = refs[:2], decode_splits.Scratch(*refs[2:])
        part = decode_splits.part_here(cut, inputs, False)
        token = new.here(inputs.q, more, scratch, False) if new else None

        @pl.when(part.number < cut.num_ctas(part.last))
        def _work() -> None:
            decode_splits.attend_part(cut, products, inputs, scratch, part, partials, token)
            is_last = last_arrival.is_last(counters, scratch.words)
            *_, result_smem = scratch.warps

            @pl.when(is_last)
            def _combine() -> None:
                positions = decode_splits.positions_again(cut, scratch, part)
                at = decode_splits.row_again(cut, scratch, part), part.kv_head
                combine(cut, *at, positions, partials, results_gmem, result_smem)

    over_warps = (*(new.scratch_types() if new else ()), result_scratch(cut, is_quantized))
    scratch = decode_splits.scratch_types(cut, products, *over_warps)
    return launch_order.kernel(
        body,
        out_type=(*results, *_partial_types(cut)),
        scratch_types=tuple(scratch),
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
        of_tokens = decode_splits.positions_of(cut, positions, row)
        combine(cut, row, kv_head, of_tokens, partials, results, smem)

    return launch_order.kernel(
        body,
        out_type=result_types(cut, is_quantized),
        grid=(cut.kv_heads, cut.num_rows),
        grid_names=("kv_head", "row"),
        scratch_types=(result_scratch(cut, is_quantized),),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="decode_attention_combine",
        compiler_params=_COMPILER_PARAMS,
    )
