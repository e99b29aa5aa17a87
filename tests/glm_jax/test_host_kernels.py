"""The operations in C against the references: the same numbers, and the same bits in any company."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import host_kernels, ops, references
from glm_jax.cache import KVCache
from glm_jax.kernels import Kernels
from glm_jax.native import library
from glm_jax.operands import Weight
from glm_jax.ops import HeadNorms, Rows
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh
from glm_jax.steps import StepOptions, lower
from tests.glm_jax.tiny import BF16, F32, FP8, bits, compiled, make_config, quantize, wide

KINDS = ["float32", "bfloat16", "float32 x fp8", "bfloat16 x fp8"]
COMPANIES = (1, 2, 3, 4, 5, 16)
ONE = 1  # the layer under test, of two


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    if not library.is_available():
        pytest.skip("no C compiler here")


def dtype_of(kind: str) -> np.dtype:
    return BF16 if kind.startswith("bfloat16") else F32


def weight(kind: str, *shape: int, seed: int = 0) -> tuple[jax.Array, jax.Array | None]:
    drawn = np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])
    if not kind.endswith("fp8"):
        return jnp.asarray(drawn.astype(dtype_of(kind))), None
    values, scale = quantize(drawn)
    return jnp.asarray(values), jnp.asarray(scale)


def tokens(kind: str, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype_of(kind))


def assert_close(actual: np.ndarray, expected: np.ndarray, units: float = 1.5) -> None:
    """Within some units in the last place of numbers as large as the largest."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    eps = 2**-21 if actual.dtype == F32 else float(jnp.finfo(actual.dtype).eps)
    largest = np.abs(wide(expected)).max()
    np.testing.assert_allclose(wide(actual), wide(expected), rtol=0, atol=units * eps * largest)


def assert_same_in_any_company(
    function: Callable[..., np.ndarray], rows: np.ndarray, axis: int = 0
) -> None:
    everything = bits(function(rows))
    for size in COMPANIES:
        for start in (0, 7):
            part = bits(function(rows[start : start + size]))
            np.testing.assert_array_equal(part, everything.take(range(start, start + size), axis))


# Widths of whole and broken vectors, outputs that four does not divide.
@pytest.mark.parametrize(("width", "outputs"), [(96, (4, 10)), (64, (7,)), (37, (33,))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_the_references(kind: str, width: int, outputs: tuple[int, ...]) -> None:
    values, scale = weight(kind, 2, *outputs, width)
    bias = jnp.asarray(tokens(kind, 2, *outputs, seed=3))

    def run(module: Any, x: np.ndarray) -> np.ndarray:
        def body(x: jax.Array) -> jax.Array:
            rows = ops.as_rows(x, is_fp8=scale is not None)
            return module.product(rows, values, scale, bias, jnp.int32(ONE))

        return compiled(body)(x)

    x = tokens(kind, 23, width)
    assert_close(run(host_kernels, x), run(ops, x))
    assert_same_in_any_company(lambda x: run(host_kernels, x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_products_are_the_references(kind: str) -> None:
    values, scale = weight(kind, 2, 9, 60)

    def run(module: Any, x: np.ndarray) -> np.ndarray:
        def body(x: jax.Array) -> jax.Array:
            rows = ops.as_rows(x, is_fp8=scale is not None, num_groups=3)
            return module.partial_products(rows, values, scale, jnp.int32(ONE), 20)

        return compiled(body)(x)

    x = tokens(kind, 23, 60)
    assert_close(run(host_kernels, x), run(ops, x))
    assert_same_in_any_company(lambda x: run(host_kernels, x), x, axis=1)


def test_the_heads_logits_are_the_references() -> None:
    table, _ = weight("bfloat16", 50, 48)
    x = tokens("bfloat16", 5, 48)
    run = [compiled(module.vocab_logits)(x, table) for module in (host_kernels, ops)]
    assert_close(*run)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_token_goes_where_the_reference_sends_it(kind: str, norms: bool) -> None:
    table, _ = weight(kind, 2, 10, 40)
    bias = jnp.asarray(np.random.default_rng(5).uniform(0, 0.2, (2, 10)).astype(np.float32))
    options = {
        "num_experts_per_tok": 3,
        "norm_topk_prob": norms,
        "routed_scaling_factor": 2.5,
    }

    def run(module: Any, x: np.ndarray) -> Any:
        return compiled(module.route, **options)(x, table, bias, ONE)

    x = tokens(kind, 23, 40)
    (chosen, weights, scores), expected = run(host_kernels, x), run(ops, x)
    np.testing.assert_array_equal(chosen, expected[0])
    assert_close(weights, expected[1], units=4)
    assert_close(scores, expected[2], units=4)
    for part in range(3):
        assert_same_in_any_company(lambda x, part=part: run(host_kernels, x)[part], x)


def test_equal_scores_go_to_the_first_experts() -> None:
    x, table = jnp.ones((1, 8), jnp.float32), jnp.zeros((1, 6, 8), jnp.float32)
    bias = jnp.asarray([[0, 0, 1, 0, 0, 0]], jnp.float32)
    chosen, _, _ = compiled(
        host_kernels.route, num_experts_per_tok=3, norm_topk_prob=True, routed_scaling_factor=1.0
    )(x, table, bias, 0)
    assert chosen.tolist() == [[2, 0, 1]]


def mlp_reference(
    rows: Rows, weights: tuple[Weight, Weight], layer: jax.Array, group_size: int
) -> jax.Array:
    return Kernels(native=False).gated_mlp(rows, weights, layer, group_size)


def experts_on(is_host: bool, kind: str, first: int) -> Callable[..., np.ndarray]:
    """x, chosen, weights -> partial sums of experts first … first + 3 and of the shared expert."""
    routed = weight(kind, 2, 4, 2, 24, 40), weight(kind, 2, 4, 40, 24, seed=1)
    shared = weight(kind, 2, 2, 36, 40, seed=2), weight(kind, 2, 40, 36, seed=3)

    def body(x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        rows = ops.as_rows(x, is_fp8=kind.endswith("fp8"))
        operands = (rows, chosen, weights, jnp.int32(first), routed)
        if is_host:
            return host_kernels.experts(*operands, shared, jnp.int32(ONE), group_size=2)
        partials = references.experts(*operands, jnp.int32(ONE), 2)
        return partials + mlp_reference(rows, shared, jnp.int32(ONE), 18)

    return compiled(body)


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_the_references(kind: str, first: int) -> None:
    rng = np.random.default_rng(2)
    x = tokens(kind, 23, 40)
    chosen = np.stack([rng.permutation(8)[:3] for _ in x]).astype(np.int32)
    weights = rng.uniform(0.1, 1, chosen.shape).astype(np.float32)
    host, expected = (experts_on(is_host, kind, first) for is_host in (True, False))
    # A hidden number at the edge of two FP8 values may fall to either side.
    units = 8.0
    if kind.endswith("fp8"):
        units = 2**21 / 50
    elif dtype_of(kind) == BF16:
        units = 2**21 / 100
    assert_close(host(x, chosen, weights), expected(x, chosen, weights), units=units)
    everything = bits(host(x, chosen, weights))
    for size in COMPANIES:
        part = bits(host(x[7 : 7 + size], chosen[7 : 7 + size], weights[7 : 7 + size]))
        np.testing.assert_array_equal(part, everything[:, 7 : 7 + size])


def test_an_overflow_stays_with_the_tokens_that_chose_it() -> None:
    x = tokens("float32", 4, 40)
    x[2] = np.inf
    chosen = np.array([[0], [1], [0], [1]], np.int32)
    out = experts_on(True, "float32", 0)(x, chosen, np.ones((4, 1), np.float32))
    assert np.isfinite(out[:, [0, 1, 3]]).all() and not np.isfinite(out[:, 2]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_mlp_is_the_references(kind: str) -> None:
    weights = weight(kind, 2, 2, 36, 40, seed=2), weight(kind, 2, 40, 36, seed=3)

    def run(mlp: Callable[..., jax.Array]) -> np.ndarray:
        def body(x: jax.Array) -> jax.Array:
            rows = ops.as_rows(x, is_fp8=kind.endswith("fp8"))
            return mlp(rows, weights, jnp.int32(ONE), 18)

        return compiled(body)(tokens(kind, 5, 40))

    exact = kind == "float32"
    assert_close(run(host_kernels.gated_mlp), run(mlp_reference), units=8 if exact else 2**21 / 50)


# --- Attention ----------------------------------------------------------------------------------


def sequences(dtype: np.dtype, kept: np.dtype, num_rows: int = 5, num_tokens: int = 3) -> Any:
    """qkv, positions, page table, and a cache of two layers with something in all of its pages."""
    rng = np.random.default_rng(4)
    kv_heads, groups, size, page_size = 2, 3, 24, 8
    shape = (2, 2 * num_rows * 4, kv_heads, page_size, size)
    pages = [rng.normal(size=shape).astype(np.float32).astype(kept) for _ in range(2)]
    table = rng.permutation(shape[1])[: num_rows * 4].reshape(num_rows, 4).astype(np.int32)
    start = rng.integers(0, 4 * page_size - num_tokens, num_rows)
    positions = (start[:, None] + np.arange(num_tokens)).astype(np.int32)
    positions[1, -1] = -1
    qkv = rng.normal(size=(num_rows, num_tokens, kv_heads, groups + 2, size)).astype(dtype)
    return qkv, positions, table, pages


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("kept", [F32, BF16, FP8])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_heads_and_pages_are_the_references(
    dtype: np.dtype, kept: np.dtype, has_norms: bool
) -> None:
    qkv, positions, table, pages = sequences(dtype, kept)
    drawn = np.random.default_rng(6).normal(size=(2, 2, 24)).astype(dtype)
    norm_weights = (jnp.asarray(drawn[0]), jnp.asarray(drawn[1])) if has_norms else (None, None)
    norms = HeadNorms(*norm_weights, 1e-5, 12, 1e4)

    def run(module: Any) -> Any:
        def body(qkv: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> Any:
            cache = KVCache(k_pages, v_pages)
            turns = module.rotary_table(positions, 12, 1e4)
            return module.write(qkv, norms, positions, table, jnp.int32(ONE), cache, turns)

        return compiled(body)(qkv, *pages)

    (q, cache), (expected_q, expected) = run(host_kernels), run(references)
    assert_close(q, expected_q, units=2)
    for ours, theirs, before in zip(cache, expected, pages, strict=True):
        assert_close(ours, theirs, units=2)
        np.testing.assert_array_equal(bits(ours[0]), bits(before[0]))  # the other layer
        is_same = bits(ours) == bits(before)
        np.testing.assert_array_equal(is_same.all(-1), (bits(theirs) == bits(before)).all(-1))


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("kept", [F32, BF16, FP8])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_attention_is_the_references(dtype: np.dtype, kept: np.dtype, num_tokens: int) -> None:
    qkv, positions, table, pages = sequences(dtype, kept, num_rows=23, num_tokens=num_tokens)
    q = qkv[..., :-2, :]

    def run(module: Any, rows: slice) -> np.ndarray:
        arrays = (q[rows], *pages, ONE, table[rows], positions[rows])
        return compiled(module.paged_attention)(*arrays)

    everything = run(host_kernels, slice(None))
    assert_close(everything, run(ops, slice(None)), units=2 if dtype == BF16 else 8)
    assert not everything[1, -1].any()
    for size in COMPANIES:
        rows = slice(7, 7 + size)
        np.testing.assert_array_equal(bits(run(host_kernels, rows)), bits(everything[rows]))


# --- The choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_a_step_runs_c_unless_it_is_told_not_to(native: bool) -> None:
    shapes = StepShapes(
        num_slots=2, num_pages=4, page_size=8, max_seq_len=16, prefill_tile=4,
        prefill_buckets=(1,), decode_buckets=(2,),
    )  # fmt: skip
    options = StepOptions(kernels=Kernels(native=native))
    text = lower(make_config(), shapes, make_mesh(1), BF16, "decode", 2, options).as_text()
    assert {name in text for name in library.OPERATIONS} == {native}


# --- The library --------------------------------------------------------------------------------


def test_a_machine_without_a_compiler_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(library.BuildError, match="no C compiler on PATH"):
        library.build(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not library._registers.__wrapped__()
    assert "plain operations" in caplog.text


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(library.BuildError, match="no such option"):
        library.build(tmp_path)
    assert list(tmp_path.iterdir()) == [compiler]


def test_where_nothing_can_be_kept_a_library_is_built_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Nobody may write there, whoever runs the tests.
    assert library.build(Path("/proc")).is_relative_to(tmp_path)


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = library.build(tmp_path)
    monkeypatch.setattr("subprocess.run", None)
    assert library.build(tmp_path) == built
