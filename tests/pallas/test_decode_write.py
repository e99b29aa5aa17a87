"""Decode attention that writes its rows' new keys and values first: the bits of the two kernels apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.fp8 import FP8
from glm_jax.pallas import decode_attention, kv_write
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.decode_attention import HEAD_DIM, TuningConfig
from tests.pallas import test_decode_attention as attention
from tests.pallas.compiled import Program, compile_programs, needs_compiler

CHIP = Chip("sm90", 132)
EPS, THETA = 1e-5, 1e6


def some_step(
    seed: int, rows: list[list[int]], kv_heads: int, groups: int, dtype: Any, rotary_dim: int = 64
) -> dict[str, Any]:
    """Arguments of write_and_attend; the places of new tokens, and all that none sees, hold NaN."""
    _, k, v, layer, table, where = attention.some_step(seed, rows, kv_heads, groups, 64, dtype)
    for row, positions in enumerate(rows):
        for position in filter(lambda x: x >= 0, positions):
            at = (slice(None), table[row, position // 64], slice(None), position % 64)
            k, v = (pages.at[at].set(jnp.nan) for pages in (k, v))
    rng = np.random.default_rng(seed)
    heads = (*where.shape, kv_heads, groups + 2, HEAD_DIM)
    qkv, q_norm, k_norm = (
        jnp.asarray(rng.normal(size=shape, loc=loc), jnp.float32).astype(jnp.bfloat16)
        for shape, loc in ((heads, 0.0), *[((attention.LAYERS, HEAD_DIM), 1.0)] * 2)
    )
    return {
        "qkv": qkv, "norms": (q_norm, k_norm), "k_pages": k, "v_pages": v, "layer": layer,
        "angles": kv_write.rotary_table(where, rotary_dim, THETA), "page_table": table,
        "positions": where,
    }  # fmt: skip


def together(step: dict[str, Any], **how: Any) -> tuple[Any, ...]:
    """What write_and_attend makes, and the pages that it leaves."""
    return decode_attention.write_and_attend(**step, eps=EPS, chip=CHIP, **how)


def apart(step: dict[str, Any], *, is_quantized: bool, interpret: bool, **how: Any) -> Any:
    """The same by a kernel that writes and one that attends."""
    q_norm, k_norm = step["norms"] or (None, None)
    where = step["positions"], step["page_table"]
    q, *pages = kv_write.write(
        step["qkv"], q_norm, k_norm, *where, step["layer"], step["k_pages"], step["v_pages"],
        eps=EPS, rotary_dim=2 * step["angles"].shape[-1], theta=THETA, chip=CHIP,
        table=step["angles"], interpret=interpret,
    )  # fmt: skip
    attend: Any = decode_attention.attend_quantized if is_quantized else decode_attention.attend
    made = attend(q, *pages, step["layer"], *where[::-1], chip=CHIP, interpret=interpret, **how)
    return made, *pages


def assert_same_bits(got: Any, wanted: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(got[0]), jax.tree.leaves(wanted[0]), strict=True):
        np.testing.assert_array_equal(bits(ours), bits(theirs))
    for ours, theirs in zip(got[1:], wanted[1:], strict=True):
        np.testing.assert_array_equal(bits(ours), bits(theirs))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize(
    ("positions", "kv_heads", "groups", "dtype", "rotary_dim", "has_norms"),
    [
        ([[0], [-1], [130], [63]], 1, 12, FP8, 64, True),
        ([[64], [127]], 2, 3, FP8, 128, False),
        ([[200]], 1, 12, jnp.bfloat16, 64, True),
        # Two tokens: in one tile, over the ends of a tile, a leaf and a split, and with padding.
        ([[0, 1], [63, 64], [127, 128], [-1, 130], [129, -1], [-1, -1]], 1, 12, FP8, 64, True),
        ([[62, 63], [191, 192]], 2, 3, jnp.bfloat16, 128, False),
    ],
)
def test_the_bits_are_those_of_the_two(
    positions, kv_heads, groups, dtype, rotary_dim, has_norms
) -> None:
    step = some_step(1, positions, kv_heads, groups, dtype, rotary_dim)
    if not has_norms:
        step["norms"] = ()
    is_quantized = dtype == FP8
    how = {"config": attention.SMALL, "interpret": True, "is_quantized": is_quantized}
    got = together(step, **how)
    assert np.isfinite(np.asarray(jax.tree.leaves(got[0])[0], np.float32)).all()
    assert_same_bits(got, apart(step, **how))


def test_more_tokens_of_a_row_are_refused() -> None:
    step = some_step(2, [[3, 4, 5]], 1, 2, FP8)
    with pytest.raises(NotImplementedError, match="num_tokens=3"):
        together(step, is_quantized=True, interpret=True)


def deployment_programs(chip: Chip) -> dict[str, Program]:
    """Decode steps of one device of eight."""

    def program(num_rows: int, num_tokens: int, dtype: Any) -> Program:
        pages = jax.ShapeDtypeStruct((92, 4096, 1, 64, HEAD_DIM), dtype)
        qkv = jax.ShapeDtypeStruct((num_rows, num_tokens, 1, 14, HEAD_DIM), jnp.bfloat16)
        norm = jax.ShapeDtypeStruct((92, HEAD_DIM), jnp.bfloat16)
        angles = jax.ShapeDtypeStruct((num_rows, num_tokens, 2, 32), jnp.bfloat16)
        shapes = ((), (num_rows, 128), (num_rows, num_tokens))
        integers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)

        def step(qkv, q_norm, k_norm, angles, k, v, *where):
            counters = decode_attention.make_counters(num_rows * num_tokens, 1)
            return decode_attention.write_and_attend(
                qkv, (q_norm, k_norm), angles, k, v, *where, eps=EPS, chip=chip,
                is_quantized=dtype == FP8, counters=counters,
            )  # fmt: skip

        return step, (qkv, norm, norm, angles, pages, pages, *integers)

    return {
        "float8": program(64, 1, FP8),
        "few rows": program(4, 1, FP8),
        "bfloat16": program(64, 1, jnp.bfloat16),
        "a guess": program(64, 2, FP8),
    }


@needs_compiler
@pytest.mark.parametrize("target", ["b200", "h200"])
def test_it_compiles_for_the_deployment_without_local_memory(target: str) -> None:
    for name, (kernel,) in compile_programs(target, deployment_programs).items():
        assert not kernel.uses_local_memory, f"{name}: {kernel}"
        if name == "bfloat16":
            continue
        # Two of them fit on a multiprocessor, as without the write.
        assert 2 * (kernel.shared + 1024) <= 228 * 1024, f"{name}: {kernel}"
        assert 2 * kernel.registers * kernel.threads <= 64 * 1024, f"{name}: {kernel}"


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_the_bits_are_those_of_the_two_on_a_gpu(num_tokens: int) -> None:
    ends = [-1, 0, 1, 63, 64, 127, 128, 129, 255, 256, 511, 512, 1023, 1024, 2047, 5000]
    positions = [[end, end + 1][:num_tokens] for end in ends]
    step = some_step(3, positions, 1, 12, FP8)

    def whole(step: Any) -> Any:
        counters = decode_attention.make_counters(len(positions) * num_tokens, 1)
        return together(step, is_quantized=True, counters=counters, config=TuningConfig())

    def parted(step: Any) -> Any:
        counters = decode_attention.make_counters(len(positions) * num_tokens, 1)
        how = {"counters": counters, "config": TuningConfig(), "interpret": False}
        return apart(step, is_quantized=True, **how)

    assert_same_bits(jax.jit(whole)(step), jax.jit(parted)(step))
