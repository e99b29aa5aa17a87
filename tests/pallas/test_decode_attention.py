"""Decode attention against its reference, with what no query may see filled with NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import ops
from glm_jax.fp8 import FP8, quantize_rows
from glm_jax.pallas import decode_attention
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.decode_attention import HEAD_DIM, TuningConfig
from tests.pallas.compiled import Program, compile_programs, needs_compiler

CHIP = Chip("sm90", 132)
LAYERS = 2
SMALL = TuningConfig(leaf_size=64, split_size=128, tile_size=64, stages=2)
# Tokens of a row two and two, however few there are.
PAIRED = replace(SMALL, alone_to=0)


def some_step(
    seed: int, positions: list[list[int]], kv_heads: int, groups: int, page_size: int, dtype
) -> tuple[jax.Array, ...]:
    """Arguments of attend; pages hold NaN wherever no sequence's positions are."""
    rng = np.random.default_rng(seed)
    num_rows, num_tokens = len(positions), len(positions[0])
    per_sequence = max(max(row) for row in positions) // page_size + 2
    num_pages = num_rows * per_sequence + 1
    table = rng.permutation(num_pages)[: num_rows * per_sequence].reshape(num_rows, -1)
    heads = (num_rows, num_tokens, kv_heads, groups, HEAD_DIM)
    is_owned = np.zeros((num_pages, page_size), bool)
    for pages, row in zip(table, positions, strict=True):
        for position in range(max(row) + 1):
            is_owned[pages[position // page_size], position % page_size] = True
    shape = (LAYERS, num_pages, kv_heads, page_size, HEAD_DIM)
    k, v = (
        jnp.asarray(
            np.where(is_owned[None, :, None, :, None], rng.normal(size=shape), np.nan), jnp.float32
        ).astype(dtype)
        for _ in range(2)
    )
    q = jnp.asarray(rng.normal(size=heads, scale=2.0), jnp.float32).astype(jnp.bfloat16)
    integers = (jnp.asarray(x, jnp.int32) for x in (seed % LAYERS, table, positions))
    return q, k, v, *integers


def assert_as_close_as_rounding(got: jax.Array, wanted: jax.Array) -> None:
    # The reference rounds shares to bfloat16 unnormalized; two bits of the largest answer.
    expected = np.asarray(wanted, np.float32)
    atol = 2**-7 * np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=2**-7, atol=atol)


@pytest.mark.parametrize(
    ("seed", "positions", "kv_heads", "groups", "page_size", "dtype"),
    [
        (0, [[0], [-1], [130]], 1, 12, 64, FP8),
        (1, [[127]], 2, 12, 32, jnp.bfloat16),
        (2, [[62, 63, 64, -1], [-1, -1, -1, 9], [8, 9, -1, -1]], 1, 3, 8, FP8),
        (3, [[128, 129]], 1, 12, 64, jnp.bfloat16),
        (4, [[61, 62, 63, 64]], 1, 12, 64, FP8),
        # Two warps' queries: two parts of the keys.
        (5, [[127, 128]], 1, 20, 64, FP8),
        # More splits than the combining kernel reads at a time.
        (7, [[1100]], 1, 12, 64, FP8),
    ],
)
def test_answers_are_the_references(seed, positions, kv_heads, groups, page_size, dtype) -> None:
    step = some_step(seed, positions, kv_heads, groups, page_size, dtype)
    got = decode_attention.attend(*step, chip=CHIP, config=SMALL, interpret=True)
    assert_as_close_as_rounding(got, ops.paged_attention(*step))
    assert not np.asarray(got, np.float32)[np.asarray(positions) < 0].any()


def test_an_answer_does_not_depend_on_the_rows_beside_it() -> None:
    q, k, v, layer, table, positions = some_step(4, [[70], [3]], 1, 12, 8, FP8)
    arguments = {"chip": CHIP, "config": SMALL, "interpret": True}
    both = decode_attention.attend(q, k, v, layer, table, positions, **arguments)
    alone = decode_attention.attend(q[1:], k, v, layer, table[1:], positions[1:], **arguments)
    np.testing.assert_array_equal(np.asarray(both)[1:], np.asarray(alone))


@pytest.mark.parametrize(
    "positions",
    [[[520], [70], [-1]], [[255, 256], [383, -1]], [[0], [63], [64]], [[200], [127], [128]]],
)
def test_an_answer_does_not_depend_on_what_a_cta_takes(positions) -> None:
    step = some_step(8, positions, 1, 12, 64, FP8)
    leaves, splits, pairs = (
        decode_attention.attend(
            *step,
            chip=CHIP,
            config=replace(SMALL, leaf_to=leaf_to, pair_from=pair_from),
            interpret=True,
        )
        for leaf_to, pair_from in ((1 << 20, 1), (0, 1 << 20), (0, 1))
    )
    np.testing.assert_array_equal(np.asarray(leaves), np.asarray(splits))
    np.testing.assert_array_equal(np.asarray(splits), np.asarray(pairs))
    assert_as_close_as_rounding(pairs, ops.paged_attention(*step))


def test_rows_of_one_step_may_be_cut_in_different_ways() -> None:
    step = some_step(9, [[300], [150], [10]], 1, 12, 64, FP8)
    # The first row's CTAs take two splits, the second's one, the third's a leaf; as one kernel for many rows.
    mixed, many = (
        decode_attention.attend(*step, chip=CHIP, config=config, interpret=True)
        for config in (
            replace(SMALL, leaf_to=6, pair_from=9),
            replace(SMALL, leaf_rows=0, pair_from=1 << 20),
        )
    )
    np.testing.assert_array_equal(np.asarray(mixed), np.asarray(many))


@pytest.mark.parametrize(
    ("positions", "kv_heads", "groups", "dtype", "config"),
    [
        # Within a tile; over the ends of a tile, a leaf and a split; a row of padding and one of both.
        ([[0, 1], [62, 63], [63, 64], [127, 128], [-1, -1], [200, -1]], 1, 12, FP8, PAIRED),
        ([[63, 64], [-1, 70]], 2, 3, jnp.bfloat16, PAIRED),
        # Tokens that one has left over, and as many as a split's end divides.
        ([[126, 127, 128], [5, -1, -1]], 1, 12, FP8, PAIRED),
        ([[254, 255, 256, 257]], 1, 20, FP8, PAIRED),
        # Leaves, splits and pairs of splits; a token at a time.
        ([[255, 256]], 1, 12, FP8, replace(PAIRED, leaf_to=0)),
        ([[383, 384]], 1, 12, FP8, replace(PAIRED, leaf_to=0, pair_from=1)),
        ([[126, 127, 128]], 1, 12, FP8, replace(SMALL, alone_to=3)),
    ],
)
def test_a_token_has_the_bits_of_a_row_of_its_own(
    positions, kv_heads, groups, dtype, config
) -> None:
    q, k, v, layer, table, where = some_step(10, positions, kv_heads, groups, 64, dtype)
    how = {"chip": CHIP, "config": config, "interpret": True}
    attend = decode_attention.attend_quantized if dtype == FP8 else decode_attention.attend
    got = attend(q, k, v, layer, table, where, **how)
    num_rows, num_tokens = where.shape
    of_rows = jnp.repeat(table, num_tokens, axis=0), where.reshape(-1, 1)
    alone = attend(q.reshape(num_rows * num_tokens, 1, *q.shape[2:]), k, v, layer, *of_rows, **how)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(in_bits(ours), in_bits(theirs).reshape(ours.shape))


def in_bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def test_the_quantized_form_is_that_of_quantize_rows() -> None:
    step = some_step(5, [[9], [-1]], 2, 3, 64, FP8)
    arguments = {"chip": CHIP, "config": SMALL, "interpret": True}
    attended = decode_attention.attend(*step, **arguments)
    values, scale = decode_attention.attend_quantized(*step, **arguments)
    wanted_values, wanted_scale = quantize_rows(attended.reshape(2, 2, 3 * HEAD_DIM))
    np.testing.assert_array_equal(np.asarray(scale), np.asarray(wanted_scale)[..., 0])
    np.testing.assert_array_equal(
        np.asarray(values).view(np.uint8), np.asarray(wanted_values).view(np.uint8)
    )


def test_other_shapes_are_refused() -> None:
    q, *rest = some_step(6, [[0]], 1, 2, 8, FP8)
    with pytest.raises(NotImplementedError, match="head_dim="):
        decode_attention.attend(q[..., :64], *rest, chip=CHIP)
    step = some_step(6, [[0]], 1, 2, 24, FP8)
    with pytest.raises(NotImplementedError, match="page_size="):
        decode_attention.attend(*step, chip=CHIP)
    step = some_step(6, [[0]], 1, 65, 64, FP8)
    with pytest.raises(NotImplementedError, match="query_groups=65: at most 64 queries"):
        decode_attention.attend(*step, chip=CHIP)


@pytest.mark.parametrize(
    "wrong", [{"tile_size": 32}, {"leaf_size": 96}, {"split_size": 96}, {"stages": 1}]
)
def test_a_config_that_cannot_be_is_the_callers_mistake(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TuningConfig(**wrong)


def deployment_programs(chip: Chip) -> dict[str, Program]:
    """Decode steps of one device of eight, of many rows and of few, without and with drafts to verify."""

    def program(num_rows: int, num_tokens: int, dtype) -> Program:
        pages = jax.ShapeDtypeStruct((92, 4096, 1, 64, HEAD_DIM), dtype)
        q = jax.ShapeDtypeStruct((num_rows, num_tokens, 1, 12, HEAD_DIM), jnp.bfloat16)
        shapes = ((), (num_rows, 128), (num_rows, num_tokens))
        integers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)

        def attend(*arguments):
            is_plain = dtype == jnp.bfloat16
            function = decode_attention.attend if is_plain else decode_attention.attend_quantized
            counters = decode_attention.make_counters(num_rows * num_tokens, 1)
            return function(*arguments, chip=chip, counters=counters)

        return attend, (q, pages, pages, *integers)

    return {
        "float8": program(64, 1, FP8),
        "few rows": program(4, 1, FP8),
        "bfloat16": program(64, 1, jnp.bfloat16),
        "a guess": program(64, 2, FP8),
        "a guess, bfloat16": program(64, 2, jnp.bfloat16),
        "guesses": program(64, 5, FP8),
    }


@needs_compiler
@pytest.mark.parametrize("target", ["b200", "h200"])
def test_it_compiles_for_the_deployment_without_local_memory(target: str) -> None:
    programs = {
        name: kernel for name, (kernel,) in compile_programs(target, deployment_programs).items()
    }
    for name, kernel in programs.items():
        assert not kernel.uses_local_memory, f"{name}: {kernel}"
        # Who arrives last finds its counter, and leaves it, at zero.
        assert kernel.ptx.count("atom.acq_rel.gpu.global.inc.u32") == 1, name
    for name in ("float8", "few rows", "a guess", "guesses"):
        kernel = programs[name]
        assert "mma.sync.aligned.m16n8k16.row.col.f32.f16" in kernel.ptx
        # Keys are read 16 bytes a lane and values transposed on their way, neither a byte at a time.
        assert kernel.ptx.count("ldmatrix.sync.aligned.m8n8.x4.trans") >= 8
        assert "ld.shared.b8" not in kernel.ptx and "ld.shared.u8" not in kernel.ptx
        # What others have just written is not read as if nobody could write it.
        assert "ld.global.nc" not in kernel.ptx
        # Two of them fit on a multiprocessor: one waits or ends while the other computes.
        assert 2 * (kernel.shared + 1024) <= 228 * 1024, f"{name}: {kernel}"
        assert 2 * kernel.registers * kernel.threads <= 64 * 1024, f"{name}: {kernel}"
