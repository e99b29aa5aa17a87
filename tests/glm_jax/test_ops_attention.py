"""Attention over pages against float64: what a row sees, and that nothing else reaches it."""

from dataclasses import dataclass

import numpy as np
import pytest

from glm_jax import ops
from tests.glm_jax.tiny import BF16, F32, bits, compiled, wide

PAGE, KV_HEADS, GROUPS, HEAD_DIM = 4, 2, 3, 16
PAGES_PER_ROW, LAYER = 10, 1
# One position, a full page, one more, several pages, and the longest the table holds.
LENGTHS = (1, PAGE, PAGE + 1, 3 * PAGE - 1, PAGES_PER_ROW * PAGE)

attend = compiled(ops.paged_attention)
attend_causally = compiled(ops.causal_attention)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences of LENGTHS as rows: their keys and values in order, and scattered over pages.

    Attributes:
      q: [B, T, K, G, H]; row b's last query is at position LENGTHS[b] - 1.
      k, v: per row [length, K, H].
      k_pages, v_pages: [2, pages, K, PAGE, H]; `garbage` wherever no sequence is.
      positions: [B, T], -1 before the sequence begins.
    """

    q: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]
    k_pages: np.ndarray
    v_pages: np.ndarray
    table: np.ndarray
    positions: np.ndarray

    def attended(self, rows: list[int] | slice = slice(None)) -> np.ndarray:
        pages = (self.k_pages, self.v_pages, LAYER)
        return attend(self.q[rows], *pages, self.table[rows], self.positions[rows])


def make_sequences(
    dtype: np.dtype = F32, num_tokens: int = 1, garbage: float = 0.0, seed: int = 0
) -> Sequences:
    rng = np.random.default_rng(seed)
    num_pages = len(LENGTHS) * PAGES_PER_ROW + 1  # page 0 fills up the tables and is nobody's
    free = iter(rng.permutation(np.arange(1, num_pages)))
    pages = np.full((2, 2, num_pages, KV_HEADS, PAGE, HEAD_DIM), garbage, np.float32).astype(dtype)
    table = np.zeros((len(LENGTHS), PAGES_PER_ROW), np.int32)
    keys_and_values = []
    for row, length in enumerate(LENGTHS):
        both = rng.normal(size=(2, length, KV_HEADS, HEAD_DIM)).astype(dtype)
        keys_and_values.append(both)
        for position in range(length):
            if position % PAGE == 0:
                table[row, position // PAGE] = next(free)
            page = table[row, position // PAGE]
            pages[:, LAYER, page, :, position % PAGE] = both[:, position]
    q = rng.normal(size=(len(LENGTHS), num_tokens, KV_HEADS, GROUPS, HEAD_DIM))
    positions = np.array(LENGTHS)[:, None] - num_tokens + np.arange(num_tokens)
    k, v = ([both[i] for both in keys_and_values] for i in (0, 1))
    positions = np.maximum(positions, -1).astype(np.int32)
    return Sequences((2 * q).astype(dtype), k, v, pages[0], pages[1], table, positions)


def softmax_attention(sequences: Sequences) -> np.ndarray:
    """Query by query, head by head, in float64; zeros for a query at position -1."""
    out = np.zeros(sequences.q.shape)
    for (row, token), position in np.ndenumerate(sequences.positions):
        for head in range(KV_HEADS if position >= 0 else 0):
            keys = wide(sequences.k[row])[: position + 1, head]
            values = wide(sequences.v[row])[: position + 1, head]
            scores = wide(sequences.q)[row, token, head] @ keys.T / np.sqrt(HEAD_DIM)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out[row, token, head] = shares / shares.sum(-1, keepdims=True) @ values
    return out


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-6), (BF16, 3e-2)])
def test_each_query_sees_its_row_up_to_its_own_position(
    dtype: np.dtype, tolerance: float, num_tokens: int
) -> None:
    sequences = make_sequences(dtype, num_tokens)
    actual = sequences.attended()
    assert actual.dtype == dtype
    np.testing.assert_allclose(wide(actual), softmax_attention(sequences), atol=tolerance)


def test_a_query_at_no_position_gets_zeros() -> None:
    sequences = make_sequences(num_tokens=6)
    padding = sequences.positions < 0
    assert padding.any() and not padding.all()
    np.testing.assert_array_equal(sequences.attended()[padding], 0)
    sequences.positions[:] = -1
    np.testing.assert_array_equal(sequences.attended(), 0)


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("garbage", [3e38, np.inf, -np.inf, np.nan])
def test_what_others_left_in_the_pages_does_not_leak(garbage: float, num_tokens: int) -> None:
    clean = make_sequences(num_tokens=num_tokens)
    dirty = make_sequences(num_tokens=num_tokens, garbage=garbage)
    np.testing.assert_array_equal(bits(clean.attended()), bits(dirty.attended()))


def test_a_later_position_of_the_row_is_not_seen() -> None:
    sequences = make_sequences(num_tokens=1)
    sequences.positions[:] -= 1  # the last key and value of each row are now the future's
    before = sequences.attended()
    for row, length in enumerate(LENGTHS):
        page = sequences.table[row, (length - 1) // PAGE]
        sequences.k_pages[LAYER, page, :, (length - 1) % PAGE] = 50.0
        sequences.v_pages[LAYER, page, :, (length - 1) % PAGE] = 50.0
    np.testing.assert_array_equal(bits(before), bits(sequences.attended()))


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_attends_with_the_same_bits_in_any_company(dtype: np.dtype, num_tokens: int) -> None:
    sequences = make_sequences(dtype, num_tokens)
    together = bits(sequences.attended())
    for rows in ([0], [4], [1, 0], [4, 3, 2, 1, 0]):
        np.testing.assert_array_equal(bits(sequences.attended(rows)), together[rows])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_kv_head_attends_with_the_same_bits_on_a_device_of_its_own(dtype: np.dtype) -> None:
    sequences = make_sequences(dtype, num_tokens=6)
    together = bits(sequences.attended())
    for head in range(KV_HEADS):
        alone = attend(
            sequences.q[:, :, [head]],
            sequences.k_pages[:, :, [head]],
            sequences.v_pages[:, :, [head]],
            LAYER,
            sequences.table,
            sequences.positions,
        )
        np.testing.assert_array_equal(bits(alone), together[:, :, [head]])


def test_a_chunk_sees_what_its_tokens_would_see_one_at_a_time() -> None:
    chunk = make_sequences(num_tokens=6)
    together = chunk.attended()
    pages = (chunk.k_pages, chunk.v_pages, LAYER, chunk.table)
    for token in range(6):
        step = slice(token, token + 1)
        alone = attend(chunk.q[:, step], *pages, chunk.positions[:, step])
        np.testing.assert_allclose(alone, together[:, step], atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    sequences = make_sequences()
    sequences.q[:] *= 1e4
    np.testing.assert_allclose(sequences.attended(), softmax_attention(sequences), atol=2e-6)


def test_attention_without_a_cache_agrees_with_attention_over_pages() -> None:
    length = LENGTHS[-1]
    sequences = make_sequences(num_tokens=length)
    last = [len(LENGTHS) - 1]
    keys, values = sequences.k[-1][None], sequences.v[-1][None]
    visible = np.tri(length, dtype=bool)[None]
    actual = attend_causally(sequences.q[last], keys, values, visible)
    np.testing.assert_allclose(actual, sequences.attended(last), atol=2e-6)


def test_attention_without_a_cache_keeps_packed_sequences_apart() -> None:
    rng = np.random.default_rng(3)
    q = rng.normal(size=(1, 7, KV_HEADS, GROUPS, HEAD_DIM)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 7, KV_HEADS, HEAD_DIM)).astype(np.float32)
    segment = np.array([0, 0, 0, 1, 1, 1, 1])
    visible = np.tri(7, dtype=bool) & (segment[:, None] == segment[None, :])
    packed = attend_causally(q, k, v, visible[None])
    for part in (slice(0, 3), slice(3, 7)):
        alone = attend_causally(q[:, part], k[:, part], v[:, part], visible[None, part, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-6)


@pytest.mark.parametrize("page_size, kv_heads, groups", [(16, 8, 12), (16, 1, 3), (8, 8, 2)])
def test_a_query_gets_the_same_bits_in_a_prefill_and_in_a_decode(
    page_size: int, kv_heads: int, groups: int
) -> None:
    rng = np.random.default_rng(4)
    pages = [rng.normal(size=(1, 12, kv_heads, page_size, 32)).astype(np.float32) for _ in range(2)]
    table = np.arange(12, dtype=np.int32).reshape(4, 3)
    queries = rng.normal(size=(1, 16, kv_heads, groups, 32)).astype(np.float32)
    positions = np.arange(3 * page_size - 16, 3 * page_size, dtype=np.int32)[None]
    at_once = attend(queries, *pages, 0, table[:1], positions)
    quarters = [slice(start, start + 4) for start in range(0, 16, 4)]
    in_quarters = [attend(queries[:, q], *pages, 0, table[:1], positions[:, q]) for q in quarters]
    np.testing.assert_array_equal(bits(np.concatenate(in_quarters, axis=1)), bits(at_once))
    for num_rows in (1, 4):
        for index in range(16):
            alone = np.zeros((num_rows, 1, kv_heads, groups, 32), np.float32)
            places = np.full((num_rows, 1), -1, np.int32)
            alone[0, 0], places[0] = queries[0, index], positions[0, index]
            decoded = attend(alone, *pages, 0, table[:num_rows], places)
            np.testing.assert_array_equal(bits(decoded[0, 0]), bits(at_once[0, index]))
