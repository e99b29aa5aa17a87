"""The choice of kernels: two whole layers with them and without, what is refused, what falls back."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from glm_jax.attention import Pages
from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.kernels import DEFAULT_KERNELS, Kernels
from glm_jax.model import abstract_model, abstract_weights, bind
from glm_jax.ops import HeadNorms, as_rows
from glm_jax.pallas.chip import Chip
from glm_jax.sharding import MESH_AXIS, make_mesh, sharding_for
from glm_jax.steps import compiler_options
from tests.glm_jax.tiny import BF16, FP8, make_arrays, make_config, on_mesh

# A dense layer and one of experts, as a device of the deployed mesh has them: one kv head, 128 wide.
LAYERS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
}
CONFIG = make_config(is_fp8=True, **LAYERS)
PAGE_SIZE, NUM_PAGES = 64, 6
# FP8 rounds by up to 6 %: where an intermediate lies between two values, both are right.
HIDDEN_ERROR, CACHE_ERROR = 0.04, 0.01

Layers = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]


def layers_on(mesh: Mesh, config: ModelConfig, kernels: Kernels) -> Layers:
    """(tokens, positions, table, k pages, v pages) -> the last hidden states and the pages after."""
    model, specs = abstract_model(config, BF16, kernels), abstract_weights(config, BF16)
    weights = {
        path: jax.device_put(array, sharding_for(specs[path].axes, mesh))
        for path, array in make_arrays(specs).items()
    }

    def run(weights: Any, tokens: Any, positions: Any, table: Any, *pages: Any) -> Any:
        hidden, cache, _ = bind(model, weights)(tokens, positions, KVCache(*pages), Pages(table))
        assert cache is not None
        return hidden, *cache

    replicated = PartitionSpec()
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False
    )
    jitted = jax.jit(sharded, compiler_options=compiler_options(mesh))
    replicate = jax.sharding.NamedSharding(mesh, replicated)

    def call(*arrays: np.ndarray) -> Any:
        placed = [jax.device_put(array, replicate) for array in arrays]
        return jax.tree.map(lambda x: np.asarray(x, np.float32), jitted(weights, *placed))

    return call


def step(
    kv_dtype: np.dtype, num_tokens: int = 1, config: ModelConfig = CONFIG
) -> tuple[np.ndarray, ...]:
    """Two sequences in the middle of a page and one that is not there, in pages full of others."""
    rng = np.random.default_rng(0)
    shape = (config.num_hidden_layers, NUM_PAGES, 1, PAGE_SIZE, 128)
    pages = [rng.normal(size=shape).astype(kv_dtype) for _ in range(2)]
    positions = np.array([[70], [5], [-1]]) + np.arange(num_tokens)
    positions[-1] = -1
    tokens = rng.integers(0, 128, positions.shape)
    table = np.array([[1, 2], [4, 0], [0, 0]])
    integers = (array.astype(np.int32) for array in (tokens, positions, table))
    return (*integers, *pages)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_like_the_reference(actual: Any, expected: Any) -> None:
    hidden, *pages = actual
    assert error(hidden[:-1], expected[0][:-1]) < HIDDEN_ERROR
    for ours, reference in zip(pages, expected[1:], strict=True):
        written = (reference != ours).any(axis=(0, 2, 4))
        # What no sequence of the step owns is as it was; what it wrote differs by rounding alone.
        assert {*map(tuple, np.argwhere(written))} <= {
            (2, 70 - PAGE_SIZE + i) for i in range(64)
        } | {(4, 5 + i) for i in range(59)}
        assert error(ours, reference) < CACHE_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
def test_layers_of_interpreted_kernels_are_those_of_the_reference(kv_dtype: np.dtype) -> None:
    mesh, arrays = make_mesh(1), step(kv_dtype)
    kernels = Kernels(interpreted=Chip("sm90" if kv_dtype == BF16 else "sm100", num_cores=4))
    expected = layers_on(mesh, CONFIG, DEFAULT_KERNELS)(*arrays)
    assert_like_the_reference(layers_on(mesh, CONFIG, kernels)(*arrays), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
def test_layers_on_a_gpu_are_those_of_the_reference_on_a_cpu(
    kv_dtype: np.dtype, num_tokens: int
) -> None:
    meshes = [
        Mesh(np.array(jax.devices(platform)[:1]), (MESH_AXIS,)) for platform in ("cpu", "gpu")
    ]
    arrays = step(kv_dtype, num_tokens)
    expected, actual = (layers_on(mesh, CONFIG, DEFAULT_KERNELS)(*arrays) for mesh in meshes)
    assert_like_the_reference(actual, expected)


@pytest.mark.gpu
def test_a_turn_of_the_loop_may_have_any_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of ten layers of experts two stand before the turns of four.
    config = make_config(is_fp8=True, **(LAYERS | {"num_hidden_layers": 11}))
    mesh = Mesh(np.array(jax.devices("gpu")[:1]), (MESH_AXIS,))
    arrays, found = step(FP8, config=config), []
    for at_a_time in (1, 2, 4):
        monkeypatch.setattr("glm_jax.model._AT_A_TIME", at_a_time)
        found.append(layers_on(mesh, config, DEFAULT_KERNELS)(*arrays))
    assert np.isfinite(found[0][0][:-1]).all() and found[0][0][:-1].any()
    for other in found[1:]:
        for ours, first in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(ours, first)


@pytest.mark.slow
def test_rows_of_one_sequence_attend_to_each_other_as_if_one_came_after_the_other() -> None:
    kernels, rng = Kernels(interpreted=Chip("sm90", num_cores=4)), np.random.default_rng(0)
    qkv: Any = rng.normal(size=(4, 1, 1, 6, 128)).astype(BF16)
    shape = (1, NUM_PAGES, 1, PAGE_SIZE, 128)
    pages = [rng.normal(size=shape).astype(FP8) for _ in range(2)]
    positions: Any = np.array([[63], [64], [5], [6]], np.int32)
    table: Any = np.array([[1, 2], [4, 0]], np.int32)
    norms = HeadNorms(None, None, 1e-5, 64, 1e6)

    def attend(pages: Any, rows: slice, rows_per_sequence: int) -> Any:
        where = positions[rows]
        rotary = kernels.rotary_table(where, 64, 1e6)
        made, cache = kernels.write_and_attend(
            qkv[rows], norms, where, table, 0, KVCache(*pages), rotary, is_fp8=True,
            rows_per_sequence=rows_per_sequence,
        )  # fmt: skip
        return made.values, made.scale, cache

    @jax.jit
    def together(*pages: Any) -> Any:
        return attend(pages, slice(0, 4), 2)

    @jax.jit
    def in_turn(*pages: Any) -> Any:
        first = attend(pages, slice(0, 4, 2), 1)
        second = attend(first[2], slice(1, 4, 2), 1)
        return list(zip(first[:2], second[:2], strict=True)), second[2]

    values, scale, cache = together(*pages)
    both, expected_cache = in_turn(*pages)
    for found, parts in zip((values, scale), both, strict=True):
        expected = np.stack([np.asarray(part) for part in parts], 1).reshape(found.shape)
        np.testing.assert_array_equal(np.asarray(found), expected)
    for found, expected in zip(cache, expected_cache, strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def product_on(kernels: Kernels, *, is_fp8: bool) -> Any:
    """qkv_proj with weights that are FP8 or not, on what would be a GPU."""
    config = make_config(is_fp8=is_fp8, **LAYERS)

    def body(model: Any, x: jax.Array) -> jax.Array:
        rows = as_rows(x, is_fp8=is_fp8)
        return kernels.product(rows, model.layers.self_attn.qkv_proj.weights(), None, 0)

    x = np.ones((2, config.hidden_size), BF16)
    return on_mesh(config, BF16, 1, body)(x)


GPU = Chip("sm90", num_cores=4)


def test_weights_that_are_not_fp8_are_refused_on_a_gpu_with_what_to_do() -> None:
    with pytest.raises(NotImplementedError, match=r"bfloat16.* quantize .*--allow-reference-ops"):
        product_on(Kernels(interpreted=GPU), is_fp8=False)


def test_the_reference_runs_where_it_is_allowed_to_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        actual = product_on(Kernels(interpreted=GPU, allow_reference=True), is_fp8=False)
    assert "no kernel" in caplog.text
    np.testing.assert_array_equal(actual, product_on(DEFAULT_KERNELS, is_fp8=False))


def test_several_kv_heads_on_a_gpu_are_refused() -> None:
    config = make_config(is_fp8=True, **(LAYERS | {"num_key_value_heads": 2}))

    def body(model: Any, x: jax.Array) -> jax.Array:
        rows = as_rows(x, is_fp8=True, num_groups=2)
        weight = model.layers.self_attn.o_proj.weights()
        return Kernels(interpreted=GPU).partial_products(rows, weight, 0, group_size=256)

    with pytest.raises(NotImplementedError, match="2 kv heads a device"):
        on_mesh(config, BF16, 1, body)(np.ones((3, 512), BF16))
