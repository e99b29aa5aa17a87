"""Attention on a GPU, from the QKV projection to rows for o_proj: which kernels, in which order.

Knows no layer and no reference.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int32

from glm_jax import ops
from glm_jax.cache import KVCache
from glm_jax.ops import HeadNorms, Rows
from glm_jax.pallas import decode_attention, kv_write, prefill_attention
from glm_jax.pallas.chip import Chip

# Tokens of a sequence whose CTAs write what they attend to. They could be two, in CTAs that took longer
# than the launch which that saves (H200: 1.3 ms more a step of one sequence, 0.06 of 64).
_MOST_IN_ONE_KERNEL = 1


class Inputs(NamedTuple):
    """A layer's QKV, and where its keys and values go.

    Attributes:
      qkv: the heads of each token: queries, then the key, then the value.
      page_table: of each row; of each sequence where rows are tokens of one.
      rotary: of the positions, as kv_write.rotary_table makes it.
    """

    qkv: Float[Array, "B T K G2 H"]
    norms: HeadNorms
    positions: Int32[Array, "B T"]
    page_table: Int32[Array, "sequences P"]
    layer: ops.Layer
    cache: KVCache
    rotary: Float[Array, "B T 2 half"] | None


def write(
    chip: Chip, inputs: Inputs, *, interpret: bool
) -> tuple[Float[Array, "B T K G H"], KVCache]:
    """Norms and rotates heads, stores keys and values in the pages; returns the queries."""
    qkv, norms, positions, page_table, layer, cache, rotary = inputs
    q, k_pages, v_pages = kv_write.write(
        qkv, norms.q_norm, norms.k_norm, positions, page_table, layer, *cache,
        eps=norms.eps, rotary_dim=norms.rotary_dim, theta=norms.theta, table=rotary,
        chip=chip, interpret=interpret,
    )  # fmt: skip
    return q, KVCache(k_pages, v_pages)


def write_and_attend(
    chip: Chip,
    inputs: Inputs,
    *,
    is_fp8: bool,
    counters: jax.Ref | None,
    plan: prefill_attention.Plan | None,
    rows_per_sequence: int,
    interpret: bool,
) -> tuple[Rows, KVCache]:
    """`write`, then attends over the pages; with counters, and few tokens a sequence, one kernel does
    both: of what it writes, a CTA reads what is its own, and no other sequence reads any."""
    num_rows, num_tokens = inputs.positions.shape
    if rows_per_sequence > 1:
        inputs = _by_sequence(inputs, rows_per_sequence)
    qkv, norms, positions, page_table, layer, cache, rotary = inputs
    where = layer, page_table, positions
    on: Any = {"chip": chip, "interpret": interpret}

    def of_decode(attended: Any) -> Rows:
        if not is_fp8:
            return as_rows(attended, is_fp8)
        values, scale = attended
        return Rows(None, values.reshape(num_rows, -1), scale)

    if counters is not None and rows_per_sequence <= _MOST_IN_ONE_KERNEL:
        weights: Any = () if norms.q_norm is None else norms[:2]
        angles: Any = rotary
        made, *pages = decode_attention.write_and_attend(
            qkv, weights, angles, *cache, *where, eps=norms.eps, is_quantized=is_fp8,
            counters=counters, **on,
        )  # fmt: skip
        return of_decode(made), KVCache(*pages)
    q, written = write(chip, inputs, interpret=interpret)
    if num_tokens > 1:
        attended = prefill_attention.attend(q, *written, *where, plan=plan, **on)
        return as_rows(attended, is_fp8), written
    attend: Any = decode_attention.attend_quantized if is_fp8 else decode_attention.attend
    return of_decode(attend(q, *written, *where, counters=counters, **on)), written


def _by_sequence(inputs: Inputs, rows_per_sequence: int) -> Inputs:
    """Rows of one token as rows of so many, whose pages kernels read once."""

    def joined(x: Array) -> Array:
        return x.reshape(-1, rows_per_sequence, *x.shape[2:])

    assert inputs.rotary is not None
    return inputs._replace(
        qkv=joined(inputs.qkv), positions=joined(inputs.positions), rotary=joined(inputs.rotary)
    )


def as_rows(attended: Float[Array, "B T K G H"], is_fp8: bool) -> Rows:
    """What o_proj takes, with a scale for each kv head."""
    num_rows, num_tokens, kv_heads = attended.shape[:3]
    flat = attended.reshape(num_rows * num_tokens, -1)
    return ops.as_rows(flat, is_fp8=is_fp8, num_groups=kv_heads)
