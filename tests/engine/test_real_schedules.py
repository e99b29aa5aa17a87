"""Schedules on a real model: cache hits, preemptions and company change no bit of any answer."""

import functools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.dummy import dummy_weights
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.model import abstract_weights
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import make_mesh
from tests.engine.attentive import assert_clean, run_to_end
from tests.engine.schedules import Answers, Schedule, Visit, check_answers, draw_visits
from tests.glm_jax.tiny import make_config

VOCAB_SIZE = 256  # products keep the bits of a row from 16 outputs a device on
CONFIG = make_config(is_fp8=True, vocab_size=VOCAB_SIZE, num_hidden_layers=3)
SHAPES = StepShapes(
    num_slots=4,
    num_pages=10,
    page_size=8,
    max_seq_len=48,
    prefill_tile=8,
    prefill_buckets=(1, 3),
    decode_buckets=(1, 4),
    vocab_size=VOCAB_SIZE,
)
LEAN = replace(SHAPES, prefill_buckets=(3,), decode_buckets=(4,))


@functools.cache  # compiled once for all modules that ask for the same
def make_runner(num_devices: int, shapes: StepShapes) -> Runner:
    mesh, dtype = make_mesh(num_devices), np.dtype(jnp.bfloat16)
    weights = dummy_weights(abstract_weights(CONFIG, dtype), mesh, seed=1)
    return Runner(CONFIG, shapes, mesh, dtype, weights, compile_steps(CONFIG, shapes, mesh, dtype))


@pytest.fixture(scope="module")
def runner() -> Runner:
    return make_runner(1, SHAPES)


class Asking:
    """A runner that lets the schedule act before each step."""

    def __init__(self, runner: Runner, act: Callable[[int], None]) -> None:
        self._runner, self._act, self._step = runner, act, 0
        self.control = runner.control
        self.score, self.prepare_scores = runner.score, runner.prepare_scores

    def dispatch(self, phase: Phase, batch: np.ndarray):
        self._act(self._step)
        self._step += 1
        return self._runner.dispatch(phase, batch)


def lone(runner: Runner, asked: Request) -> Answers:
    """The answer of a request that has an engine to itself."""
    engine = Engine(runner, runner.shapes, 0)
    engine.submit(asked)
    return run_to_end(engine).answers(asked.id)


def play(runner: Runner, visits: list[Visit], oracle: Runner) -> Counter[str]:
    schedule = Schedule(
        visits, lambda act: Engine(Asking(runner, act), runner.shapes, max_queue=100)
    )
    check_answers(visits, schedule.play(), lambda asked: lone(oracle, asked))
    assert_clean(schedule.engine)
    stats = schedule.engine.stats()
    return Counter(
        preempted=stats.num_preemptions > 0,
        hit=stats.num_cached_tokens > 0,
        evicted=stats.num_evicted > 0,
    )


def crowded(seed: int) -> list[Visit]:
    """Few requests at once, so that they meet, and with sampling that a last bit would sway."""
    rng = random.Random(seed)
    visits = draw_visits(rng, SHAPES, VOCAB_SIZE)[:7]
    return [
        replace(visit, at_step=rng.randint(0, 15), request=_random(rng, visit.request))
        for visit in visits
    ]


def _random(rng: random.Random, asked: Request) -> Request:
    sampling = replace(
        asked.sampling,
        temperature=rng.choice([0.0, 1.0, 1.5]),
        top_k=0,
        min_p=0.0,
        stop_token_ids=frozenset(rng.sample(range(VOCAB_SIZE), 1)),
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
    )
    return replace(asked, sampling=sampling)


@pytest.mark.slow
def test_schedules_on_a_real_model_give_each_request_the_bits_of_a_lone_run(runner: Runner):
    seen = sum((play(runner, crowded(seed), runner) for seed in range(36)), Counter[str]())
    assert seen["preempted"] > 12 and seen["hit"] > 12 and seen["evicted"] > 12, seen


@pytest.mark.slow
def test_schedules_on_eight_devices_give_the_bits_of_a_lone_run_on_one(runner: Runner):
    eight = make_runner(8, LEAN)
    seen = sum((play(eight, crowded(seed), runner) for seed in range(100, 104)), Counter[str]())
    assert seen["preempted"] and seen["hit"], seen


def asked(id: str, prompt: list[int], max_new_tokens: int) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=1.0, seed=11)
    return Request(id=id, prompt=tuple(prompt), sampling=sampling)


def test_a_conversation_reuses_the_pages_that_decode_wrote_and_changes_no_bit(runner: Runner):
    prompt = np.random.default_rng(5).integers(0, VOCAB_SIZE, 11).tolist()
    first = asked("first", prompt, 15)
    answer = [token for token, _ in lone(runner, first)]
    second = asked("second", [*prompt, *answer, 1, 2, 3], 12)
    engine = Engine(runner, SHAPES, 10)
    seen: dict[str, Answers] = {"first": [], "second": []}
    num_cached: set[int] = set()

    def deliver(events):
        for event in events:
            seen[event.request_id].append((event.token, event.logprob))
            if event.request_id == "second":
                num_cached.add(event.num_cached_tokens)
            if event.finish_reason and event.request_id == "first":
                engine.submit(second)
                engine.stop()

    engine.submit(first)
    engine.run(deliver)
    # 25 of the first turn's 26 tokens are in the cache, in three full pages.
    assert num_cached == {24}
    assert seen["first"] == lone(runner, first)
    assert seen["second"] == lone(runner, second)
