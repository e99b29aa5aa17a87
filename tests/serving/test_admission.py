"""From a parsed request to the engine's: limits hold, defaults fill the gaps."""

import json

import pytest

from glm_jax.engine.request import Request
from serving.admission import GenerationDefaults, Limits, admit
from serving.errors import ApiError
from serving.protocol import CompletionRequest, parse

DEFAULTS = GenerationDefaults(stop_token_ids=frozenset({90, 91}), temperature=0.6, top_p=0.9)
LIMITS = Limits(max_seq_len=100, max_prompt_tokens=80, max_new_tokens=50)


def admitted(prompt: int = 3, limits: Limits = LIMITS, **fields) -> Request:
    body = parse(CompletionRequest, json.dumps({"prompt": [1] * prompt, **fields}).encode())
    [tokens] = body.prompt
    assert isinstance(tokens, list)
    return admit(body, tokens, id="r", limits=limits, defaults=DEFAULTS, vocab_size=100)


def test_what_a_request_says_is_what_the_engine_gets():
    sampling = admitted(
        max_tokens=7, temperature=0, top_p=0.5, top_k=5, min_p=0.1, seed=3, stop_token_ids=[4]
    ).sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (7, 0.0, 0.5)
    assert (sampling.top_k, sampling.min_p, sampling.seed) == (5, 0.1, 3)
    assert sampling.stop_token_ids == {4, 90, 91}


def test_what_it_leaves_out_is_the_models_default():
    sampling = admitted().sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 0)
    assert sampling.stop_token_ids == {90, 91}
    assert admitted(top_k=-1).sampling.top_k == 0


def test_ignore_eos_leaves_only_the_requests_own_stop_tokens():
    assert admitted(ignore_eos=True).sampling.stop_token_ids == frozenset()
    assert admitted(ignore_eos=True, stop_token_ids=[5]).sampling.stop_token_ids == {5}


def test_priority_and_salt_reach_the_engine_and_ask_for_nothing_when_left_out():
    asked = admitted(priority=-2, cache_salt="mine")
    assert (asked.priority, asked.cache_salt) == (-2, "mine")
    plain = admitted(priority=None, cache_salt=None)
    assert (plain.priority, plain.cache_salt) == (0, "")


@pytest.mark.parametrize("fields", [{"priority": 2**31}, {"priority": "1"}, {"cache_salt": ""}])
def test_a_priority_or_salt_of_the_wrong_kind_is_named(fields):
    with pytest.raises(ApiError) as caught:
        admitted(**fields)
    assert (caught.value.status, caught.value.param) == (400, next(iter(fields)))


def test_seeds_differ_unless_given_and_may_be_negative():
    assert admitted().sampling.seed != admitted().sampling.seed
    assert admitted(seed=-1).sampling.seed == 2**64 - 1


def test_a_completion_is_as_long_as_limits_and_prompt_allow():
    assert admitted(3).sampling.max_new_tokens == 50
    assert admitted(70).sampling.max_new_tokens == 30
    assert admitted(70, max_tokens=30).sampling.max_new_tokens == 30
    narrow = Limits(max_seq_len=10, max_prompt_tokens=80, max_new_tokens=50)
    assert admitted(9, narrow).sampling.max_new_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "fields", "param", "code", "words"),
    [
        (0, {}, "prompt", "invalid_value", "must not be empty"),
        (81, {}, "prompt", "context_length_exceeded", "maximum context length is 100 tokens"),
        (70, {"max_tokens": 31}, "prompt", "context_length_exceeded", "you requested 101 tokens"),
        (3, {"max_tokens": 51}, "max_tokens", "invalid_value", "up to 50"),
        (3, {"stop_token_ids": [100]}, "stop_token_ids", "invalid_value", "0 to 99"),
    ],
)
def test_what_does_not_fit_is_refused(prompt, fields, param, code, words):
    with pytest.raises(ApiError, match=words) as caught:
        admitted(prompt, **fields)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, param, code)


@pytest.mark.parametrize("token", [-1, 100, 2**70])
def test_tokens_outside_the_vocabulary_are_refused(token):
    body = parse(CompletionRequest, json.dumps({"prompt": [1, token]}).encode())
    [tokens] = body.prompt
    assert isinstance(tokens, list)
    with pytest.raises(ApiError, match="0 to 99"):
        admit(body, tokens, id="r", limits=LIMITS, defaults=DEFAULTS, vocab_size=100)


def test_defaults_come_from_the_model_directory(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert GenerationDefaults.from_directory(tmp_path).stop_token_ids == {7}
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [8, 9], "temperature": 0.5, "top_p": 0.25, "top_k": 4}'
    )
    found = GenerationDefaults.from_directory(tmp_path)
    assert found.stop_token_ids == {8, 9}
    assert (found.temperature, found.top_p, found.top_k) == (0.5, 0.25, 4)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0, "top_k": null}')
    found = GenerationDefaults.from_directory(tmp_path)
    assert (found.temperature, found.top_p, found.top_k) == (0.0, 1.0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{",
        "[1]",
        '{"eos_token_id": "a"}',
        '{"eos_token_id": 1.5}',
        '{"eos_token_id": 1, "top_p": "a"}',
    ],
)
def test_a_model_directory_without_stop_tokens_is_refused(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json"):
        GenerationDefaults.from_directory(tmp_path)
