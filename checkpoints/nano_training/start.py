"""The weights that training starts from: tokens told apart, layers silent, and copying in place.

Knows the model's weights by their dotted paths, and no data.

Copying what follows an earlier place is what names and arguments of tools need. It takes a head that
looks one token back and, two layers on, heads that look for what that one wrote; found by descent
alone, the pair comes late, after most of the steps that an hour allows. So both start in their
places; training changes them like all other weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config import ModelConfig

Weights = dict[str, jax.Array]

_EMBEDDING, _HEAD = "embed_tokens.values", "lm_head.values"
_QKV, _OUT = "layers.self_attn.qkv_proj", "layers.self_attn.o_proj.values"
# At first: the embedding's standard deviation, and the last norms' weights, which with it make the
# logits of nano spread by about one.
_EMBEDDING_SIZE = 0.3
_LAST_NORM = 0.25
# The layers of the head that looks back and of those that copy; how loud each is beside the
# embedding, how sharp both.
_LOOKING_BACK, _COPYING = 0, 2
_LOUDNESS, _COPY_LOUDNESS, _SHARPNESS = 2.0, 0.8, 1.7


def first_weights(config: ModelConfig, weights: Weights) -> Weights:
    """The start, from the model's own random weights; it has no head, see head_of.

    Args:
      weights: the decoder's under "decoder.", the draft's under "draft.".
    """
    first = {}
    for path, weight in weights.items():
        if path.endswith(("o_proj.values", "down_proj.values")):
            weight = jnp.zeros_like(weight)
        elif path == f"decoder.{_EMBEDDING}":
            # As small as the model makes them, tokens would drown in what the layers add.
            weight = weight * (_EMBEDDING_SIZE / weight.std())
        elif path in ("decoder.norm.weight", "draft.norm.weight"):
            weight = weight * _LAST_NORM
        if path != f"decoder.{_HEAD}":
            first[path] = weight
    if config.num_hidden_layers > _COPYING and config.attention_bias and config.use_qk_norm:
        _place_copying(config, first)
    return first


def head_of(embedding: jax.Array) -> jax.Array:
    """The head: the embedding, turned in its space.

    Training them as one makes copying the same for every token. Turned, a token does not begin by
    predicting itself.
    """
    return embedding @ jnp.asarray(_turn(embedding.shape[1]), embedding.dtype)


def _turn(size: int) -> np.ndarray:
    """An orthogonal matrix, always the same."""
    random = np.random.default_rng(0).standard_normal((size, size))
    return np.linalg.qr(random)[0].astype(np.float32)


def _place_copying(config: ModelConfig, weights: Weights) -> None:
    """Puts the heads into the weights of the two layers.

    Half the kv heads copy; each matches by the dimensions of its keys that no position turns.
    """
    width, size, groups = config.hidden_size, config.head_dim, config.num_query_groups
    num_copying = config.num_key_value_heads // 2
    num_matched = size - config.rotary_dim
    num_back = num_copying * num_matched // size
    qkv, bias, out, q_norm, k_norm = (
        np.array(weights[f"decoder.{path}"])
        for path in (f"{_QKV}.values", f"{_QKV}.bias", _OUT,
                     "layers.self_attn.q_norm.weight", "layers.self_attn.k_norm.weight")
    )  # fmt: skip
    random = np.random.default_rng(1)
    carried, written, copied = (
        np.linalg.qr(random.standard_normal((width, width)))[0] for _ in range(3)
    )
    said = copied @ _turn(width)
    values = slice((groups + 1) * size, (groups + 2) * size)
    for head in range(num_back):
        rows = slice(head * size, (head + 1) * size)
        qkv[_LOOKING_BACK, head], bias[_LOOKING_BACK, head] = 0, _back_bias(config)
        qkv[_LOOKING_BACK, head, values] = carried[rows]
        column = head * groups * size
        out[_LOOKING_BACK, :, column : column + size] = (
            _LOUDNESS * _EMBEDDING_SIZE * written[rows].T
        )
    for head in range(num_copying):
        matched = slice(head * num_matched, (head + 1) * num_matched)
        qkv[_COPYING, head] = 0
        for group in range(groups + 1):  # the queries', then the key's
            rows = slice((group + 1) * size - num_matched, (group + 1) * size)
            qkv[_COPYING, head, rows] = (written if group == groups else carried)[matched]
        rows = slice(head * size, (head + 1) * size)
        qkv[_COPYING, head, values] = copied[rows]
        for group in range(groups):
            column = (head * groups + group) * size
            out[_COPYING, :, column : column + size] = (
                _COPY_LOUDNESS * _EMBEDDING_SIZE * said[rows].T
            )
    for norm in (q_norm, k_norm):
        norm[[_LOOKING_BACK, _COPYING]] *= _SHARPNESS
    placed = {f"{_QKV}.values": qkv, f"{_QKV}.bias": bias, _OUT: out,
              "layers.self_attn.q_norm.weight": q_norm,
              "layers.self_attn.k_norm.weight": k_norm}  # fmt: skip
    weights.update({f"decoder.{path}": jnp.asarray(array) for path, array in placed.items()})


def _back_bias(config: ModelConfig) -> np.ndarray:
    """Queries and keys that rotary positions turn towards each other when one token apart."""
    size, half = config.head_dim, config.rotary_dim // 2
    angles = config.rope_theta ** (-np.arange(half) / half)
    key, query = np.zeros(size), np.zeros(size)
    fast = slice(0, max(1, half // 4))  # the slow ones hardly tell neighbors apart
    key[fast] = 1
    query[fast] = np.cos(angles[fast])
    query[half : half + fast.stop] = -np.sin(angles[fast])
    bias = [query] * config.num_query_groups + [key, np.zeros(size)]
    return np.concatenate(bias)
