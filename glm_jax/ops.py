"""The heavy operations, each a reference in plain JAX: the truth that any kernel must meet.

Knows arrays only. Weights are stacked over layers and indexed here, so that a kernel can take the
place of an operation and index them in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float8e4m3fn, Float32, Int32

from glm_jax.fp8 import FP8, quantize_rows

# XLA's CPU products give a row the same bits whatever rows stand beside it, but only from 16 rows
# up (jaxlib 0.12.0.1, all of K 16-1024, N 16-4096; tests/glm_jax/test_ops.py holds this).
_STABLE_ROWS = 16

Layer = Int32[Array, ""] | int


class Rows(NamedTuple):
    """Activations as products take them: quantized once, whatever number of weights they meet.

    Attributes:
      plain: None where whoever made them hands on the quantized ones only.
      values, scale: for FP8 weights, None for others; each of R equal groups of columns has a scale.
    """

    plain: Float[Array, "T K"] | None
    values: Float8e4m3fn[Array, "T K"] | None = None
    scale: Float32[Array, "T R"] | None = None


class NormedRows(NamedTuple):
    """What stands between two sub-layers.

    Attributes:
      residual: the sum of everything so far.
      rows: the same, normed for the sub-layer that follows.
    """

    residual: Float[Array, "T D"]
    rows: Rows


def as_rows(x: Float[Array, "T K"], *, is_fp8: bool, num_groups: int = 1) -> Rows:
    """The rows as they meet weights that are FP8 or are not; each group of columns has its scale."""
    if not is_fp8:
        return Rows(x)
    values, scale = quantize_rows(x.reshape(x.shape[0], num_groups, -1))
    return Rows(x, values.reshape(x.shape), scale[..., 0])


def rms_norm(
    x: Float[Array, "*T D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*T D"]:
    """Root-mean-square norm; rounds to x's dtype before the weight, as the published model does."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def add_norm(
    residual: Float[Array, "T D"],
    added: Float[Array, "T D"] | None,
    weight: Float[Array, "L D"],
    layer: Layer,
    *,
    eps: float,
    is_fp8: bool,
) -> NormedRows:
    """residual + added, normed with the layer's weight and made ready for the weights it meets."""
    total = residual if added is None else residual + added
    return NormedRows(total, as_rows(rms_norm(total, _layer(weight, layer), eps), is_fp8=is_fp8))


def _dot(x: Float[Array, "T K"], values: Float[Array, "N K"]) -> Float32[Array, "T N"]:
    """x @ values.T accumulated in float32, each row independent of T."""
    return _batched_dot(x[None], values[None])[0]


def _batched_dot(
    x: Float[Array, "B T K"], values: Float[Array, "B N K"]
) -> Float32[Array, "B T N"]:
    """x[b] @ values[b].T for each b, accumulated in float32, each row independent of B and T.

    float32 operands keep full precision. FP8 ones meet as bfloat16, which holds them exactly, as it
    does each product; hosts multiply bfloat16 several times faster than FP8.
    """
    if x.dtype == FP8:
        x, values = x.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
    num_rows = x.shape[1]
    padding = max(0, _STABLE_ROWS - num_rows)
    product = lax.dot_general(
        jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x,
        values,
        (((2,), (2,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return product[:, :num_rows]


def _layer(stacked: Float[Array, " L *rest"], layer: Layer) -> Float[Array, "*rest"]:
    return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def product(
    rows: Rows,
    values: Float[Array, "L *N K"],
    scale: Float32[Array, " L *N"] | None,
    bias: Float[Array, " L *N"] | None,
    layer: Layer,
) -> Float[Array, " T *N"]:
    """A linear layer: rows @ values[layer].T * scale[layer] + bias[layer], rounded once.

    FP8 values (scale given) meet the quantized rows; plain values (scale None) the plain ones.
    """
    weight = _layer(values, layer)
    outputs = weight.shape[:-1]
    weight = weight.reshape(-1, weight.shape[-1])
    assert rows.plain is not None
    if scale is None:
        out = _dot(rows.plain, weight)
    else:
        assert rows.values is not None and rows.scale is not None
        out = _dot(rows.values, weight) * rows.scale * _layer(scale, layer).reshape(1, -1)
    if bias is not None:
        out = out + _layer(bias, layer).reshape(1, -1).astype(jnp.float32)
    return out.astype(rows.plain.dtype).reshape(rows.plain.shape[0], *outputs)


def matmul(
    x: Float[Array, "T K"],
    values: Float[Array, "L *N K"],
    scale: Float32[Array, " L *N"] | None,
    bias: Float[Array, " L *N"] | None,
    layer: Layer,
) -> Float[Array, " T *N"]:
    """product of rows that are not quantized yet."""
    return product(as_rows(x, is_fp8=scale is not None), values, scale, bias, layer)


def partial_products(
    rows: Rows,
    values: Float[Array, "L D K"],
    scale: Float32[Array, "L D"] | None,
    layer: Layer,
    group_size: int,
) -> Float32[Array, "R T D"]:
    """A row-parallel linear layer, cut along K into R = K / group_size partial products.

    Each group of the row is quantized by its own scale, so that the answer does not depend on how
    many groups a device holds. Sum them with sharding.sum_partials.
    """
    weight = _layer(values, layer)
    weight = weight.reshape(weight.shape[0], -1, group_size).swapaxes(0, 1)

    def products(x: Float[Array, "T K"]) -> Float32[Array, "R T D"]:
        groups = x.reshape(x.shape[0], -1, group_size).swapaxes(0, 1)
        # One by one: XLA's CPU gives a batch of several groups other bits than a group alone. And in
        # a loop, since a product written out for each group doubled the compilation of a step.
        return lax.map(lambda operands: _dot(*operands), (groups, weight))

    if scale is None:
        assert rows.plain is not None
        return products(rows.plain)
    assert rows.values is not None and rows.scale is not None
    return products(rows.values) * rows.scale.T[:, :, None] * _layer(scale, layer)[None, None]


def partial_matmul(
    x: Float[Array, "T K"],
    values: Float[Array, "L D K"],
    scale: Float32[Array, "L D"] | None,
    layer: Layer,
    group_size: int,
) -> Float32[Array, "R T D"]:
    """partial_products of rows that are not quantized yet."""
    rows = as_rows(x, is_fp8=scale is not None, num_groups=x.shape[1] // group_size)
    return partial_products(rows, values, scale, layer, group_size)


def gated_silu(gate_up: Float[Array, "*T 2 F"]) -> Float[Array, "*T F"]:
    """silu(gate) * up, each rounded to the inputs' dtype."""
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def experts(
    rows: Rows,
    routing: Float32[Array, "T E"],
    gate_up_values: Float[Array, "L E 2 F D"],
    gate_up_scale: Float32[Array, "L E 2 F"] | None,
    down_values: Float[Array, "L E D F"],
    down_scale: Float32[Array, "L E D"] | None,
    layer: Layer,
    group_size: int,
) -> Float32[Array, "R T D"]:
    """The routed experts of this device, summed within each of R = E / group_size expert groups.

    Args:
      rows: every token, normed.
      routing: weight of each local expert for each token, 0 where it was not chosen.
      layer: index into the stacks, counted among expert layers.
      group_size: experts per partial sum.

    The reference computes every expert for every token and lets zeros drop out: exact, and right for
    few experts; a kernel does the chosen ones only.
    """
    hidden = gated_silu(product(rows, gate_up_values, gate_up_scale, None, layer))
    hidden = hidden.swapaxes(0, 1)
    down = _layer(down_values, layer)
    if down_scale is None:
        out = _batched_dot(hidden, down)
    else:
        quantized, row_scale = quantize_rows(hidden)
        out = _batched_dot(quantized, down) * row_scale * _layer(down_scale, layer)[:, None, :]
    # Unchosen experts are masked, not only weighted by zero: an overflow there must not spread.
    weights = routing.T[:, :, None]
    out = jnp.where(weights > 0, out.astype(hidden.dtype).astype(jnp.float32) * weights, 0.0)
    num_experts, num_rows, width = out.shape
    return out.reshape(num_experts // group_size, group_size, num_rows, width).sum(1)


def local_routing(
    experts: Int32[Array, "T k"], weights: Float32[Array, "T k"], first: Layer, num_local: int
) -> Float32[Array, "T E"]:
    """The weight of each of the experts first … first + num_local - 1 for each token, 0 if unchosen."""
    is_chosen = experts[:, :, None] == (first + jnp.arange(num_local))[None, None, :]
    return jnp.where(is_chosen, weights[:, :, None], 0.0).sum(1)


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
    """Each token's experts by falling score plus bias, their weights, and every expert's score.

    Picks by score plus correction bias; weighs by score alone, renormalized and scaled.
    """
    scores = jax.nn.sigmoid(router_logits(x, weight, layer))
    _, chosen = lax.top_k(scores + _layer(bias, layer)[None], num_experts_per_tok)
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return chosen, weights * routed_scaling_factor, scores


def router_logits(
    x: Float[Array, "T D"], weight: Float[Array, "L E D"], layer: Layer
) -> Float32[Array, "T E"]:
    """The router's product in float32 at full precision, as the published model computes it."""
    return _dot(x.astype(jnp.float32), _layer(weight, layer).astype(jnp.float32))


def vocab_logits(x: Float[Array, "T D"], table: Float[Array, "V D"]) -> Float32[Array, "T V"]:
    """The output head: x @ table.T, kept in float32."""
    return _dot(x, table)


def rotate(
    x: Float[Array, "*rows heads H"],
    positions: Int32[Array, "*rows"],
    rotary_dim: int,
    theta: float,
) -> Float[Array, "*rows heads H"]:
    """Rotary embedding in half style on the first rotary_dim dimensions; the rest pass through.

    Dimension i < rotary_dim / 2 pairs with i + rotary_dim / 2 and turns by
    position * theta^(-2 i / rotary_dim). Sines are rounded to x's dtype, as the published model does.
    """
    half = rotary_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequencies = frequencies.reshape((1,) * positions.ndim + (half,))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos = jnp.cos(angles).astype(x.dtype)[..., None, :]
    sin = jnp.sin(angles).astype(x.dtype)[..., None, :]
    first, second, rest = jnp.split(x, [half, rotary_dim], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class HeadNorms(NamedTuple):
    """What turns a layer's projected heads into queries and keys.

    Attributes:
      q_norm, k_norm: weights of the norms, None where the model has none.
    """

    q_norm: Float[Array, "L H"] | None
    k_norm: Float[Array, "L H"] | None
    eps: float
    rotary_dim: int
    theta: float


def split_heads(
    qkv: Float[Array, "B T K G2 H"],
    norms: HeadNorms,
    positions: Int32[Array, "B T"],
    layer: Layer,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries and keys, normed and rotated, and values, of G query heads, a key and a value a head."""
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    if norms.q_norm is not None and norms.k_norm is not None:
        q = rms_norm(q, _layer(norms.q_norm, layer), norms.eps)
        k = rms_norm(k, _layer(norms.k_norm, layer), norms.eps)
    rotary = (norms.rotary_dim, norms.theta)
    q_heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    return rotate(q_heads, positions, *rotary).reshape(q.shape), rotate(k, positions, *rotary), v


def paged_attention(
    q: Float[Array, "B T K G H"],
    k_pages: Float[Array, "L pages K page_size H"],
    v_pages: Float[Array, "L pages K page_size H"],
    layer: Layer,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "B T K G H"]:
    """Attends each query to positions 0 … its own of its row's pages.

    A query at position -1 attends to nothing and gets zeros. Pages are visited in order with a
    running softmax in float32, as many as the longest row needs; for a shorter row the further ones
    add exact zeros, so an answer depends neither on the lengths beside it nor on T.
    """
    num_rows, num_tokens, kv_heads, query_groups, head_dim = q.shape
    page_size = k_pages.shape[3]
    queries = q.transpose(0, 2, 1, 3, 4).reshape(num_rows * kv_heads, -1, head_dim)
    # [B, T] -> [B * K, T * G], the layout of the scores' rows.
    last_visible = jnp.repeat(jnp.repeat(positions, query_groups, axis=1), kv_heads, axis=0)
    # Whole vectors of queries: XLA's CPU computes what is left over one by one, with other bits.
    padding = -(num_tokens * query_groups) % _STABLE_ROWS
    queries = jnp.pad(queries, ((0, 0), (0, padding), (0, 0)))
    last_visible = jnp.pad(last_visible, ((0, 0), (0, padding)), constant_values=-1)

    def visit(index: Int32[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        largest, total, out = carry
        page = lax.dynamic_index_in_dim(page_table, index, axis=1, keepdims=False)
        keys = k_pages[layer, page].reshape(-1, page_size, head_dim).astype(q.dtype)
        values = v_pages[layer, page].reshape(-1, page_size, head_dim).astype(q.dtype)
        scores = _batched_dot(queries, keys) * head_dim**-0.5
        key_positions = index * page_size + jnp.arange(page_size)
        is_visible = key_positions[None, None, :] <= last_visible[:, :, None]
        scores = jnp.where(is_visible, scores, -jnp.inf)
        # A share of 0 does not silence what another sequence left there: 0 * inf is NaN.
        values = jnp.where(is_visible.any(axis=1)[..., None], values, 0)
        new_largest = jnp.maximum(largest, scores.max(-1))
        shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
        shares = jnp.exp(scores - shift[..., None])
        fade = jnp.exp(largest - shift)
        # A transposition that became part of the product would make its bits depend on T.
        values = lax.optimization_barrier(values.swapaxes(1, 2))
        added = _batched_dot(shares.astype(q.dtype), values)
        return new_largest, total * fade + shares.sum(-1), out * fade[..., None] + added

    shape = queries.shape[:2]
    start = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    num_pages = jnp.max(positions) // page_size + 1
    _, total, out = lax.fori_loop(0, num_pages, visit, start)
    out = (out / jnp.where(total > 0, total, 1.0)[..., None])[:, : num_tokens * query_groups]
    out = out.reshape(num_rows, kv_heads, num_tokens, query_groups, head_dim)
    return out.swapaxes(1, 2).astype(q.dtype)


def causal_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
    """Attention without a cache, differentiable: for training, and to read the model's insides.

    Args:
      visible: visible[b, t, s] where query t may see key s; every query must see at least one.
    """
    scores = jnp.einsum(
        "btkgh,bskh->bktgs",
        q.astype(jnp.float32) * q.shape[-1] ** -0.5,
        k.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    scores = jnp.where(visible[:, None, :, None, :], scores, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum(
        "bktgs,bskh->btkgh", shares, v.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return out.astype(q.dtype)
