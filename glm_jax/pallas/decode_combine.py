"""A row's attention from the partial answers to its parts, for one KV head; quantized if asked.

Knows no pages. The tree of sums is decode_cut's: leaves to splits, splits to the row.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.pallas.decode_cut import (
    FP8,
    HEAD_DIM,
    LOWEST,
    WHOLE_ROWS,
    Answers,
    Cut,
    fold,
    load,
    nothing_of_rows,
    put,
    where_below,
)

_FP8_MAX = 448.0
_TINY = float(jnp.finfo(jnp.float32).tiny)
# Partial answers that are under way at a time, the first of these that is enough or else the last.
_AHEAD = 2, 4, 8


def result_types(cut: Cut, is_quantized: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What combine writes: the answers [B, T, K, G, H], or values [B * T, K, G, H] and scales."""
    heads = (cut.kv_heads, cut.query_groups, HEAD_DIM)
    num_tokens = cut.sequences * cut.sequence_tokens
    if not is_quantized:
        shape = (cut.sequences, cut.sequence_tokens, *heads)
        return (jax.ShapeDtypeStruct(shape, jnp.bfloat16),)
    return (
        jax.ShapeDtypeStruct((num_tokens, *heads), FP8),
        jax.ShapeDtypeStruct((num_tokens, cut.kv_heads), jnp.float32),
    )


def result_scratch(cut: Cut, is_quantized: bool) -> Any:
    """Shared memory for one token's answers."""
    return plgpu.SMEM((cut.token_rows, HEAD_DIM), FP8 if is_quantized else jnp.bfloat16)


def combine(
    cut: Cut,
    row: Array,
    kv_head: Array,
    positions: list[Array],
    partials: tuple[Any, ...],
    results: tuple[Any, ...],
    smem: Any,
) -> None:
    """Folds all partial answers of a row, token by token.

    A token that sees nothing of a part finds a sum of 0 there. One that sees nothing at all gets zeros.

    Args:
      positions: of the row's tokens.
      partials: refs of memory_types of [rows * kv_heads, num_parts, stored_rows].
      results: refs of result_types.
      smem: of result_scratch.
    """

    last = reduce(jnp.maximum, positions)

    def by(is_leaves: bool) -> None:
        config = cut.config
        per_split = config.leaves_per_split if is_leaves else 1
        size = config.leaf_size if is_leaves else config.split_size
        num_parts = (last + size) // size
        steps = sorted({max(ahead // per_split, 1) * per_split for ahead in _AHEAD})
        # As few as there are at least: what is past the end is folded too, for nothing.
        for fewer, step_size in zip([-1, *steps], steps, strict=False):
            is_enough = (num_parts <= step_size) | (step_size == steps[-1])
            pl.when((num_parts > fewer) & is_enough)(
                lambda step_size=step_size: fold_all(num_parts, per_split, step_size)
            )

    def fold_all(num_parts: Array, per_split: int, step_size: int) -> None:
        for token in range(cut.num_tokens):
            parts = num_parts, per_split, step_size
            answers = _fold_parts(cut, cut.place_of(row, kv_head), token, partials, *parts)
            if cut.num_tokens > 1:
                answers = where_below(-1, positions[token], answers)
            _write(cut, (row, kv_head), token, answers, results, smem)
        if cut.token_rows != cut.query_groups:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if not cut.takes_leaves:
        by(False)
        return
    is_in_leaves = cut.is_in_leaves(last)
    pl.when(is_in_leaves)(lambda: by(True))
    pl.when(jnp.logical_not(is_in_leaves))(lambda: by(False))


def _fold_parts(
    cut: Cut,
    place: Array,
    token: int,
    partials: Any,
    num_parts: Array,
    per_split: int,
    step_size: int,
) -> Answers:
    """Folds num_parts partial answers, step_size at a time: per_split of them to a split, then those."""
    rows = cut.rows_of(token)

    def visit(step: Array, carry: Answers) -> Answers:
        first = step * step_size
        # All of them are asked for before one is waited for; past the end it is the last one again.
        found = [
            load(partials, rows, (place, jnp.minimum(first + i, num_parts - 1)))
            for i in range(step_size)
        ]
        found = [_silenced_from(first + i, num_parts, answers) for i, answers in enumerate(found)]
        for split in range(0, step_size, per_split):
            if per_split == 1:
                carry = fold(carry, found[split])
                continue
            of_split, *others = found[split : split + per_split]
            for of_leaf in others:
                of_split = fold(of_split, of_leaf)
            carry = fold(carry, of_split)
        return carry

    num_steps = (num_parts + step_size - 1) // step_size
    return lax.fori_loop(0, num_steps, visit, nothing_of_rows(cut.token_rows))


def _silenced_from(number: Array, limit: Array, answers: Answers) -> Answers:
    """Answers, which weigh nothing beside others if number >= limit."""
    largest, total, out = answers
    is_there = jnp.full(largest.shape, number, jnp.int32) < limit
    return jnp.where(is_there, largest, LOWEST), total, out


def _write(
    cut: Cut, at: tuple[Array, Array], token: int, answers: Answers, results: Any, smem: Any
) -> None:
    row, kv_head = at
    _, total, out = answers
    groups, shape = cut.query_groups, out.shape
    out = out / lax.broadcast_in_dim(jnp.where(total > 0, total, 1.0), shape, [0])
    attended = out.astype(jnp.bfloat16)
    sequence, number = cut.sequence_of(row), cut.token_of(row, token)
    if len(results) == 1:
        (attended_gmem,) = results
        _send(cut, attended, smem, attended_gmem, (sequence, number, kv_head), is_first=not token)
        return
    wide = attended.astype(jnp.float32)
    is_row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WHOLE_ROWS) < groups
    # First within rows: the compiler finds no layouts for both at once.
    largest = jnp.max(jnp.max(jnp.where(is_row, jnp.abs(wide), 0.0), axis=1))
    scale = jnp.where(largest > _FP8_MAX * _TINY, largest / _FP8_MAX, 1.0)
    values_gmem, scale_gmem = results
    place = sequence * cut.sequence_tokens + number
    values = jnp.clip(wide / scale, -_FP8_MAX, _FP8_MAX).astype(FP8)
    _send(cut, values, smem, values_gmem, (place, kv_head), is_first=not token)
    scale_gmem[place, kv_head] = scale


def _send(cut: Cut, rows: Array, smem: Any, gmem: Any, at: Any, *, is_first: bool) -> None:
    """Stores a token's rows at gmem[at], of as many rows as there are queries."""
    groups = cut.query_groups
    if cut.token_rows == groups:
        put(gmem, at, rows)
        return
    if not is_first:
        # The token's before may still be on their way out of there.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = rows
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, groups)], gmem.at[at])
