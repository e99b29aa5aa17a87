"""Company with a GPU's kernels: a request's answer has the bits it has alone, whatever its pages held before.

What differs there from a CPU: kernels are cut by the number of rows, XLA fuses the steps of each number of
rows in its own way, and CTAs that run at once could see each other's writes.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from checkpoints.dummy import dummy_weights
from glm_jax.cache import KVCache
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.model import abstract_weights
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import StepShapes
from glm_jax.sharding import MESH_AXIS
from tests.engine.attentive import run_to_end
from tests.glm_jax.test_kernels import LAYERS
from tests.glm_jax.tiny import BF16, make_config

pytestmark = pytest.mark.gpu

ROWS, VOCAB_SIZE, LONGEST = 40, 512, 700
# Nine layers of experts: two turns of the loop, and one before it.
CONFIG = make_config(is_fp8=True, **(LAYERS | {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 10}))
# Rows that need no padding, and rows that do.
SHAPES = StepShapes(
    num_slots=ROWS, num_pages=ROWS * 11, page_size=64, max_seq_len=LONGEST, prefill_tile=128,
    prefill_buckets=(1, 8), decode_buckets=(1, 12, ROWS), vocab_size=VOCAB_SIZE,
)  # fmt: skip
EDGES = (1, 63, 64, 65, 127, 128, 129, 255, 256, 511, 512, 513, 640)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20},
    {"temperature": 0.0, "num_logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
)

Answers = dict[str, list[tuple[int, float]]]


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, VOCAB_SIZE, 200)
    asked = []
    for number in range(ROWS):
        prompt = rng.integers(0, VOCAB_SIZE, EDGES[number % len(EDGES)])
        if number % 5 == 2:
            prompt = np.concatenate([shared, prompt])[:650]
        sampling = SamplingParams(
            max_new_tokens=4 + number % 30, seed=number, **KINDS[number % len(KINDS)]
        )
        asked.append(Request(id=str(number), prompt=tuple(prompt.tolist()), sampling=sampling))
    return asked


def answers(runner: Runner, asked: Iterable[Request]) -> Answers:
    engine, ids = Engine(runner, SHAPES, ROWS), []
    for request in asked:
        engine.submit(request)
        ids.append(request.id)
    told = run_to_end(engine)
    return {id: told.answers(id) for id in ids}


def fill_pages(runner: Runner, value: float) -> None:
    def filled(pages: jax.Array) -> jax.Array:
        fill = jax.jit(lambda: jnp.full(pages.shape, value, pages.dtype))
        return fill()

    runner._cache = KVCache(*map(filled, runner._cache))


@pytest.fixture(scope="module")
def runner() -> Runner:
    mesh = Mesh(np.array(jax.devices("gpu")[:1]), (MESH_AXIS,))
    weights = dummy_weights(abstract_weights(CONFIG, BF16), mesh, seed=1)
    return Runner(CONFIG, SHAPES, mesh, BF16, weights, compile_steps(CONFIG, SHAPES, mesh, BF16))


def test_answers_are_those_of_each_request_alone(runner: Runner) -> None:
    asked = requests()
    alone: Answers = {}
    for request in asked:
        alone |= answers(runner, [request])
    assert all(np.isfinite(logprob) for told in alone.values() for _, logprob in told)
    for company in (asked, asked[::-1], asked[:12], asked[20:25]):
        found = answers(runner, company)
        assert found == {id: alone[id] for id in found}
    for value in (float("nan"), float("inf")):
        fill_pages(runner, value)
        found = answers(runner, asked)
        assert found == alone, value
