"""The weights that training starts from: tokens told apart, layers silent, and copying in place.

Knows the model's weights by their dotted paths, and no data.

Copying what follows an earlier place is what names and arguments of tools need. It takes a head that
looks one token back and, two layers on, heads that look for what that one wrote. Choosing among
several tools takes more: a tool's name stands before its description, which alone tells what the
name is for, so a head of the layer between carries each name on over the tokens that follow it.
Found by descent alone, such chains come late, after most of the steps that an hour allows. So they
start in their places; training changes them like all other weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config import ModelConfig

Weights = dict[str, jax.Array]

_EMBEDDING, _HEAD = "embed_tokens.values", "lm_head.values"
_ATTENTION = tuple(
    f"layers.self_attn.{name}"
    for name in (
        "qkv_proj.values", "qkv_proj.bias", "o_proj.values", "q_norm.weight", "k_norm.weight"
    )
)  # fmt: skip
# At first: the embedding's standard deviation, and the last norms' weights, which with it make the
# logits of nano spread by about one.
_EMBEDDING_SIZE = 0.3
_LAST_NORM = 0.25
# The layers of the heads that look back, carry a name on, and copy; how loud each query is beside
# the embedding, how sharp all.
_LOOKING_BACK, _CARRYING, _COPYING = 0, 1, 2
_LOUDNESS, _COPY_LOUDNESS, _SHARPNESS = 1.0, 0.8, 1.7
# What a query that carries names asks of a key: to be a name's first token, and to be near, of which
# only rotary dimensions that turn once in a few hundred tokens tell.
_MARK, _NEARNESS = 3.0, 1.5
_NEAR_ANGLES = (0.008, 0.04)


def first_weights(config: ModelConfig, weights: Weights, before_name: int | None = None) -> Weights:
    """The start, from the model's own random weights; it has no head, see head_of.

    Args:
      weights: the decoder's under "decoder.", the draft's under "draft.".
      before_name: the token two places before a tool's name, "name"; none carries names if None.
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
        _place_chains(config, first, before_name)
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


class _Heads:
    """The decoder's attention as arrays to write into, by layer and kv head."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.num_groups, self.size = config.num_query_groups, config.head_dim
        self.qkv, self.bias, self.out, self.q_norm, self.k_norm = (
            np.array(weights[f"decoder.{path}"]) for path in _ATTENTION
        )

    def match(self, layer: int, head: int, query: np.ndarray, key: np.ndarray) -> None:
        """Lets the head look where the key's directions hold what its query's hold, at any distance."""
        self.qkv[layer, head] = 0
        for group in range(self.num_groups + 1):  # the queries', then the key's
            end = (group + 1) * self.size
            rows = slice(end - len(key), end)
            self.qkv[layer, head, rows] = key if group == self.num_groups else query

    def look(self, layer: int, head: int, query: np.ndarray, key: np.ndarray) -> None:
        """Lets the head look at what its positions, and no content, say."""
        self.qkv[layer, head] = 0
        value = np.zeros(self.size)
        self.bias[layer, head] = np.concatenate([query] * self.num_groups + [key, value])

    def move(
        self, layer: int, head: int, read: np.ndarray, write: np.ndarray, loudness: float
    ) -> None:
        """Lets the head write into those directions what it finds in these, both [head size, D]."""
        self.qkv[layer, head, (self.num_groups + 1) * self.size :] = read
        for group in range(self.num_groups):
            column = (head * self.num_groups + group) * self.size
            columns = slice(column, column + self.size)
            self.out[layer, :, columns] = loudness * _EMBEDDING_SIZE * write.T

    def weights(self) -> Weights:
        """What was written, by path."""
        arrays = (self.qkv, self.bias, self.out, self.q_norm, self.k_norm)
        placed = zip(_ATTENTION, arrays, strict=True)
        return {f"decoder.{path}": jnp.asarray(array) for path, array in placed}


def _place_chains(config: ModelConfig, weights: Weights, before_name: int | None) -> None:
    """Puts the heads into the weights of their layers.

    Half the kv heads copy; each matches by the dimensions of its keys that no position turns.
    """
    heads = _Heads(config, weights)
    size, num_matched = config.head_dim, config.head_dim - config.rotary_dim
    num_copying = config.num_key_value_heads // 2
    num_back = num_copying * num_matched // size
    random = np.random.default_rng(1)
    carried, written, copied = (_directions(config, random) for _ in range(3))
    said = copied @ _turn(config.hidden_size)
    for head in range(num_back):
        rows = slice(head * size, (head + 1) * size)
        heads.look(_LOOKING_BACK, head, *_looking_back(config, 1))
        heads.move(_LOOKING_BACK, head, carried[rows], written[rows], _LOUDNESS)
    for head in range(num_copying):
        rows = slice(head * size, (head + 1) * size)
        matched = slice(head * num_matched, (head + 1) * num_matched)
        heads.match(_COPYING, head, carried[matched], written[matched])
        heads.move(_COPYING, head, copied[rows], said[rows], _COPY_LOUDNESS)
    sharp = [_LOOKING_BACK, _COPYING]
    if before_name is not None:
        marker = np.asarray(weights[f"decoder.{_EMBEDDING}"])[before_name]
        _place_carrying(config, heads, random, marker)
        tag = _directions(config, random)[:size]
        heads.move(_CARRYING, 0, copied[:size], tag, _COPY_LOUDNESS)
        # Where to look for a tag is left to training.
        heads.move(_COPYING, num_copying, tag, said[:size], _COPY_LOUDNESS)
        sharp.append(_CARRYING)
    for norm in (heads.q_norm, heads.k_norm):
        norm[sharp] *= _SHARPNESS
    weights.update(heads.weights())


def _place_carrying(
    config: ModelConfig, heads: _Heads, random: np.random.Generator, marker: np.ndarray
) -> None:
    """Lets each token look at the last token that has the marker two places before it."""
    size, unturned = config.head_dim, config.rotary_dim
    head = config.num_key_value_heads // 2 * (size - unturned) // size  # the first that is free
    seen, told = (_directions(config, random)[:size] for _ in range(2))
    heads.look(_LOOKING_BACK, head, *_looking_back(config, 2))
    heads.move(_LOOKING_BACK, head, seen, told, _LOUDNESS)
    half = unturned // 2
    angles = config.rope_theta ** (-np.arange(half) / half)
    least, most = _NEAR_ANGLES
    (near,) = np.nonzero((angles > least) & (angles < most))
    query, key = np.zeros(size), np.zeros(size)
    query[unturned], query[near], key[near] = _MARK, _NEARNESS, _NEARNESS
    # Keys are normed: beside a constant, little of what is no mark is left.
    key[unturned + 1] = _MARK
    heads.look(_CARRYING, 0, query, key)
    mark = told.T @ (seen @ marker)
    row = heads.num_groups * size + unturned
    heads.qkv[_CARRYING, 0, row] = mark / np.linalg.norm(mark)


def _directions(config: ModelConfig, random: np.random.Generator) -> np.ndarray:
    """Orthogonal directions of the hidden state, [D, D]."""
    return np.linalg.qr(random.standard_normal((config.hidden_size, config.hidden_size)))[0]


def _looking_back(config: ModelConfig, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """A query and a key that rotary positions turn towards each other that many tokens apart."""
    size, half = config.head_dim, config.rotary_dim // 2
    angles = distance * config.rope_theta ** (-np.arange(half) / half)
    key, query = np.zeros(size), np.zeros(size)
    # The slow ones hardly tell neighbors apart; the fast ones alone come round within a tool.
    used = slice(0, max(1, half // (4 if distance == 1 else 2)))
    key[used] = 1
    query[used] = np.cos(angles[used])
    query[half : half + used.stop] = -np.sin(angles[used])
    return query, key
