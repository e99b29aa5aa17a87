"""The KV write against its reference: queries, keys and values to the bit, and nothing else touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from glm_jax import cache as kv_cache
from glm_jax.cache import KVCache
from glm_jax.fp8 import FP8
from glm_jax.pallas import kv_write
from glm_jax.pallas.chip import Chip
from tests.pallas.compiled import Program, compile_programs, needs_compiler

EPS, THETA, LAYERS, PAGE_SIZE = 1e-5, 1e6, 2, 4
CHIP = Chip("sm90", 132)


def normed(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    return wide.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def rotated(x: jax.Array, positions: jax.Array, rotary_dim: int) -> jax.Array:
    half = rotary_dim // 2
    frequencies = THETA ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape(1, 1, half)
    angles = angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second, rest = jnp.split(x, [half, rotary_dim], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def some_step(seed: int, positions: list[list[int]], kv_heads: int, groups: int, dtype) -> dict:
    rng = np.random.default_rng(seed)
    num_rows, num_pages = len(positions), 7

    def normal(*shape: int, deviation: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape, scale=deviation), jnp.float32)

    pages = (LAYERS, num_pages, kv_heads, PAGE_SIZE, kv_write.HEAD_DIM)
    heads = (num_rows, len(positions[0]), kv_heads, groups + 2, kv_write.HEAD_DIM)
    return {
        "qkv": normal(*heads, deviation=300.0).astype(jnp.bfloat16),
        "q_norm": normal(LAYERS, kv_write.HEAD_DIM).astype(jnp.bfloat16),
        "k_norm": normal(LAYERS, kv_write.HEAD_DIM).astype(jnp.bfloat16),
        "positions": jnp.asarray(positions, jnp.int32),
        "page_table": jnp.asarray(rng.permutation(num_pages)[: 2 * num_rows], jnp.int32).reshape(
            -1, 2
        ),
        "layer": jnp.int32(seed % LAYERS),
        "k_pages": normal(*pages).astype(dtype),
        "v_pages": normal(*pages).astype(dtype),
    }


def reference(step: dict, rotary_dim: int) -> tuple[jax.Array, KVCache]:
    qkv, positions, layer = step["qkv"], step["positions"], step["layer"]
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    if step["q_norm"] is not None:
        q, k = normed(q, step["q_norm"][layer]), normed(k, step["k_norm"][layer])
    q, k = rotated(q, positions, rotary_dim), rotated(k, positions, rotary_dim)
    if step["k_pages"].dtype == FP8:
        k, v = (jnp.clip(x.astype(jnp.float32), -448, 448) for x in (k, v))
    cache = KVCache(step["k_pages"], step["v_pages"])
    return q, kv_cache.write(cache, layer, step["page_table"], positions, k, v)


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize(
    ("seed", "positions", "kv_heads", "groups", "dtype", "rotary_dim", "has_norms"),
    [
        (0, [[0], [7], [-1]], 1, 12, jnp.bfloat16, 64, True),
        (1, [[3, 4, -1], [0, 1, 2]], 2, 12, FP8, 64, True),
        (2, [[5]], 2, 1, FP8, 128, True),
        (3, [[6, 7]], 1, 2, jnp.bfloat16, 64, False),
    ],
)
def test_a_step_is_written_as_the_reference_writes_it(
    seed, positions, kv_heads, groups, dtype, rotary_dim, has_norms
) -> None:
    step = some_step(seed, positions, kv_heads, groups, dtype)
    if not has_norms:
        step |= {"q_norm": None, "k_norm": None}
    q, k_pages, v_pages = kv_write.write(
        **step, eps=EPS, rotary_dim=rotary_dim, theta=THETA, chip=CHIP, interpret=True
    )
    expected_q, expected = reference(step, rotary_dim)
    # A reciprocal root may differ in its last bit, and so a rounding, one in some thousands.
    is_valid = np.asarray(positions) >= 0
    wanted, got = (np.asarray(x, np.float32)[is_valid] for x in (expected_q, q))
    np.testing.assert_allclose(got, wanted, rtol=2**-7)
    assert np.mean(got != wanted) < 1e-3
    np.testing.assert_array_equal(bits(v_pages), bits(expected.v))
    assert np.mean(bits(k_pages) != bits(expected.k)) < 1e-3
    before, written = bits(step["k_pages"]), bits(expected.k) != bits(step["k_pages"])
    np.testing.assert_array_equal(bits(k_pages)[~written], before[~written])


def test_refs_are_written_in_place() -> None:
    step = some_step(4, [[2], [5]], 1, 2, FP8)
    k_ref, v_ref = jax.new_ref(step["k_pages"]), jax.new_ref(step["v_pages"])
    _, expected = reference(step, 64)
    step |= {"k_pages": k_ref, "v_pages": v_ref}
    _, *pages = kv_write.write(
        **step, eps=EPS, rotary_dim=64, theta=THETA, chip=CHIP, interpret=True
    )
    assert pages[0] is k_ref and pages[1] is v_ref
    np.testing.assert_array_equal(bits(v_ref[...]), bits(expected.v))


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 32)])
def test_other_widths_are_refused(head_dim: int, rotary_dim: int) -> None:
    step = some_step(5, [[0]], 1, 2, FP8)
    step["qkv"] = step["qkv"][..., :head_dim]
    with pytest.raises(NotImplementedError, match="head_dim="):
        kv_write.write(**step, eps=EPS, rotary_dim=rotary_dim, theta=THETA, chip=CHIP)


def deployment_programs(chip: Chip) -> dict[str, Program]:
    """A decode step as one device of eight runs it."""

    def program(num_rows: int, num_tokens: int, dtype) -> Program:
        pages = jax.ShapeDtypeStruct((92, 4096, 1, 64, 128), dtype)
        norm = jax.ShapeDtypeStruct((92, 128), jnp.bfloat16)
        integers = (
            jax.ShapeDtypeStruct(shape, jnp.int32)
            for shape in ((num_rows, num_tokens), (num_rows, 128), ())
        )

        def write(*arguments):
            return kv_write.write(*arguments, eps=EPS, rotary_dim=64, theta=THETA, chip=chip)

        qkv = jax.ShapeDtypeStruct((num_rows, num_tokens, 1, 14, 128), jnp.bfloat16)
        return write, (qkv, norm, norm, *integers, pages, pages)

    return {
        "float8": program(64, 1, FP8),
        "bfloat16": program(64, 1, jnp.bfloat16),
    }


@needs_compiler
@pytest.mark.parametrize("target", ["b200", "h200"])
def test_it_compiles_for_the_deployment_without_local_memory(target: str) -> None:
    for name, kernels in compile_programs(target, deployment_programs).items():
        (kernel,) = kernels
        assert not kernel.uses_local_memory, f"{name}: {kernel}"
        assert kernel.registers <= 128, f"{name}: {kernel}"
        # Each product and sum is rounded by itself, as the reference's are.
        assert "fma.rn.bf16" not in kernel.ptx, name
