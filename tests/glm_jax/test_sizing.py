"""Sizing: as many pages as fit and are of use, buckets up to the limits, refusals that say by how much."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from glm_jax.cache import page_bytes
from glm_jax.environment import MEMORY_SHARE
from glm_jax.model import abstract_weights
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh
from glm_jax.sizing import SizingError, choose_shapes, weight_bytes
from tests.glm_jax.tiny import BF16, F32, FP8, make_config

GIB = 1 << 30
HOST_KV_BYTES = 512 << 20


def choose(mesh: Mesh | None = None, config: Any = None, **limits: Any) -> StepShapes:
    defaults: dict[str, Any] = {
        "max_concurrency": 8,
        "max_seq_len": 256,
        "max_batch_tokens": 512,
    }
    return choose_shapes(config or make_config(), mesh or make_mesh(1), BF16, **defaults | limits)


def gpu_mesh(num_devices: int, memory: int | None) -> Any:
    """As much of a mesh of GPUs as sizing looks at."""
    stats = {} if memory is None else {"bytes_limit": memory}
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    devices = np.array([gpu] * num_devices, dtype=object)
    return SimpleNamespace(devices=devices, size=num_devices, shape={"tensor": num_devices})


def glm_4_7() -> Any:
    return make_config(
        is_fp8=True, vocab_size=151552, hidden_size=5120, num_hidden_layers=92,
        num_attention_heads=96, head_dim=128, intermediate_size=12288, first_k_dense_replace=3,
        n_routed_experts=160, num_experts_per_tok=8, moe_intermediate_size=1536,
        max_position_embeddings=202752,
    )  # fmt: skip


def test_an_fp8_cache_has_room_for_twice_the_pages() -> None:
    limits: dict[str, Any] = {"max_concurrency": 10**6, "max_seq_len": 256}
    wide, narrow = (choose(**limits, kv_dtype=dtype).num_pages for dtype in (None, FP8))
    assert narrow == 2 * wide < 4 * 10**6


def test_guessing_takes_room_for_the_mtp_layer_and_its_pages() -> None:
    limits: dict[str, Any] = {"max_concurrency": 10**6, "max_seq_len": 256}
    shapes = [choose(**limits, num_drafts=number) for number in (0, 2)]
    assert [each.num_drafts for each in shapes] == [0, 2]
    assert [each.tokens_per_step for each in shapes] == [1, 3]
    layers = make_config().num_hidden_layers
    assert shapes[1].num_pages == HOST_KV_BYTES // (
        page_bytes(make_config(), 64, BF16) // layers * (layers + 1)
    )
    limits = {"max_concurrency": 512, "max_seq_len": 202752, "max_batch_tokens": 8192}
    without, guessing, more_logits = (
        choose(gpu_mesh(8, 139 * GIB), glm_4_7(), **limits, num_drafts=number).num_pages
        for number in (0, 1, 3)
    )
    assert 0.97 * without < guessing < 0.99 * without
    assert more_logits < 0.97 * guessing  # of 2048 tokens a step
    more = weight_bytes(glm_4_7(), BF16, 1, with_mtp=True) - weight_bytes(glm_4_7(), BF16, 1)
    assert more == pytest.approx(4.05e9, rel=1e-3)


def test_guessing_needs_an_mtp_layer_and_a_sensible_number() -> None:
    with pytest.raises(SizingError, match="no MTP layer"):
        choose(config=make_config(num_nextn_predict_layers=0), num_drafts=1)
    with pytest.raises(ValueError, match="num_drafts must be 0 … 3, got 4"):
        choose(num_drafts=4)


def test_no_more_pages_than_all_sequences_can_fill() -> None:
    shapes = choose(max_concurrency=8, max_seq_len=250)
    assert (shapes.page_size, shapes.pages_per_sequence, shapes.num_pages) == (64, 4, 32)
    assert (shapes.num_slots, shapes.max_seq_len) == (8, 250)


def test_a_short_sequence_needs_no_page_longer_than_itself() -> None:
    shapes = choose(max_seq_len=20)
    assert (shapes.page_size, shapes.num_pages) == (20, 8)


def test_no_more_pages_than_fit() -> None:
    config = make_config(max_position_embeddings=65536)
    shapes = choose(config=config, max_concurrency=200, max_seq_len=65536)
    assert shapes.num_pages == HOST_KV_BYTES // page_bytes(config, 64, BF16)
    assert shapes.num_pages < 200 * shapes.pages_per_sequence


def test_a_sequence_that_does_not_fit_is_refused_by_the_pages_it_lacks() -> None:
    config = make_config(max_position_embeddings=2**21)
    fitting = HOST_KV_BYTES // page_bytes(config, 64, BF16)
    longest = fitting * 64
    assert choose(config=config, max_seq_len=longest).num_pages == fitting
    with pytest.raises(SizingError) as caught:
        choose(config=config, max_seq_len=longest + 1)
    assert str(caught.value) == (
        f"one sequence of {longest + 1} positions needs {fitting + 1} KV pages and {fitting} fit "
        "beside the weights; lower --max-seq-len or use more devices"
    )


def test_a_sequence_longer_than_the_models_is_refused() -> None:
    assert choose(max_seq_len=4096).max_seq_len == 4096
    with pytest.raises(SizingError, match=r"max_seq_len = 4097 .*max_position_embeddings = 4096"):
        choose(max_seq_len=4097)


def test_a_mesh_that_cannot_share_the_model_is_refused_with_the_option_to_change() -> None:
    with pytest.raises(SizingError, match=r"3 devices cannot share .* \(--num-gpus\)"):
        choose(mesh=make_mesh(3))


@pytest.mark.parametrize(
    ("max_concurrency", "buckets"),
    [
        (1, (1,)),
        (5, (1, 2, 4, 5)),
        (8, (1, 2, 4, 8)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
        (600, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600)),
    ],
)
def test_decode_buckets_end_with_the_most_sequences(
    max_concurrency: int, buckets: tuple[int, ...]
) -> None:
    assert choose(max_concurrency=max_concurrency).decode_buckets == buckets


@pytest.mark.parametrize(("max_concurrency", "most"), [(3, 3), (8, 8), (9, 16), (100, 104)])
def test_a_gpu_decodes_rows_by_eights_and_has_whole_pages(max_concurrency: int, most: int) -> None:
    limits = {"max_concurrency": max_concurrency, "max_seq_len": 50, "max_batch_tokens": 8192}
    shapes = choose(gpu_mesh(8, 139 * GIB), glm_4_7(), **limits)
    assert (shapes.num_slots, shapes.decode_buckets[-1]) == (max_concurrency, most)
    assert (shapes.page_size, shapes.max_seq_len, shapes.pages_per_sequence) == (64, 50, 1)


@pytest.mark.parametrize(
    ("max_batch_tokens", "tile", "rows"), [(1, 8, 1), (37, 32, 1), (300, 128, 2)]
)
def test_a_gpu_computes_prompts_by_eights(max_batch_tokens: int, tile: int, rows: int) -> None:
    limits = {"max_concurrency": 1, "max_seq_len": 500, "max_batch_tokens": max_batch_tokens}
    shapes = choose(gpu_mesh(8, 139 * GIB), glm_4_7(), **limits)
    assert (shapes.prefill_tile, shapes.prefill_buckets[-1]) == (tile, rows)


@pytest.mark.parametrize(
    ("max_batch_tokens", "tile", "buckets"),
    [
        (1, 1, (1,)),
        (16, 16, (1,)),
        (40, 16, (2,)),
        (64, 16, (4,)),
        (100, 16, (4, 6)),
        (256, 16, (4, 16)),
        (10**6, 16, (4, 16)),
    ],
)
def test_prefill_takes_no_more_tokens_than_the_limit(
    max_batch_tokens: int, tile: int, buckets: tuple[int, ...]
) -> None:
    shapes = choose(max_batch_tokens=max_batch_tokens)
    assert (shapes.prefill_tile, shapes.prefill_buckets) == (tile, buckets)
    assert shapes.prefill_budget <= max_batch_tokens


def test_weights_are_counted_where_they_live() -> None:
    config = make_config(is_fp8=True)
    specs = abstract_weights(config, BF16).values()
    whole = sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in specs)
    assert weight_bytes(config, BF16, 1) == whole
    replicated = sum(
        int(np.prod(spec.shape)) * spec.dtype.itemsize
        for spec in specs
        if not {"vocab", "heads", "kv_heads", "experts", "mlp"} & set(spec.axes)
    )
    assert weight_bytes(config, BF16, 8) == replicated + (whole - replicated) // 8
    assert weight_bytes(make_config(), F32, 1) > weight_bytes(make_config(), BF16, 1)


def test_glm_4_7_fp8_takes_its_published_size() -> None:
    # 330.53 GiB of weights; on each of eight devices an eighth of them and what is replicated.
    assert weight_bytes(glm_4_7(), BF16, 1) / GIB == pytest.approx(330.53, abs=0.01)
    assert weight_bytes(glm_4_7(), BF16, 8) / GIB == pytest.approx(41.5, abs=0.3)


def test_eight_gpus_hold_glm_4_7_and_a_million_positions() -> None:
    limits = {"max_concurrency": 1024, "max_seq_len": 202752, "max_batch_tokens": 8192}
    memory = int(MEMORY_SHARE * 139 * GIB)
    shapes = choose(gpu_mesh(8, memory), glm_4_7(), **limits)
    assert 1.6e6 < shapes.num_pages * shapes.page_size < 2e6
    per_device = shapes.num_pages * page_bytes(glm_4_7(), shapes.page_size, BF16) // 8
    assert per_device + weight_bytes(glm_4_7(), BF16, 8) < memory
    assert shapes.prefill_budget == 8192 and shapes.prefill_tile == 128
    assert shapes.prefill_buckets == (1, 4, 8, 16, 24, 32, 48, 64)
    assert shapes.decode_buckets[0] == 1 and shapes.decode_buckets[-1] == 1024


def test_gpus_too_small_for_the_weights_are_refused() -> None:
    limits = {"max_concurrency": 8, "max_seq_len": 1000, "max_batch_tokens": 8192}
    with pytest.raises(SizingError, match=r"needs 16 KV pages and 0 fit beside the weights"):
        choose(gpu_mesh(4, 80 * GIB), glm_4_7(), **limits)


def test_a_gpu_that_hides_its_memory_is_refused() -> None:
    with pytest.raises(SizingError, match="does not say how much memory"):
        choose(gpu_mesh(1, None))
