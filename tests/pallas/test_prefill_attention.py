"""Prefill attention against its reference, with what no query may see filled with NaN."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import ops
from glm_jax.fp8 import FP8
from glm_jax.pallas import prefill_attention
from glm_jax.pallas.chip import Architecture, Chip
from glm_jax.pallas.prefill_attention import HEAD_DIM, TuningConfig
from tests.pallas.compiled import Program, compile_programs, needs_compiler
from tests.pallas.test_decode_attention import assert_as_close_as_rounding, some_step


@pytest.mark.parametrize(
    ("architecture", "positions", "kv_heads", "groups", "page_size", "dtype", "warpgroups"),
    [
        # A chunk that starts late: its first rows see one whole tile of keys, its last a second.
        ("sm90", [[60, 61, 62, 63, 64, 65, 66, -1]], 1, 12, 64, jnp.bfloat16, 2),
        ("sm90", [[128, 129], [0, -1], [-1, -1]], 2, 3, 32, FP8, 1),
        ("sm100", [[63, 64, 65, -1]], 1, 12, 64, FP8, 1),
        ("sm100", [[0, 1, 2]], 2, 3, 8, jnp.bfloat16, 1),
        # Two warpgroups of 128 rows each, of which the second ends early; a third tile of keys.
        ("sm100", [[*range(120, 132), -1]], 1, 12, 64, FP8, 2),
        # Nothing to see, so nothing to fetch and nothing to wait for.
        ("sm100", [[-1, -1]], 1, 12, 64, FP8, 1),
        ("sm90", [[-1, -1]], 1, 12, 64, FP8, 1),
    ],
)
def test_answers_are_the_references(
    architecture: Architecture, positions, kv_heads, groups, page_size, dtype, warpgroups
) -> None:
    step = some_step(len(positions), positions, kv_heads, groups, page_size, dtype)
    config = TuningConfig(tile_size=64, stages=2, warpgroups=warpgroups)
    chip = Chip(architecture, 132)
    got = prefill_attention.attend(*step, chip=chip, config=config, interpret=True)
    assert_as_close_as_rounding(got, ops.paged_attention(*step))
    assert not np.asarray(got, np.float32)[np.asarray(positions) < 0].any()


@pytest.mark.parametrize(
    ("num_cores", "positions"),
    [
        # Five tiles of queries for two CTAs; up to three of keys, whose places are used again.
        (2, [[*range(100, 152), -1]]),
        # Of seven tiles only the first sees anything.
        (3, [[0, 1, 2, *[-1] * 70]]),
        # As many tiles as CTAs.
        (2, [[*range(300, 321)]]),
        # Prompts of different lengths.
        (2, [[*range(12)], [*range(200, 211), -1], [-1] * 12]),
    ],
)
def test_few_ctas_go_through_all_prompts(num_cores: int, positions: list[list[int]]) -> None:
    step = some_step(4, positions, 1, 12, 64, FP8)
    config = TuningConfig(tile_size=64, stages=2, warpgroups=2)
    chip = Chip("sm90", num_cores)
    got = prefill_attention.attend(*step, chip=chip, config=config, interpret=True)
    assert_as_close_as_rounding(got, ops.paged_attention(*step))
    assert not np.asarray(got, np.float32)[np.asarray(positions) < 0].any()


@pytest.mark.parametrize("positions", [[[*range(60, 72)], [-1] * 12], [[*range(300, 311), -1]]])
def test_pages_that_are_widened_before_give_the_same_bits(
    positions: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = some_step(5, positions, 1, 12, 32, FP8)
    config = TuningConfig(tile_size=64, stages=2, warpgroups=2)
    attend = partial(
        prefill_attention.attend, *step, chip=Chip("sm90", 132), config=config, interpret=True
    )
    widened_in_every_tile = attend()
    monkeypatch.setattr(prefill_attention, "_FEWEST_QUERIES", 1)
    np.testing.assert_array_equal(
        np.asarray(attend(), np.float32), np.asarray(widened_in_every_tile, np.float32)
    )


def test_a_rows_bits_are_its_own() -> None:
    """Whatever is beside it in its tile, in the batch, and on however many CTAs."""
    positions = [*range(120, 140)]
    q, k_pages, v_pages, layer, table, _ = some_step(2, [positions], 1, 12, 64, FP8)
    config = TuningConfig(tile_size=64, stages=2, warpgroups=2)

    def attend(rows: list[list[int]], num_cores: int = 2) -> np.ndarray:
        """The answers to the row with all positions, or the part of it that the first row has."""
        first = positions.index(max(rows[0][0], positions[0]))
        queries = jnp.repeat(q[:, first : first + len(rows[0])], len(rows), axis=0)
        step = queries, k_pages, v_pages, layer, jnp.repeat(table, len(rows), axis=0)
        got = prefill_attention.attend(
            *step, jnp.asarray(rows, jnp.int32), chip=Chip("sm90", num_cores), config=config,
            interpret=True,
        )  # fmt: skip
        return np.asarray(got[0], np.float32)

    alone = attend([positions])
    np.testing.assert_array_equal(attend([positions, [3] * len(positions)]), alone)
    np.testing.assert_array_equal(attend([positions[5:]]), alone[5:])


def test_other_shapes_are_refused() -> None:
    q, *rest = some_step(6, [[0]], 1, 2, 8, FP8)
    with pytest.raises(NotImplementedError, match="head_dim="):
        prefill_attention.attend(q[..., :64], *rest, chip=Chip("sm90", 132))
    step = some_step(6, [[0]], 1, 2, 24, FP8)
    with pytest.raises(NotImplementedError, match="page_size="):
        prefill_attention.attend(*step, chip=Chip("sm90", 132))


@pytest.mark.parametrize("wrong", [{"tile_size": 32}, {"stages": 1}, {"warpgroups": 3}])
def test_a_config_that_cannot_be_is_the_callers_mistake(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TuningConfig(**wrong)


def deployment_programs(chip: Chip) -> dict[str, Program]:
    """8192 tokens of one device of eight: many prompts' whose pages are widened in every tile, or one."""
    pages = jax.ShapeDtypeStruct((92, 4096, 1, 64, HEAD_DIM), FP8)

    def attend(*arguments):
        return prefill_attention.attend(*arguments, chip=chip)

    programs: dict[str, Program] = {}
    for rows in (64, 1):
        tokens = 8192 // rows
        q = jax.ShapeDtypeStruct((rows, tokens, 1, 12, HEAD_DIM), jnp.bfloat16)
        shapes = (), (rows, 128), (rows, tokens)
        integers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
        programs[f"{rows} prompts"] = attend, (q, pages, pages, *integers)
    return programs


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "instruction"), [("b200", "tcgen05.mma"), ("h200", "wgmma.mma_async")]
)
def test_it_compiles_for_the_deployment_without_local_memory(target: str, instruction: str) -> None:
    programs = compile_programs(target, deployment_programs)
    names = [sorted(kernel.name for kernel in kernels) for kernels in programs.values()]
    assert names == [["prefill_attention"], ["prefill_attention", "widen_pages"]]
    for kernel in (kernel for kernels in programs.values() for kernel in kernels):
        assert not kernel.uses_local_memory, str(kernel)
        assert instruction in kernel.ptx or kernel.name == "widen_pages"
