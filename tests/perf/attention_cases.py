"""The attention kernels' shapes in GLM-4.7 on one of eight devices: KV write, decode, prefill.

Knows no other kernel.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax import cache as kv_cache
from glm_jax import ops
from glm_jax.cache import KVCache
from glm_jax.fp8 import FP8
from glm_jax.ops import HeadNorms
from glm_jax.pallas import decode_attention, kv_write, prefill_attention
from glm_jax.pallas.chip import Chip
from tests.perf import peers
from tests.perf.measure import Case, relative_error
from tests.perf.sizes import Sizes

_HEAD = 128
_EPS, _ROTARY, _THETA = 1e-5, 64, 1e6


def _pages(
    key: jax.Array, sizes: Sizes, rows: int, pages_per_row: int, dtype: Any, more_bytes: int = 0
) -> Any:
    """Keys and values of every layer, and each row's pages, scattered over the pool.

    Args:
      more_bytes: of layers that follow those, at least.
    """
    keys = jax.random.split(key, 3)
    num_pages = rows * pages_per_row
    layer_bytes = num_pages * sizes.page_size * _HEAD * jnp.dtype(dtype).itemsize
    num_layers = sizes.heavy_layers - -more_bytes // layer_bytes
    shape = (num_layers, num_pages, 1, sizes.page_size, _HEAD)
    k_pages, v_pages = (jax.random.normal(k, shape, jnp.bfloat16).astype(dtype) for k in keys[:2])
    page_table = jax.random.permutation(keys[2], num_pages).astype(jnp.int32)
    return k_pages, v_pages, page_table.reshape(rows, pages_per_row)


def _attention_errors(got: jax.Array, expected: jax.Array) -> dict[str, jax.Array]:
    return {"out": relative_error(got, expected)}


def _attention_reference(operands: Any, layer: jax.Array) -> jax.Array:
    q, k_pages, v_pages, page_table, positions = operands
    return ops.paged_attention(q, k_pages, v_pages, layer, page_table, positions)


def decode_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """One token of each row against all before it, keys and values in FP8."""

    def draw(rows: int, length: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 2)
        q = jax.random.normal(keys[0], (rows, 1, 1, sizes.query_groups, _HEAD), jnp.bfloat16)
        pages = _pages(keys[1], sizes, rows, length // sizes.page_size, FP8)
        return (q, *pages, jnp.full((rows, 1), length - 1, jnp.int32))

    def step(operands: Any, layer: jax.Array) -> Any:
        q, k_pages, v_pages, page_table, positions = operands
        counters = None if interpret else decode_attention.make_counters(*q.shape[:3:2])
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
                num_layers=sizes.heavy_layers,
                step=step,
                reference=_attention_reference,
                errors=_attention_errors,
                tolerance=1e-2,
                bytes=rows * (2 * length * _HEAD + 4 * sizes.query_groups * _HEAD),
                # A step makes its counters once; here each call has its own, which XLA sets to zero.
                is_timed_alone=True,
                operations=4 * rows * length * sizes.query_groups * _HEAD,
                alternatives={"XLA": _attention_reference},
                peers=peers.attention(rows, 1, length, sizes.query_groups),
            )


def write_and_attend_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """The same with the new token's keys and values written on the way, as an engine's steps do."""
    heads = sizes.query_groups + 2
    # Pages are copied before a call. What is copied last fills the L2 cache, and no call reads it.
    spare = 0 if interpret else 1 << 26

    def draw(rows: int, length: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        qkv = jax.random.normal(keys[0], (rows, 1, 1, heads, _HEAD), jnp.bfloat16)
        norms = 1 + jax.random.normal(keys[1], (2, sizes.heavy_layers, _HEAD), jnp.bfloat16) / 4
        pages = _pages(keys[2], sizes, rows, length // sizes.page_size, FP8, spare)
        return (qkv, *norms, *pages, jnp.full((rows, 1), length - 1, jnp.int32))

    def step(operands: Any, layer: jax.Array) -> jax.Array:
        qkv, q_norm, k_norm, k_pages, v_pages, table, positions = operands
        counters = None if interpret else decode_attention.make_counters(len(qkv), 1)
        angles = kv_write.rotary_table(positions, _ROTARY, _THETA)
        out, *_ = decode_attention.write_and_attend(
            qkv, (q_norm, k_norm), angles, k_pages, v_pages, layer, table, positions, eps=_EPS,
            is_quantized=False, chip=chip, counters=counters, interpret=interpret,
        )  # fmt: skip
        return out

    def reference(operands: Any, layer: jax.Array) -> jax.Array:
        qkv, q_norm, k_norm, k_pages, v_pages, table, positions = operands
        norms = HeadNorms(q_norm, k_norm, _EPS, _ROTARY, _THETA)
        q, k, v = ops.split_heads(qkv, norms, positions, layer)
        written = kv_cache.write(KVCache(k_pages, v_pages), layer, table, positions, k, v)
        return ops.paged_attention(q, *written, layer, table, positions)

    for length in sizes.contexts:
        for rows in sizes.tokens:
            if rows == sizes.prefill:
                continue
            yield Case(
                kernel="decode_attention.write_and_attend",
                shape=f"B={rows} S={length}",
                draw=partial(draw, rows, length),
                num_layers=sizes.heavy_layers,
                step=step,
                reference=reference,
                errors=_attention_errors,
                tolerance=1e-2,
                bytes=rows
                * (2 * length * _HEAD + (2 * heads + 2 * sizes.query_groups + 2) * _HEAD),
                is_timed_alone=True,
                operations=4 * rows * length * sizes.query_groups * _HEAD,
                peers=peers.write_and_attend(rows, length, sizes.query_groups),
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
        num_layers=sizes.heavy_layers,
        step=step,
        reference=_attention_reference,
        errors=_attention_errors,
        tolerance=1e-2,
        # A step makes its plan once; here each call makes its own, in XLA's kernels.
        is_timed_alone=True,
        bytes=tokens * (2 * _HEAD + 4 * sizes.query_groups * _HEAD),
        operations=2 * tokens * tokens * sizes.query_groups * _HEAD,
        alternatives={"XLA": _attention_reference},
        peers=peers.attention(1, tokens, tokens, sizes.query_groups),
    )


def write_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """Head norms, rotary and the write of a decode step's keys and values."""
    heads = sizes.query_groups + 2

    def draw(rows: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        qkv = jax.random.normal(keys[0], (rows, 1, 1, heads, _HEAD), jnp.bfloat16)
        norms = 1 + jax.random.normal(keys[1], (2, sizes.heavy_layers, _HEAD), jnp.bfloat16) / 4
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
            num_layers=sizes.heavy_layers,
            step=step,
            reference=reference,
            errors=errors,
            tolerance=5e-3,
            bytes=rows * _HEAD * (2 * heads + 2 * sizes.query_groups + 2),
            # A step owns its pages; here each call gets a copy of them, which XLA makes.
            is_timed_alone=True,
        )
