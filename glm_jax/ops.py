"""The heavy operations, each a reference in plain JAX: the truth that any kernel must meet.

Knows arrays only. Weights are stacked over layers and indexed here, so that a kernel can take the
place of an operation and index them in place.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from glm_jax.fp8 import FP8, quantize_rows

# XLA's CPU products give a row the same bits whatever rows stand beside it, but only from 16 rows
# up (jaxlib 0.12.0.1, all of K 16-1024, N 16-4096; tests/glm_jax/test_ops.py holds this).
_STABLE_ROWS = 16


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


def _layer(
    stacked: Float[Array, " L *rest"], layer: Int32[Array, ""] | int
) -> Float[Array, "*rest"]:
    return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def matmul(
    x: Float[Array, "T K"],
    values: Float[Array, "L *N K"],
    scale: Float32[Array, " L *N"] | None,
    bias: Float[Array, " L *N"] | None,
    layer: Int32[Array, ""] | int,
) -> Float[Array, " T *N"]:
    """A linear layer: x @ values[layer].T * scale[layer] + bias[layer], rounded once, to x's dtype.

    FP8 values (scale given) meet activations quantized per row; plain values (scale None) meet x.
    """
    weight = _layer(values, layer)
    outputs = weight.shape[:-1]
    weight = weight.reshape(-1, weight.shape[-1])
    if scale is None:
        product = _dot(x, weight)
    else:
        quantized, row_scale = quantize_rows(x)
        product = _dot(quantized, weight) * row_scale * _layer(scale, layer).reshape(1, -1)
    if bias is not None:
        product = product + _layer(bias, layer).reshape(1, -1).astype(jnp.float32)
    return product.astype(x.dtype).reshape(x.shape[0], *outputs)


def partial_matmul(
    x: Float[Array, "T K"],
    values: Float[Array, "L D K"],
    scale: Float32[Array, "L D"] | None,
    layer: Int32[Array, ""] | int,
    group_size: int,
) -> Float32[Array, "R T D"]:
    """A row-parallel linear layer, cut along K into R = K / group_size partial products.

    Each group of the row is quantized by its own scale, so that the answer does not depend on how
    many groups a device holds. Sum them with sharding.sum_partials.
    """
    num_rows, width = x.shape
    groups = x.reshape(num_rows, width // group_size, group_size).swapaxes(0, 1)
    weight = _layer(values, layer)
    weight = weight.reshape(weight.shape[0], -1, group_size).swapaxes(0, 1)

    def products(groups: Float[Array, "R T group"]) -> Float32[Array, "R T D"]:
        # One by one: XLA's CPU gives a batch of several groups other bits than a group alone. And in
        # a loop, since a product written out for each group doubled the compilation of a step.
        return lax.map(lambda operands: _dot(*operands), (groups, weight))

    if scale is None:
        return products(groups)
    quantized, row_scale = quantize_rows(groups)
    return products(quantized) * row_scale * _layer(scale, layer)[None, None]


def gated_silu(gate_up: Float[Array, "*T 2 F"]) -> Float[Array, "*T F"]:
    """silu(gate) * up, each rounded to the inputs' dtype."""
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def experts(
    x: Float[Array, "T D"],
    routing: Float32[Array, "T E"],
    gate_up_values: Float[Array, "L E 2 F D"],
    gate_up_scale: Float32[Array, "L E 2 F"] | None,
    down_values: Float[Array, "L E D F"],
    down_scale: Float32[Array, "L E D"] | None,
    layer: Int32[Array, ""] | int,
    group_size: int,
) -> Float32[Array, "R T D"]:
    """The routed experts of this device, summed within each of R = E / group_size expert groups.

    Args:
      x: every token, normed.
      routing: weight of each local expert for each token, 0 where it was not chosen.
      layer: index into the stacks, counted among expert layers.
      group_size: experts per partial sum.

    The reference computes every expert for every token and lets zeros drop out: exact, and right for
    few experts; a kernel does the chosen ones only.
    """
    hidden = gated_silu(matmul(x, gate_up_values, gate_up_scale, None, layer))
    hidden = hidden.swapaxes(0, 1)
    down = _layer(down_values, layer)
    if down_scale is None:
        product = _batched_dot(hidden, down)
    else:
        quantized, row_scale = quantize_rows(hidden)
        product = _batched_dot(quantized, down) * row_scale * _layer(down_scale, layer)[:, None, :]
    # Unchosen experts are masked, not only weighted by zero: an overflow there must not spread.
    weights = routing.T[:, :, None]
    product = jnp.where(weights > 0, product.astype(x.dtype).astype(jnp.float32) * weights, 0.0)
    num_experts, num_rows, width = product.shape
    return product.reshape(num_experts // group_size, group_size, num_rows, width).sum(1)


def router_logits(
    x: Float[Array, "T D"], weight: Float[Array, "L E D"], layer: Int32[Array, ""] | int
) -> Float32[Array, "T E"]:
    """The router's product in float32 at full precision, as the published model computes it."""
    return _dot(x.astype(jnp.float32), _layer(weight, layer).astype(jnp.float32))


def vocab_logits(x: Float[Array, "T D"], table: Float[Array, "V D"]) -> Float32[Array, "T V"]:
    """The output head: x @ table.T, kept in float32."""
    return _dot(x, table)


def paged_attention(
    q: Float[Array, "B T K G H"],
    k_pages: Float[Array, "L pages K page_size H"],
    v_pages: Float[Array, "L pages K page_size H"],
    layer: Int32[Array, ""] | int,
    page_table: Int32[Array, "B P"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "B T K G H"]:
    """Attends each query to positions 0 … its own of its row's pages.

    A query at position -1 attends to nothing and gets zeros. Pages are visited in order with a
    running softmax in float32, as many as the longest row needs; for a shorter row the further ones
    add exact zeros, so an answer does not depend on the lengths beside it.
    """
    num_rows, num_tokens, kv_heads, query_groups, head_dim = q.shape
    page_size = k_pages.shape[3]
    queries = q.transpose(0, 2, 1, 3, 4).reshape(num_rows * kv_heads, -1, head_dim)
    # [B, T] -> [B * K, T * G], the layout of the scores' rows.
    last_visible = jnp.repeat(jnp.repeat(positions, query_groups, axis=1), kv_heads, axis=0)

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
        added = _batched_dot(shares.astype(q.dtype), values.swapaxes(1, 2))
        return new_largest, total * fade + shares.sum(-1), out * fade[..., None] + added

    shape = queries.shape[:2]
    start = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    num_pages = jnp.max(positions) // page_size + 1
    _, total, out = lax.fori_loop(0, num_pages, visit, start)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
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
