"""Promises of several decode steps in one program, on a real model."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.runner import Runner
from glm_jax.shapes import NO_TOKEN, NUM_TOKENS, OUTPUT_TOKENS, Phase
from tests.engine.attentive import Events, assert_clean, run_to_end, small_shapes
from tests.engine.test_real_schedules import (
    LEAN,
    VOCAB_SIZE,
    crowded,
    lone,
    make_runner,
    play,
)

STEPS = 4


@pytest.fixture(scope="module")
def single() -> Runner:
    return make_runner(1, LEAN)


@pytest.fixture(scope="module")
def several() -> Runner:
    return make_runner(1, replace(LEAN, decode_steps=STEPS))


class Watched:
    """A runner that keeps every decode step's batch and output."""

    def __init__(self, runner: Runner) -> None:
        self.decodes: list[tuple[np.ndarray, np.ndarray]] = []
        self._runner, self.control = runner, runner.control
        self.score, self.prepare_scores = runner.score, runner.prepare_scores

    def dispatch(self, phase: Phase, batch: np.ndarray) -> np.ndarray:
        output = np.asarray(self._runner.dispatch(phase, batch))
        if phase == "decode":
            self.decodes.append((batch, output))
        return output


def asked(id: str, num_new: int, *stops: int, temperature: float = 1.0) -> Request:
    sampling = SamplingParams(
        max_new_tokens=num_new,
        temperature=temperature,
        seed=ord(id),
        num_logprobs=2,
        repetition_penalty=1.1,
        stop_token_ids=frozenset(stops),
    )
    rng = random.Random(id)
    return Request(
        id=id, prompt=tuple(rng.randrange(VOCAB_SIZE) for _ in range(9)), sampling=sampling
    )


def run(runner: Runner, *requests: Request) -> tuple[Events, Engine]:
    engine = Engine(runner, runner.shapes, len(requests))
    for request in requests:
        engine.submit(request)
    events = run_to_end(engine)
    assert_clean(engine)
    return events, engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_in_a_row_give_the_bits_of_single_steps(
    single: Runner, several: Runner, temperature: float
):
    requests = [asked(id, 3 + 5 * n, temperature=temperature) for n, id in enumerate("abc")]
    events, engine = run(several, *requests)
    alone, before = run(single, *requests)
    for request in requests:
        told = [event for event in events.order if event.request_id == request.id]
        assert told == [
            replaced
            for event in alone.order
            if event.request_id == request.id
            for replaced in [event._replace(began=told[0].began)]
        ]
    assert engine.stats().num_decode_steps < before.stats().num_decode_steps / 2


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(single: Runner, several: Runner):
    free = [token for token, _ in lone(single, asked("a", 12))]
    stop = free[6]
    events, _ = run(several, asked("a", 12, stop), asked("b", 20))
    assert events.tokens["a"] == free[: free.index(stop) + 1]
    assert events.reason("a") == "stop"
    assert events.answers("b") == lone(single, asked("b", 20))


def test_no_step_is_run_after_the_last_row_has_ended(single: Runner, several: Runner):
    first = [token for token, _ in lone(single, asked("a", 2))]
    watched = Watched(several)
    engine = Engine(watched, several.shapes, 0)
    engine.submit(asked("a", 12, first[1]))
    assert run_to_end(engine).tokens["a"] == first
    # The second token ends it: of four steps three were not run, and brought nothing. Of the step in
    # flight behind them, which began with that token, just one.
    (_, decoded), (_, surplus) = watched.decodes
    assert decoded[:, OUTPUT_TOKENS, 0].tolist() == [first[1], NO_TOKEN, NO_TOKEN, NO_TOKEN]
    assert (decoded[1:] == NO_TOKEN).all() and (surplus[1:] == NO_TOKEN).all()
    assert engine.stats().num_decode_padding == 2 * (LEAN.decode_buckets[-1] - 1)


def test_steps_are_single_while_a_request_waits(several: Runner):
    watched = Watched(several)
    engine = Engine(watched, several.shapes, 8)
    for id in "abcde":  # one more than there are slots
        engine.submit(asked(id, 10))
    run_to_end(engine)
    most = [int(batch[:, NUM_TOKENS].max()) for batch, _ in watched.decodes]
    assert most[:8] == [1] * 8 and max(most[8:]) == STEPS


@pytest.mark.slow
def test_schedules_with_steps_in_a_row_give_each_request_the_bits_of_a_lone_run(
    single: Runner, several: Runner
):
    seen = sum((play(several, crowded(seed), single) for seed in range(8)), Counter[str]())
    assert seen["preempted"] and seen["hit"], seen


def test_drafts_are_not_verified_several_times_in_a_row():
    with pytest.raises(ValueError, match="drafts"):
        replace(small_shapes(num_drafts=1), decode_steps=2)
