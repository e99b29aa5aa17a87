"""Guessing tokens on a real model: how many come at once changes no bit of any answer.

Weights are random, so most guesses are wrong and some are right: both paths are taken.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints.dummy import dummy_weights
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Constraint, Request, SamplingParams, TokenEvent
from glm_jax.forward import forward_function
from glm_jax.mtp import weight_specs
from glm_jax.runner import Runner, compile_steps
from glm_jax.sharding import make_mesh
from tests.engine.attentive import assert_clean, run_to_end
from tests.engine.test_real_schedules import CONFIG, LEAN, VOCAB_SIZE, crowded, play

NUM_DRAFTS = 2
NUM_BINS = 20


def make_runner(num_devices: int, num_drafts: int) -> Runner:
    mesh, dtype = make_mesh(num_devices), np.dtype(jnp.bfloat16)
    shapes = replace(LEAN, num_drafts=num_drafts)
    weights = dummy_weights(weight_specs(CONFIG, dtype, with_mtp=num_drafts > 0), mesh, seed=1)
    return Runner(CONFIG, shapes, mesh, dtype, weights, compile_steps(CONFIG, shapes, mesh, dtype))


@pytest.fixture(scope="module")
def plain() -> Runner:
    return make_runner(1, 0)


@pytest.fixture(scope="module")
def guessing() -> Runner:
    return make_runner(1, NUM_DRAFTS)


def asked(id: str, constraint: Constraint | None = None, **sampling: Any) -> Request:
    prompt = np.random.default_rng(7).integers(0, VOCAB_SIZE, 13).tolist()
    wanted = SamplingParams(max_new_tokens=30, **sampling)
    return Request(id=id, prompt=tuple(prompt), sampling=wanted, constraint=constraint)


def told(runner: Runner, *requests: Request) -> tuple[list[TokenEvent], Engine]:
    """Every event of the requests, those of each in order, with what only a clock decides left out."""
    engine = Engine(runner, runner.shapes, 20)
    for request in requests:
        engine.submit(request)
    events = run_to_end(engine).order
    assert_clean(engine)
    ordered = sorted(events, key=lambda event: event.request_id)
    return [event._replace(began=None, num_cached_tokens=0) for event in ordered], engine


class Alternating:
    """Lets even tokens stand in even places, odd ones in odd places."""

    def __init__(self) -> None:
        self.place = 0

    def binds(self, index: int) -> bool:
        return True

    def accept(self, token: int) -> None:
        assert token % 2 == self.place % 2
        self.place += 1

    def mask(self) -> NDArray[np.int32]:
        allowed = np.arange(VOCAB_SIZE) % 2 == self.place % 2
        return np.packbits(allowed, bitorder="little").view(np.int32)


def every_way() -> list[Request]:
    """One request for each thing that can change which token is chosen, or what is told of it."""
    return [
        asked("greedy"),
        asked("drawn", temperature=1.0, seed=3),
        asked("hot", temperature=2.0, seed=4, top_p=0.9, min_p=0.001),
        asked("few", temperature=1.0, seed=5, top_k=4),
        asked("told", temperature=1.0, seed=6, num_logprobs=5),
        asked("not again", frequency_penalty=0.5, presence_penalty=0.5),
        asked("repeated", temperature=0.7, seed=7, repetition_penalty=1.4),
        asked("biased", temperature=1.0, seed=8, logit_bias=((3, 4.0), (9, -5.0))),
        asked("long", stop_token_ids=frozenset(range(0, VOCAB_SIZE, 2)), min_tokens=9),
        asked("stopped", temperature=1.0, seed=9, stop_token_ids=frozenset(range(40))),
        asked("masked", Alternating(), temperature=1.0, seed=10),
    ]


def test_answers_are_those_without_guesses_in_every_way_of_sampling(
    plain: Runner, guessing: Runner
) -> None:
    expected, _ = told(plain, *every_way())
    found, engine = told(guessing, *every_way())
    assert found == expected
    stats = engine.stats()
    # Some guesses of either place were right, and some wrong, or this shows nothing.
    pairs = list(zip(stats.num_offered, stats.num_gained, strict=True))
    assert all(0 < kept < made for made, kept in pairs[1:]), pairs


def test_schedules_with_guesses_give_the_bits_of_a_lone_run_without(
    plain: Runner, guessing: Runner
) -> None:
    seen = sum((play(guessing, crowded(seed), plain) for seed in range(4)), Counter[str]())
    assert seen["preempted"] and seen["hit"], seen


@pytest.mark.slow
def test_many_schedules_with_guesses_give_the_bits_of_a_lone_run_without(
    plain: Runner, guessing: Runner
) -> None:
    seen = sum((play(guessing, crowded(seed), plain) for seed in range(4, 36)), Counter[str]())
    assert seen["preempted"] > 12 and seen["hit"] > 12 and seen["evicted"] > 12, seen


@pytest.mark.slow
def test_guesses_on_eight_devices_are_those_on_one(guessing: Runner) -> None:
    eight = make_runner(8, NUM_DRAFTS)
    expected, one = told(guessing, *every_way())
    found, other = told(eight, *every_way())
    assert found == expected
    assert one.stats().num_gained == other.stats().num_gained


def test_drawn_tokens_have_the_distribution_of_the_model(guessing: Runner) -> None:
    number, temperature = 200, 0.7
    prompt = asked("any").prompt
    engine = Engine(guessing, guessing.shapes, number)
    for seed in range(number):
        sampling = SamplingParams(max_new_tokens=8, temperature=temperature, seed=seed)
        engine.submit(Request(id=str(seed), prompt=prompt, sampling=sampling))
    answers = run_to_end(engine).tokens
    assert engine.stats().num_gained[1] > number  # guesses that were right are among the tokens
    tokens = np.array([answers[str(seed)] for seed in range(number)])
    shares = exact_shares(prompt, tokens, temperature)
    mean, deviation = NUM_BINS - 1, math.sqrt(2 * (NUM_BINS - 1))
    assert chi_square(tokens, shares) < mean + 4 * deviation
    # Guesses that are taken unverified have another distribution, and this sees it.
    others = np.random.default_rng(1).integers(0, VOCAB_SIZE, tokens.shape)
    assert chi_square(others, shares) > mean + 100 * deviation


def exact_shares(
    prompt: tuple[int, ...], tokens: NDArray[np.int_], temperature: float
) -> NDArray[np.floating]:
    """The model's distribution in the place of each token, [..., V], from a pass without a cache."""
    starts = np.tile(np.array(prompt), (len(tokens), 1))
    sequences = np.concatenate([starts, tokens], axis=1).astype(np.int32)
    mesh, dtype = make_mesh(1), np.dtype(jnp.bfloat16)
    weights = dummy_weights(weight_specs(CONFIG, dtype, with_mtp=False), mesh, seed=1)
    logits = np.asarray(forward_function(CONFIG, mesh, dtype)(weights, sequences).logits)
    scaled = logits[:, len(prompt) - 1 : -1] / temperature
    weighed = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weighed / weighed.sum(-1, keepdims=True)


def chi_square(tokens: NDArray[np.int_], shares: NDArray[np.floating]) -> float:
    """How far the tokens' places in their distributions, the likeliest first, are from uniform."""
    order = np.argsort(-shares, axis=-1)
    ordered = np.take_along_axis(shares, order, axis=-1)
    place = (order == tokens[..., None]).argmax(-1)[..., None]
    own = np.take_along_axis(ordered, place, axis=-1)[..., 0]
    up_to = np.take_along_axis(ordered.cumsum(-1), place, axis=-1)[..., 0]
    uniform = up_to - own * np.random.default_rng(0).random(tokens.shape)
    counts, _ = np.histogram(uniform, NUM_BINS, (0, 1))
    expected = tokens.size / NUM_BINS
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_model_without_the_layer_cannot_guess() -> None:
    none = replace(CONFIG, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="no MTP layer"):
        weight_specs(none, np.dtype(jnp.bfloat16), with_mtp=True)
