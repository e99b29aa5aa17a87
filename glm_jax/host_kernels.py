"""The heavy operations on a host's cores: the references' signatures, and one call into C for each.

Knows no layer. A row's bits do not depend on the rows beside it: each sum has one order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from glm_jax.cache import KVCache
from glm_jax.operands import Weight
from glm_jax.ops import HeadNorms, Layer, Rows

# XLA's numbers for the dtypes of activations (PrimitiveType).
_DTYPES = {"float32": 11, "bfloat16": 16}


def _call(name: str, results: Any, *arrays: Array, aliases: Any = None, **attributes: Any) -> Any:
    return jax.ffi.ffi_call(name, results, input_output_aliases=aliases)(*arrays, **attributes)


def _nothing() -> Float32[Array, "0"]:
    """What an operation without a scale, a bias or a norm gets in its place."""
    return jnp.zeros(0, jnp.float32)


def _or_nothing(array: Array | None) -> Array:
    return _nothing() if array is None else array


def _place(layer: Layer) -> Int32[Array, ""]:
    return jnp.asarray(layer, jnp.int32)


def _met(rows: Rows, scale: Array | None) -> tuple[Array, Array]:
    """The rows as they meet a weight, and their scales."""
    if scale is None:
        assert rows.plain is not None
        return rows.plain, _nothing()
    assert rows.values is not None and rows.scale is not None
    return rows.values, rows.scale


def product(
    rows: Rows,
    values: Float[Array, "L *N K"],
    scale: Float32[Array, " L *N"] | None,
    bias: Float[Array, " L *N"] | None,
    layer: Layer,
) -> Float[Array, " T *N"]:
    """ops.product."""
    assert rows.plain is not None
    shape = (rows.plain.shape[0], *values.shape[1:-1])
    operands = (*_met(rows, scale), values, _or_nothing(scale), _or_nothing(bias), _place(layer))
    result = jax.ShapeDtypeStruct(shape, rows.plain.dtype)
    return _call("glm_product", result, *operands, groups=np.int64(1))


def partial_products(
    rows: Rows,
    values: Float[Array, "L D K"],
    scale: Float32[Array, "L D"] | None,
    layer: Layer,
    group_size: int,
) -> Float32[Array, "R T D"]:
    """ops.partial_products."""
    x, x_scale = _met(rows, scale)
    groups = values.shape[-1] // group_size
    operands = (x, x_scale, values, _or_nothing(scale), _nothing(), _place(layer))
    result = jax.ShapeDtypeStruct((groups, x.shape[0], values.shape[1]), jnp.float32)
    return _call("glm_product", result, *operands, groups=np.int64(groups))


def vocab_logits(x: Float[Array, "T D"], table: Float[Array, "V D"]) -> Float32[Array, "T V"]:
    """ops.vocab_logits."""
    result = jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), jnp.float32)
    operands = (x, _nothing(), table[None], _nothing(), _nothing(), _place(0))
    return _call("glm_product", result, *operands, groups=np.int64(1))


def route(
    x: Float[Array, "T D"],
    weight: Float[Array, "L E D"],
    bias: Float32[Array, "L E"],
    layer: Layer,
    *,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"], Float32[Array, "T E"]]:
    """ops.route."""
    num_tokens, picks = x.shape[0], (x.shape[0], num_experts_per_tok)
    results = [
        jax.ShapeDtypeStruct(picks, jnp.int32),
        jax.ShapeDtypeStruct(picks, jnp.float32),
        jax.ShapeDtypeStruct((num_tokens, weight.shape[1]), jnp.float32),
    ]
    chosen, weights, scores = _call(
        "glm_route", results, x, weight, bias, _place(layer),
        norms=np.int64(norm_topk_prob), scaling=np.float32(routed_scaling_factor),
    )  # fmt: skip
    return chosen, weights, scores


def experts(
    rows: Rows,
    chosen: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
    first: Layer,
    experts: tuple[Weight, Weight],
    shared: tuple[Weight, Weight],
    layer: Layer,
    *,
    group_size: int,
) -> Float32[Array, "R T D"]:
    """The chosen experts among this device's, and its part of the shared one.

    Args:
      first: the first expert of this device.
      experts, shared: gate_up and down projections.
      group_size: experts for each of R partial sums.
    """
    num_partials = experts[1][0].shape[1] // group_size
    picks = (chosen, weights, _place(first))
    return _experts(rows, picks, (*experts, *shared), layer, group_size, num_partials)


def _experts(
    rows: Rows,
    picks: tuple[Array, Array, Array],
    stacks: tuple[Weight, ...],
    layer: Layer,
    group_size: int,
    num_partials: int,
) -> Float32[Array, "R T D"]:
    assert rows.plain is not None
    x, x_scale = _met(rows, stacks[-1][1])
    arrays = [array for values, scale in stacks for array in (values, _or_nothing(scale))]
    chosen, weights, first = picks
    shape = (num_partials, x.shape[0], stacks[-1][0].shape[1])
    return _call(
        "glm_experts", jax.ShapeDtypeStruct(shape, jnp.float32),
        x, x_scale, chosen, weights, _place(layer), first, *arrays,
        group_size=np.int64(group_size), dtype=np.int64(_DTYPES[rows.plain.dtype.name]),
    )  # fmt: skip


def gated_mlp(
    rows: Rows, weights: tuple[Weight, Weight], layer: Layer, group_size: int
) -> Float32[Array, "R T D"]:
    """down(silu(gate(x)) * up(x)), in partial products over groups of the width."""
    assert rows.plain is not None
    none = (rows.plain.shape[0], 0)
    picks = (jnp.zeros(none, jnp.int32), jnp.zeros(none, jnp.float32), _place(0))
    no_expert = (jnp.zeros((1, 1, 1, 1), weights[0][0].dtype), None)
    num_partials = weights[1][0].shape[-1] // group_size
    return _experts(rows, picks, (no_expert, no_expert, *weights), layer, 1, num_partials)


def rotary_table(
    positions: Int32[Array, "B T"], rotary_dim: int, theta: float
) -> Float32[Array, "B T 2 half"]:
    """Cosines, then sines, of each position's angles."""
    half = rotary_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape(1, 1, half)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=2)


def write(
    qkv: Float[Array, "B T K G2 H"],
    norms: HeadNorms,
    positions: Int32[Array, "B T"],
    page_table: Int32[Array, "B P"],
    layer: Layer,
    cache: KVCache,
    rotary: Float32[Array, "B T 2 half"] | None,
) -> tuple[Float[Array, "B T K G H"], KVCache]:
    """ops.split_heads and cache.write: the queries, and keys and values in their pages."""
    if rotary is None:
        rotary = rotary_table(positions, norms.rotary_dim, norms.theta)
    queries = (*qkv.shape[:3], qkv.shape[3] - 2, qkv.shape[4])
    results = [
        jax.ShapeDtypeStruct(queries, qkv.dtype),
        *(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in cache),
    ]
    q, k_pages, v_pages = _call(
        "glm_write", results, qkv, _or_nothing(norms.q_norm), _or_nothing(norms.k_norm), rotary,
        positions, page_table, _place(layer), *cache, aliases={7: 1, 8: 2},
        eps=np.float32(norms.eps),
    )  # fmt: skip
    return q, KVCache(k_pages, v_pages)


def paged_attention(
    q: Float[Array, "B T K G H"],
    k_pages: Float[Array, "L pages K page_size H"],
    v_pages: Float[Array, "L pages K page_size H"],
    layer: Layer,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "B T K G H"]:
    """ops.paged_attention."""
    return _call(
        "glm_attend", jax.ShapeDtypeStruct(q.shape, q.dtype),
        q, k_pages, v_pages, positions, page_table, _place(layer),
    )  # fmt: skip
