"""Prefill attention against its reference, with what no query may see filled with NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import ops
from glm_jax.fp8 import FP8
from glm_jax.pallas import linked, prefill_attention
from glm_jax.pallas.chip import Architecture, Chip
from glm_jax.pallas.prefill_attention import HEAD_DIM, TuningConfig
from tests.pallas.compiled import Program, Programs, compile_programs, needs_compiler
from tests.pallas.test_decode_attention import assert_as_close_as_rounding, some_step


def set_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who brings tiles: a warpgroup of its own or, where code is linked, those that multiply; and whether
    every tile of queries widens FP8 pages, or a kernel before."""
    monkeypatch.setattr(linked, "is_linked", lambda: form.endswith("linked"))
    if form.startswith("copies"):
        monkeypatch.setattr(prefill_attention, "_FEWEST_QUERIES", 1)


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
@pytest.mark.parametrize("form", ["widens", "widens linked", "copies linked"])
def test_few_ctas_go_through_all_prompts(
    num_cores: int, positions: list[list[int]], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_form(form, monkeypatch)
    step = some_step(4, positions, 1, 12, 64, FP8)
    config = TuningConfig(tile_size=64, stages=2, warpgroups=2)
    chip = Chip("sm90", num_cores)
    got = prefill_attention.attend(*step, chip=chip, config=config, interpret=True)
    assert_as_close_as_rounding(got, ops.paged_attention(*step))
    assert not np.asarray(got, np.float32)[np.asarray(positions) < 0].any()


@pytest.mark.parametrize("positions", [[[*range(60, 72)], [-1] * 12], [[*range(300, 311), -1]]])
def test_all_forms_give_the_same_bits(
    positions: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = some_step(5, positions, 1, 12, 32, FP8)
    config = TuningConfig(tile_size=64, stages=2, warpgroups=2)
    answers = []
    for form in ("widens", "copies", "widens linked", "copies linked"):
        with monkeypatch.context() as context:
            set_form(form, context)
            got = prefill_attention.attend(
                *step, chip=Chip("sm90", 132), config=config, interpret=True
            )
        answers.append(np.asarray(got, np.float32))
    for other in answers[1:]:
        np.testing.assert_array_equal(other, answers[0])


def test_plain_pages_are_copied_where_code_is_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    set_form("linked", monkeypatch)
    step = some_step(7, [[*range(120, 140)], [*range(19), -1]], 2, 12, 32, jnp.bfloat16)
    config = TuningConfig(tile_size=64, stages=2, warpgroups=2)
    got = prefill_attention.attend(*step, chip=Chip("sm90", 3), config=config, interpret=True)
    assert_as_close_as_rounding(got, ops.paged_attention(*step))


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
    """8192 tokens of one device of eight: many prompts' whose pages are widened in every tile, or one
    prompt's; and many prompts' plain pages."""

    def attend(*arguments):
        return prefill_attention.attend(*arguments, chip=chip)

    programs: dict[str, Program] = {}
    for rows, dtype in ((64, FP8), (1, FP8), (64, jnp.bfloat16)):
        pages = jax.ShapeDtypeStruct((92, 4096, 1, 64, HEAD_DIM), dtype)
        tokens = 8192 // rows
        q = jax.ShapeDtypeStruct((rows, tokens, 1, 12, HEAD_DIM), jnp.bfloat16)
        shapes = (), (rows, 128), (rows, tokens)
        integers = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
        programs[f"{rows} {jnp.dtype(dtype)}"] = attend, (q, pages, pages, *integers)
    return programs


def linked_programs(chip: Chip) -> dict[str, Program]:
    """The same as they are where code is linked."""
    linked.is_linked = lambda: True
    return deployment_programs(chip)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("programs", [deployment_programs, linked_programs])
@pytest.mark.parametrize(
    ("target", "instruction"), [("b200", "tcgen05.mma"), ("h200", "wgmma.mma_async")]
)
def test_it_compiles_for_the_deployment_without_local_memory(
    target: str, instruction: str, programs: Programs
) -> None:
    compiled = compile_programs(target, programs)
    names = [sorted(kernel.name for kernel in kernels) for kernels in compiled.values()]
    alone = ["prefill_attention"]
    assert names == [alone, [*alone, "widen_pages"], alone]
    for kernel in (kernel for kernels in compiled.values() for kernel in kernels):
        assert not kernel.uses_local_memory, str(kernel)
        assert instruction in kernel.ptx or kernel.name == "widen_pages"
        if programs is linked_programs:
            assert not kernel.loses_when_linked, str(kernel)
