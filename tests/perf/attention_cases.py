"""The attention kernels' shapes in GLM-4.7 on one of eight devices: KV write, decode, prefill.

Knows no other kernel.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax import cache as kv_cache
from glm_jax import ops
from glm_jax.cache import KVCache
from glm_jax.fp8 import FP8, quantize_rows
from glm_jax.kernels import Kernels
from glm_jax.ops import HeadNorms, Rows
from glm_jax.pallas import decode_attention, kv_write, prefill_attention
from glm_jax.pallas.chip import Chip
from tests.perf import peers
from tests.perf.measure import Case, relative_error
from tests.perf.sizes import Sizes

_HEAD = 128
_EPS, _ROTARY, _THETA = 1e-5, 64, 1e6
_FEW_PAGES = 4096
# Sequences of which a step with guesses is timed.
_GUESSING = (1, 2, 16, 64)


def _pages(key: jax.Array, sizes: Sizes, rows: int, pages_per_row: int, dtype: Any) -> Any:
    """Keys and values of every layer, and each row's pages, scattered over the pool."""
    keys = jax.random.split(key, 3)
    num_pages = rows * pages_per_row
    num_layers = _num_layers(sizes, num_pages)
    shape = (num_layers, num_pages, 1, sizes.page_size, _HEAD)
    k_pages, v_pages = (jax.random.normal(k, shape, jnp.bfloat16).astype(dtype) for k in keys[:2])
    page_table = jax.random.permutation(keys[2], num_pages).astype(jnp.int32)
    return k_pages, v_pages, page_table.reshape(rows, pages_per_row)


def _num_layers(sizes: Sizes, num_pages: int) -> int:
    """What a graph's launch costs is shared by its calls, and small ones feel it."""
    return sizes.layers if num_pages <= _FEW_PAGES else sizes.heavy_layers


def _attention_errors(got: jax.Array, expected: jax.Array) -> dict[str, jax.Array]:
    return {"out": relative_error(got, expected)}


def _attention_reference(operands: Any, layer: jax.Array) -> jax.Array:
    q, k_pages, v_pages, page_table, positions, *_ = operands
    return ops.paged_attention(q, k_pages, v_pages, layer, page_table, positions)


def decode_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """One token of each row against all before it, keys and values in FP8."""

    def draw(rows: int, length: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 2)
        q = jax.random.normal(keys[0], (rows, 1, 1, sizes.query_groups, _HEAD), jnp.bfloat16)
        pages = _pages(keys[1], sizes, rows, length // sizes.page_size, FP8)
        return (q, *pages, jnp.full((rows, 1), length - 1, jnp.int32), counters_of(rows))

    def counters_of(rows: int) -> jax.Array | None:
        return None if interpret else jax.freeze(decode_attention.make_counters(rows, 1))

    def step(operands: Any, layer: jax.Array) -> Any:
        q, k_pages, v_pages, page_table, positions, counters = operands
        return decode_attention.attend(
            q, k_pages, v_pages, layer, page_table, positions, chip=chip, counters=counters,
            interpret=interpret,
        )  # fmt: skip

    for length in sizes.contexts:
        for rows in sizes.tokens:
            if rows == sizes.prefill:
                continue
            yield Case(
                kernel="decode_attention.attend",
                shape=f"B={rows} S={length}",
                draw=partial(draw, rows, length),
                num_layers=_num_layers(sizes, rows * length // sizes.page_size),
                step=step,
                reference=_attention_reference,
                errors=_attention_errors,
                tolerance=1e-2,
                bytes=rows * (2 * length * _HEAD + 4 * sizes.query_groups * _HEAD),
                # Steps write keys and values and quantize in the same kernel (write_and_attend_cases).
                phase="",
                written=() if interpret else (5,),
                operations=4 * rows * length * sizes.query_groups * _HEAD,
                alternatives={"XLA": _attention_reference},
                peers=peers.attention(rows, 1, length, sizes.query_groups),
            )


def write_and_attend_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """The same with head norms, rotary and the write before it and the quantization after it, as an
    engine's decode steps do it; and for the last two tokens of each sequence, as steps with a guess do."""
    heads = sizes.query_groups + 2
    kernels = Kernels(interpreted=chip if interpret else None)

    def draw(sequences: int, length: int, tokens: int, key: jax.Array) -> Any:
        keys, rows = jax.random.split(key, 3), sequences * tokens
        qkv = jax.random.normal(keys[0], (rows, 1, 1, heads, _HEAD), jnp.bfloat16)
        norms = tuple(
            1 + jax.random.normal(k, (sizes.layers, _HEAD), jnp.bfloat16) / 4
            for k in jax.random.split(keys[1])
        )
        *pages, table = _pages(keys[2], sizes, sequences, length // sizes.page_size, FP8)
        last = jnp.arange(length - tokens, length, dtype=jnp.int32)
        positions = jnp.tile(last, sequences)[:, None]
        counters = kernels.attention_counters((rows, 1), 1)
        memory = pages if counters is None else [*pages, jax.tree.map(jax.freeze, counters)]
        angles = kernels.rotary_table(positions, _ROTARY, _THETA)
        return qkv, norms, table, positions, angles, memory

    def step(tokens: int, operands: Any, layer: jax.Array) -> Rows:
        qkv, (q_norm, k_norm), table, positions, angles, (k_pages, v_pages, *counters) = operands
        norms = HeadNorms(q_norm, k_norm, _EPS, _ROTARY, _THETA)
        made, _ = kernels.write_and_attend(
            qkv, norms, positions, table, layer, KVCache(k_pages, v_pages), angles, is_fp8=True,
            counters=counters[0] if counters else None, rows_per_sequence=tokens,
        )  # fmt: skip
        return made

    def reference(tokens: int, operands: Any, layer: jax.Array) -> Rows:
        qkv, (q_norm, k_norm), table, positions, _, pages = operands
        norms, table = (
            HeadNorms(q_norm, k_norm, _EPS, _ROTARY, _THETA),
            jnp.repeat(table, tokens, 0),
        )
        q, k, v = ops.split_heads(qkv, norms, positions, layer)
        written = kv_cache.write(KVCache(*pages[:2]), layer, table, positions, k, v)
        attended = ops.paged_attention(q, *written, layer, table, positions)
        return Rows(attended.reshape(len(qkv), -1), None, None)

    def errors(got: Rows, expected: Rows) -> dict[str, jax.Array]:
        assert expected.plain is not None and got.values is not None and got.scale is not None
        values, scale = quantize_rows(expected.plain)
        wide = values.astype(jnp.float32) * scale
        return {
            "out": relative_error(got.values.astype(jnp.float32) * got.scale, wide) / 8,
            "scale": relative_error(got.scale, scale),
        }

    for tokens, length, sequences in product((1, 2), sizes.contexts, sizes.tokens):
        if sequences == sizes.prefill or (tokens > 1 and sequences not in _GUESSING):
            continue
        of_tokens = tokens * (2 * heads + sizes.query_groups + 2) * _HEAD
        yield Case(
            kernel="decode_attention.write_and_attend" + f", {tokens} tokens" * (tokens > 1),
            shape=f"B={sequences} S={length}",
            draw=partial(draw, sequences, length, tokens),
            num_layers=_num_layers(sizes, sequences * length // sizes.page_size),
            step=partial(step, tokens),
            reference=partial(reference, tokens),
            errors=errors,
            # Of scales; of values, whose roundings to FP8 differ where sums round another way, 8e-2.
            tolerance=1e-2,
            bytes=sequences * (2 * length * _HEAD + of_tokens),
            operations=4 * sequences * tokens * length * sizes.query_groups * _HEAD,
            written=() if interpret else (5,),
            peers=peers.write_and_attend(sequences, length, sizes.query_groups, tokens),
        )


def prefill_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """A whole prompt against itself."""
    tokens = sizes.prefill

    def draw(key: jax.Array) -> Any:
        keys = jax.random.split(key, 2)
        q = jax.random.normal(keys[0], (1, tokens, 1, sizes.query_groups, _HEAD), jnp.bfloat16)
        pages = _pages(keys[1], sizes, 1, tokens // sizes.page_size, FP8)
        return (q, *pages, jnp.arange(tokens, dtype=jnp.int32)[None])

    def step(operands: Any, layer: jax.Array) -> Any:
        q, k_pages, v_pages, page_table, positions = operands
        return prefill_attention.attend(
            q, k_pages, v_pages, layer, page_table, positions, chip=chip, interpret=interpret
        )

    yield Case(
        kernel="prefill_attention.attend",
        shape=f"T={tokens}",
        draw=draw,
        num_layers=_num_layers(sizes, tokens // sizes.page_size),
        step=step,
        reference=_attention_reference,
        errors=_attention_errors,
        tolerance=1e-2,
        phase="prefill",
        # A step makes its plan once; here each call makes its own, in XLA's kernels.
        is_timed_alone=True,
        bytes=tokens * (2 * _HEAD + 4 * sizes.query_groups * _HEAD),
        operations=2 * tokens * tokens * sizes.query_groups * _HEAD,
        alternatives={"XLA": _attention_reference},
        peers=peers.attention(1, tokens, tokens, sizes.query_groups),
    )


def write_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """Head norms, rotary and the write of keys and values alone, of few tokens; prefill steps run this kernel."""
    heads = sizes.query_groups + 2

    def draw(rows: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        qkv = jax.random.normal(keys[0], (rows, 1, 1, heads, _HEAD), jnp.bfloat16)
        norms = 1 + jax.random.normal(keys[1], (2, sizes.layers, _HEAD), jnp.bfloat16) / 4
        positions = jax.random.randint(keys[2], (rows, 1), 0, 2 * sizes.page_size)
        return (qkv, *norms, positions, *_pages(keys[3], sizes, rows, 2, FP8))

    def step(operands: Any, layer: jax.Array) -> Any:
        qkv, q_norm, k_norm, positions, k_pages, v_pages, page_table = operands
        return kv_write.write(
            qkv, q_norm, k_norm, positions, page_table, layer, k_pages, v_pages, eps=_EPS,
            rotary_dim=_ROTARY, theta=_THETA, chip=chip, interpret=interpret,
        )  # fmt: skip

    def reference(operands: Any, layer: jax.Array) -> Any:
        qkv, q_norm, k_norm, positions, k_pages, v_pages, page_table = operands
        norms = HeadNorms(q_norm, k_norm, _EPS, _ROTARY, _THETA)
        q, k, v = ops.split_heads(qkv, norms, positions, layer)
        written = kv_cache.write(KVCache(k_pages, v_pages), layer, page_table, positions, k, v)
        return (q, *written)

    def errors(got: Any, expected: Any) -> dict[str, jax.Array]:
        names = ("q", "k", "v")
        return {
            name: relative_error(ours, theirs)
            for name, ours, theirs in zip(names, got, expected, strict=True)
        }

    for rows in sizes.tokens:
        if rows == sizes.prefill:
            continue
        yield Case(
            kernel="kv_write.write",
            shape=f"B={rows}",
            draw=partial(draw, rows),
            num_layers=_num_layers(sizes, 2 * rows),
            step=step,
            reference=reference,
            errors=errors,
            tolerance=5e-3,
            bytes=rows * _HEAD * (2 * heads + 2 * sizes.query_groups + 2),
            phase="",
            # A step owns its pages; here each call gets a copy of them, which XLA makes.
            is_timed_alone=True,
        )
