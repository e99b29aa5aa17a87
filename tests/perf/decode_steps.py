"""What several decode steps in one program save: `pytest -m perf -s tests/perf/decode_steps.py`.

Knows no server: engines on the bundled model's weights, alternately with steps in a row and without.
"""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from checkpoints.dummy import dummy_weights
from glm_jax.config import ModelConfig
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.model import abstract_weights
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh

pytestmark = pytest.mark.perf

NANO = Path(__file__).parents[2] / "checkpoints" / "nano"
CONCURRENCIES = (1, 4, 16)
NUM_NEW = 65  # one from prefill, then eight times eight
NUM_ROUNDS = 9


def make_runners(*decode_steps: int) -> list[Runner]:
    """Runners of the same weights that decode so many tokens in a row."""
    config = ModelConfig.from_dict(json.loads((NANO / "config.json").read_text()))
    shapes = StepShapes(
        num_slots=16,
        num_pages=40,
        page_size=64,
        max_seq_len=128,
        prefill_tile=16,
        prefill_buckets=(16,),
        decode_buckets=CONCURRENCIES,
    )
    mesh, dtype = make_mesh(1), np.dtype(jnp.bfloat16)
    weights = dummy_weights(abstract_weights(config, dtype), mesh, seed=1)
    runners = []
    for number in decode_steps:
        several = replace(shapes, decode_steps=number)
        programs = compile_steps(config, several, mesh, dtype)
        runners.append(Runner(config, several, mesh, dtype, weights, programs))
        runners[-1].warm_up()
    return runners


def seconds(runner: Runner, concurrency: int) -> float:
    """From the first tokens to the last ones of so many requests at a time."""
    engine = Engine(runner, runner.shapes, 0)
    for number in range(concurrency):
        sampling = SamplingParams(max_new_tokens=NUM_NEW, temperature=0.7, seed=number)
        prompt = tuple(range(number, number + 10))
        engine.submit(Request(id=str(number), prompt=prompt, sampling=sampling))
    engine.stop()
    times: list[float] = []
    engine.run(lambda events: times.append(time.perf_counter()))
    return times[-1] - times[0]


def test_steps_in_a_row_against_single_ones():
    numbers = (1, 4, 8)
    runners = make_runners(*numbers)
    table = Table("requests", "decode steps", "tokens/s", "of single steps", title="Steps in a row")
    for concurrency in CONCURRENCIES:
        rounds = [[seconds(runner, concurrency) for runner in runners] for _ in range(NUM_ROUNDS)]
        for index, number in enumerate(numbers):
            ratio = statistics.median(round[0] / round[index] for round in rounds)
            fastest = min(round[index] for round in rounds)
            rate = concurrency * (NUM_NEW - 1) / fastest
            table.add_row(str(concurrency), str(number), f"{rate:.0f}", f"{ratio:.2f}")
            assert ratio > 0.5
    Console().print(table)
