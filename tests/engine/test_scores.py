"""How likely a prompt's tokens were: the same as if the model had made them one by one."""

from dataclasses import replace

import numpy as np
import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.engine.request import Request, SamplingParams, TokenEvent
from glm_jax.runner import Runner
from glm_jax.shapes import StepShapes
from tests.engine.attentive import assert_clean
from tests.engine.test_real_schedules import LEAN, VOCAB_SIZE, make_runner

PROMPT = tuple(int(token) for token in np.random.default_rng(3).integers(0, VOCAB_SIZE, 21))


@pytest.fixture(scope="module")
def runner() -> Runner:
    return make_runner(2, LEAN)


def asked(
    runner: Runner | MockRunner, shapes: StepShapes, *requests: Request
) -> dict[str, list[TokenEvent]]:
    """The events of each request, all asked together."""
    engine = Engine(runner, shapes, 8)
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    engine.stop()

    def deliver(told: list[TokenEvent]) -> None:
        for event in told:
            events[event.request_id].append(event)

    engine.run(deliver)
    assert_clean(engine)
    return events


def wanting(prompt: tuple[int, ...], number: int | None, *, id: str = "a", **fields) -> Request:
    sampling = SamplingParams(
        max_new_tokens=fields.pop("max_new_tokens", 1),
        temperature=0.0,
        num_logprobs=5,
        num_prompt_logprobs=number,
    )
    return Request(id=id, prompt=prompt, sampling=sampling, **fields)


def test_a_prompt_is_as_likely_as_the_answer_that_it_was(runner):
    made = asked(runner, LEAN, wanting(PROMPT, None, max_new_tokens=12))["a"]
    answer = tuple(event.token for event in made if event.token is not None)
    # Two chunks of a prompt each; each could share most of the other's pages, and neither may.
    whole = PROMPT + answer
    told = asked(runner, LEAN, wanting(whole, 5), wanting(whole[:-1], 0, id="b"))
    first = told["a"][0]
    assert first.num_cached_tokens == 0
    assert [each.token for each in first.prompt_logprobs] == list(whole[1:])
    for event, each in zip(made, first.prompt_logprobs[len(PROMPT) - 1 :], strict=True):
        assert each.token == event.token
        assert each.rank == 1
        assert each.logprob == pytest.approx(event.logprob, abs=1e-6)
        assert [token for token, _ in each.top] == [token for token, _ in event.top_logprobs]
        np.testing.assert_allclose(
            [logprob for _, logprob in each.top],
            [logprob for _, logprob in event.top_logprobs],
            atol=1e-6,
        )
    alike = told["b"][0].prompt_logprobs
    assert [replace(each, top=()) for each in first.prompt_logprobs[:-1]] == list(alike)


def test_ranks_count_the_likelier_tokens(runner):
    told = asked(runner, LEAN, wanting(PROMPT, 20))["a"][0].prompt_logprobs
    ranks = [each.rank for each in told]
    assert max(ranks) > 20
    for each in told:
        assert 1 <= each.rank <= VOCAB_SIZE
        places = [token for token, _ in each.top]
        assert (each.token in places) == (each.rank <= 20)
        if each.token in places:
            assert places.index(each.token) == each.rank - 1
            assert each.logprob == pytest.approx(each.top[each.rank - 1][1], abs=1e-6)


def test_who_asks_changes_nothing_for_others(runner):
    other = wanting(PROMPT[:9], None, id="b", max_new_tokens=8)
    alone = asked(runner, LEAN, other)["b"]
    beside = asked(runner, LEAN, wanting(PROMPT, 3, max_new_tokens=4), other)["b"]
    assert [(e.token, e.logprob) for e in beside] == [(e.token, e.logprob) for e in alone]
    assert all(event.prompt_logprobs == () for event in beside)


def test_only_the_first_event_tells_and_one_token_has_nothing_to_tell():
    runner = MockRunner(LEAN, VOCAB_SIZE)
    events = asked(runner, LEAN, wanting(PROMPT, 2, max_new_tokens=3))["a"]
    assert [len(event.prompt_logprobs) for event in events] == [len(PROMPT) - 1, 0, 0]
    events = asked(runner, LEAN, wanting(PROMPT[:1], 2))["a"]
    assert events[0].prompt_logprobs == ()
    with pytest.raises(ValueError, match="num_prompt_logprobs"):
        wanting(PROMPT, 21)
