"""The KV cache: each token goes to its page and offset, and to no other place."""

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import cache as kv_cache
from glm_jax.cache import CACHE_AXES, KVCache, cache_spec, page_bytes
from glm_jax.shapes import StepShapes
from glm_jax.sharding import check_divisible, make_mesh
from tests.glm_jax.tiny import BF16, F32, FP8, compiled, make_config

LAYERS, PAGES, KV_HEADS, PAGE, HEAD_DIM = 3, 9, 2, 4, 5
BEFORE = -7.0

write = compiled(kv_cache.write)


def cache_of(dtype: np.dtype = F32) -> KVCache:
    shape = (LAYERS, PAGES, KV_HEADS, PAGE, HEAD_DIM)
    return KVCache(jnp.full(shape, BEFORE, dtype), jnp.full(shape, BEFORE, dtype))


def tokens(rows: int, num_tokens: int, dtype: np.dtype = F32) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values with no two numbers alike."""
    shape = (rows, num_tokens, KV_HEADS, HEAD_DIM)
    k = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return k.astype(dtype), (k + 0.5).astype(dtype)


def test_the_worked_example() -> None:
    table, positions = np.array([[7, 2]], np.int32), np.array([[3, 4]], np.int32)
    k, v = tokens(1, 2)
    after = write(cache_of(), 1, table, positions, k, v)
    for stored, given in zip(after, (k, v), strict=True):
        np.testing.assert_array_equal(stored[1, 7, :, 3], given[0, 0])
        np.testing.assert_array_equal(stored[1, 2, :, 0], given[0, 1])


def test_only_the_addressed_cells_change() -> None:
    table = np.array([[7, 2, 0], [1, 5, 8], [3, 4, 6]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4], [6, 7, 8, 9, 10], [11, -1, -1, -1, -1]], np.int32)
    k, v = tokens(3, 5)
    for layer in range(LAYERS):
        after = write(cache_of(), np.int32(layer), table, positions, k, v)
        for stored, given in zip(after, (k, v), strict=True):
            expected = np.full(stored.shape, BEFORE, np.float32)
            for (row, token), position in np.ndenumerate(positions):
                if position >= 0:
                    page = table[row, position // PAGE]
                    expected[layer, page, :, position % PAGE] = given[row, token]
            np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("page", [0, PAGES - 1])
def test_padding_writes_nothing_not_even_to_the_page_its_table_names(page: int) -> None:
    table, positions = np.full((2, 3), page, np.int32), np.full((2, 4), -1, np.int32)
    for stored in write(cache_of(), 0, table, positions, *tokens(2, 4)):
        np.testing.assert_array_equal(stored, BEFORE)


def test_padding_beside_a_token_for_the_same_page_leaves_it_alone() -> None:
    # Padding rows have a page table of zeros, and page 0 may be somebody's last page.
    table, positions = np.array([[0], [0]], np.int32), np.array([[3], [-1]], np.int32)
    k, v = tokens(2, 1)
    after = write(cache_of(), 0, table, positions, k, v)
    np.testing.assert_array_equal(after.k[0, 0, :, 3], k[0, 0])
    assert (after.k != BEFORE).sum() == KV_HEADS * HEAD_DIM


def test_what_is_stored_takes_the_caches_dtype() -> None:
    table, positions = np.array([[1]], np.int32), np.array([[2]], np.int32)
    k, v = tokens(1, 1)
    after = write(cache_of(BF16), 0, table, positions, k + 1 / 3, v)
    assert after.k.dtype == BF16
    np.testing.assert_array_equal(after.k[0, 1, :, 2], (k + 1 / 3)[0, 0].astype(BF16))


def test_an_fp8_cache_clamps_what_it_cannot_hold() -> None:
    table, positions = np.array([[1]], np.int32), np.array([[2]], np.int32)
    k, v = tokens(1, 1, BF16)
    k[0, 0, 0, :4] = (1000, -1e30, 449, 3.3)
    after = write(cache_of(FP8), 0, table, positions, k, v)
    assert after.k.dtype == FP8
    stored = after.k[0, 1, 0, 2, :4].astype(np.float32)
    np.testing.assert_array_equal(stored, [448, -448, 448, 3.25])


def test_the_cache_is_pages_of_all_layers_split_by_kv_head() -> None:
    config = make_config()
    shapes = StepShapes(
        num_slots=2, num_pages=6, page_size=16, max_seq_len=40, prefill_tile=8,
        prefill_buckets=(1,), decode_buckets=(2,),
    )  # fmt: skip
    spec = cache_spec(config, shapes, BF16)
    assert spec.shape == (2, 6, 8, 16, 8) and spec.axes == CACHE_AXES and spec.dtype == BF16
    check_divisible({"k": spec}, make_mesh(8))
    both = 2 * np.prod(spec.shape) * 2
    assert page_bytes(config, 16, BF16) * 6 == both
    assert page_bytes(config, 16, F32) * 6 == 2 * both


def test_a_page_of_glm_4_7_has_the_published_size() -> None:
    glm_4_7 = make_config(
        num_hidden_layers=92, num_key_value_heads=8, num_attention_heads=96, head_dim=128
    )
    assert page_bytes(glm_4_7, 1, BF16) == 376_832
