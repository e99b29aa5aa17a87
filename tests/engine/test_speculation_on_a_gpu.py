"""Guessing tokens with a GPU's kernels: how many come at once changes no bit of any answer there either.

Rows of one sequence read each other's keys within a step, which interpreted kernels and references, run
one after the other, cannot get wrong: many rows do it at once here, for many steps.
"""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from checkpoints.dummy import dummy_weights
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.mtp import weight_specs
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import StepShapes
from glm_jax.sharding import MESH_AXIS
from glm_jax.steps import StepOptions
from tests.engine.attentive import run_to_end
from tests.glm_jax.test_kernels import LAYERS
from tests.glm_jax.tiny import BF16, FP8, make_config

pytestmark = pytest.mark.gpu

ROWS, VOCAB_SIZE = 48, 256
# Ten layers of experts: two turns of the loop, and what stands before it.
CONFIG = make_config(is_fp8=True, **(LAYERS | {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 11}))


def shapes(num_drafts: int) -> StepShapes:
    return StepShapes(
        num_slots=ROWS, num_pages=ROWS * 4, page_size=64, max_seq_len=256, prefill_tile=64,
        prefill_buckets=(32,), decode_buckets=(ROWS,), num_drafts=num_drafts,
    )  # fmt: skip


def answers(mesh: Mesh, num_drafts: int) -> tuple[dict[str, list[tuple[int, float]]], list[int]]:
    """Of every request tokens and log-probabilities; and how many tokens came, by their place in a step."""
    how, wanted = StepOptions(kv_dtype=FP8), shapes(num_drafts)
    programs = compile_steps(CONFIG, wanted, mesh, BF16, how)
    weights = dummy_weights(weight_specs(CONFIG, BF16, with_mtp=num_drafts > 0), mesh, seed=1)
    runner = Runner(CONFIG, wanted, mesh, BF16, weights, programs, options=how)
    engine, rng = Engine(runner, wanted, 0), np.random.default_rng(0)
    for number in range(ROWS):
        prompt = tuple(rng.integers(0, VOCAB_SIZE, 40 + number).tolist())
        # At a high temperature the noise decides, which is the same for guess and token.
        temperature = (0.0, 1.0, 20.0)[number % 3]
        sampling = SamplingParams(max_new_tokens=64, temperature=temperature, seed=number)
        engine.submit(Request(id=str(number), prompt=prompt, sampling=sampling))
    told = run_to_end(engine)
    return {str(n): told.answers(str(n)) for n in range(ROWS)}, list(engine.stats().num_gained)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices("gpu")[:1]), (MESH_AXIS,))


@pytest.fixture(scope="module")
def expected(mesh: Mesh) -> dict[str, list[tuple[int, float]]]:
    return answers(mesh, 0)[0]


# Two tokens of a sequence are written where they are attended to, more before that.
@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_answers_are_those_without_guesses(
    mesh: Mesh, expected: dict[str, list[tuple[int, float]]], num_drafts: int
) -> None:
    found, gained = answers(mesh, num_drafts)
    assert found == expected
    assert all(kept > ROWS for kept in gained), gained
