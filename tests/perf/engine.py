"""What the engine costs the host, and how long decode waits for prefill: `pytest -m perf -s tests/perf/engine.py`.

Knows no GPU: the host's part is measured on a runner that takes no time, the wait on the bundled
model's shapes with random weights, on whatever device there is.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from checkpoints.dummy import dummy_weights
from glm_jax.config import ModelConfig
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams, TokenEvent
from glm_jax.model import abstract_weights
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import NUM_OUTPUTS, Phase, StepShapes
from glm_jax.sharding import make_mesh

pytestmark = pytest.mark.perf

NANO = Path(__file__).parents[2] / "checkpoints" / "nano"
NUM_STREAMS = 7


def show(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table("what", "measured", title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def request(id: str, num_prompt: int, num_new: int) -> Request:
    rng = np.random.default_rng(num_prompt)
    sampling = SamplingParams(max_new_tokens=num_new, temperature=0.7, seed=1)
    return Request(
        id=id, prompt=tuple(rng.integers(0, 2000, num_prompt).tolist()), sampling=sampling
    )


# --- The host -----------------------------------------------------------------------------------


@dataclass
class Instant:
    """A runner whose steps take no time; it notes when each was dispatched."""

    dispatched: list[tuple[Phase, float]] = field(default_factory=list)

    def control(self, controls: np.ndarray) -> None:
        del controls

    def dispatch(self, phase: Phase, batch: np.ndarray) -> np.ndarray:
        self.dispatched.append((phase, time.perf_counter()))
        return np.zeros((NUM_OUTPUTS, batch.shape[0]), np.int32)

    def score(self, batch: np.ndarray, targets: np.ndarray) -> np.ndarray:
        raise AssertionError("nobody asks for scores here")

    def prepare_scores(self) -> None:
        raise AssertionError("nobody asks for scores here")


@pytest.mark.parametrize("num_slots", [64, 256])
def test_a_turn_costs_the_host_less_than_a_millisecond(num_slots: int):
    shapes = StepShapes(
        num_slots=num_slots,
        num_pages=num_slots * 64,
        page_size=64,
        max_seq_len=4096,
        prefill_tile=128,
        prefill_buckets=(1, 4, 16, 64),
        decode_buckets=(num_slots,),
        vocab_size=151_552,
    )
    runner = Instant()
    engine = Engine(runner, shapes, max_queue=0, integrity_interval=100)
    for number in range(num_slots):
        engine.submit(request(str(number), 500 + number, 1000))
    engine.stop()
    engine.run_turns(lambda turn: None)
    turns = [
        after - before
        for (phase, before), (next_phase, after) in zip(
            runner.dispatched, runner.dispatched[1:], strict=False
        )
        if phase == next_phase == "decode"
    ]
    stats = engine.stats()
    per_check = stats.integrity_seconds / stats.num_integrity_checks
    show(
        f"Host time of a decode step, {num_slots} slots",
        [
            ("median", f"{1e6 * statistics.median(turns):.0f} us"),
            ("mean", f"{1e6 * statistics.mean(turns):.0f} us"),
            (f"one check of the account ({shapes.num_pages} pages)", f"{1e6 * per_check:.0f} us"),
        ],
    )
    assert statistics.median(turns) < 1e-3 * max(1, num_slots / 64)


# --- The wait -----------------------------------------------------------------------------------


@dataclass
class Timed:
    """A step's output that notes when it was there."""

    output: object
    phase: Phase
    dispatched: float
    journal: list["Timed"]
    ready: float = 0.0

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        values = np.asarray(self.output)
        self.ready = time.perf_counter()
        self.journal.append(self)
        return values


@dataclass
class Clocked:
    """A runner that notes when its steps were dispatched and when they were ready."""

    runner: Runner
    before_step: Callable[[int], None]
    journal: list[Timed] = field(default_factory=list)
    num_steps: int = 0

    def control(self, controls: np.ndarray) -> None:
        self.runner.control(controls)

    def dispatch(self, phase: Phase, batch: np.ndarray) -> Timed:
        self.before_step(self.num_steps)
        self.num_steps += 1
        output = self.runner.dispatch(phase, batch)
        return Timed(output, phase, time.perf_counter(), self.journal)

    def score(self, batch: np.ndarray, targets: np.ndarray) -> np.ndarray:
        raise AssertionError("nobody asks for scores here")

    def prepare_scores(self) -> None:
        raise AssertionError("nobody asks for scores here")

    def seconds(self, phase: Phase) -> list[float]:
        """What each step of a phase took: steps run one after the other."""
        pairs = zip(self.journal, self.journal[1:], strict=False)
        return [
            step.ready - max(step.dispatched, previous.ready)
            for previous, step in pairs
            if step.phase == phase
        ]


def make_runner(chunk: int) -> Runner:
    raw = json.loads((NANO / "config.json").read_text())
    config = ModelConfig.from_dict(raw)
    shapes = StepShapes(
        num_slots=8,
        num_pages=200,
        page_size=64,
        max_seq_len=3072,
        prefill_tile=16,
        prefill_buckets=(chunk // 16,),
        decode_buckets=(8,),
        vocab_size=config.vocab_size,
    )
    mesh, dtype = make_mesh(1), np.dtype(jnp.bfloat16)
    weights = dummy_weights(abstract_weights(config, dtype), mesh, seed=1)
    runner = Runner(
        config, shapes, mesh, dtype, weights, compile_steps(config, shapes, mesh, dtype)
    )
    runner.warm_up()
    return runner


def test_decode_waits_for_one_chunk_of_a_long_prompt_at_most():
    runner = make_runner(chunk=256)
    submitted_at: list[float] = []

    def submit_long(step: int) -> None:
        if step == 30:
            submitted_at.append(time.perf_counter())
            engine.submit(request("long", 2000, 2))

    clocked = Clocked(runner, submit_long)
    engine = Engine(clocked, runner.shapes, max_queue=10)
    times: dict[str, list[float]] = {}

    def deliver(events: list[TokenEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            times.setdefault(event.request_id, []).append(now)

    for number in range(NUM_STREAMS):
        engine.submit(request(str(number), 20 + number, 120))

    def finish(events: list[TokenEvent]) -> None:
        deliver(events)
        if submitted_at:
            engine.stop()

    engine.run(finish)
    prefilled = (submitted_at[0], times["long"][0])
    gaps = [
        after - before
        for id, stamps in times.items()
        if id != "long"
        for before, after in zip(stamps, stamps[1:], strict=False)
        if prefilled[0] <= after and before <= prefilled[1]
    ]
    # The first seven prompts took one step together.
    chunks = clocked.seconds("prefill")[-8:]
    decodes = clocked.seconds("decode")
    show(
        f"{NUM_STREAMS} streams while 2000 tokens are prefilled in chunks of 256",
        [
            ("chunks", f"{len(chunks)}, {1e3 * min(chunks):.1f} … {1e3 * max(chunks):.1f} ms"),
            ("decode step, median", f"{1e3 * statistics.median(decodes):.1f} ms"),
            ("longest gap between two tokens", f"{1e3 * max(gaps):.1f} ms"),
            ("of a chunk", f"{max(gaps) / max(chunks):.2f}"),
            ("time to the first token of the long prompt", f"{prefilled[1] - prefilled[0]:.2f} s"),
        ],
    )
    assert len(chunks) == 8
    assert max(gaps) < 1.5 * max(chunks)
