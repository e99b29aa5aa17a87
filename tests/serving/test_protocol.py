"""What a request may hold: honored, refused by name, or ignored; never misread."""

import json

import pytest

from serving.errors import MAX_MESSAGE_LENGTH, ApiError
from serving.protocol import (
    REFUSED_CHAT,
    REFUSED_COMPLETION,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    parse,
)

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(**fields) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": MESSAGES, **fields}).encode())


def completion(**fields) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "Hi", **fields}).encode())


def refusal(kind: type[GenerationRequest], body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, body)
    return caught.value


CHAT_FIELDS = """messages model audio frequency_penalty function_call functions logit_bias logprobs
max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls prediction
presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort
response_format safety_identifier seed service_tier stop store stream stream_options temperature
tool_choice tools top_logprobs top_p user verbosity web_search_options""".split()
HARMLESS = """metadata prediction prompt_cache_key prompt_cache_options prompt_cache_retention
safety_identifier service_tier store user""".split()


def test_every_field_of_the_openai_client_is_honored_refused_or_known_to_be_harmless():
    for name in CHAT_FIELDS:
        kinds = [name in ChatRequest.model_fields, name in REFUSED_CHAT, name in HARMLESS]
        assert sum(kinds) == 1, name


@pytest.mark.parametrize("name", HARMLESS + ["no_such_field"])
def test_harmless_and_unknown_fields_are_ignored(name):
    assert chat(**{name: {"any": "thing"}}) == chat()


@pytest.mark.parametrize("name", sorted(REFUSED_CHAT))
def test_a_field_that_would_change_the_answer_is_refused_by_name(name):
    error = refusal(ChatRequest, json.dumps({"messages": MESSAGES, name: "value"}).encode())
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    assert "not supported" in error.message


@pytest.mark.parametrize("name", sorted(REFUSED_CHAT))
def test_a_refused_field_may_be_absent_null_or_ask_for_nothing(name):
    assert chat(**{name: None}) == chat()
    for value in REFUSED_CHAT[name]:
        chat(**{name: value})


def test_completions_refuse_their_own_fields():
    for name in REFUSED_COMPLETION:
        error = refusal(CompletionRequest, json.dumps({"prompt": "a", name: [7]}).encode())
        assert error.param == name


@pytest.mark.parametrize(
    ("stop", "strings"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])]
)
def test_stop_is_a_string_or_several(stop, strings):
    assert chat(stop=stop).stop == strings
    assert completion(stop=stop).stop == strings


@pytest.mark.parametrize(
    ("prompt", "taken"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [1]], ["a", [1]]),
        ("", [""]),
        ([], [[]]),
    ],
)
def test_prompts_are_texts_or_tokens(prompt, taken):
    assert completion(prompt=prompt).prompt == taken


def test_max_completion_tokens_wins_over_its_old_name():
    assert chat(max_tokens=5).token_limit == ("max_tokens", 5)
    assert chat(max_tokens=5, max_completion_tokens=6).token_limit == ("max_completion_tokens", 6)
    assert completion(max_tokens=5).token_limit == ("max_tokens", 5)


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": None, "thinking": None}, None),
    ],
)
def test_thinking_is_switched_by_any_of_its_names(fields, thinks):
    assert chat(**fields).enable_thinking is thinks


def test_tools_keep_the_words_they_were_declared_in():
    tool = {"function": {"strict": True, "parameters": {"z": 1, "a": 2}, "name": "f"}}
    tool = {"type": "function", **tool, "extra": [1]}
    [declared] = chat(tools=[tool]).offered_tools
    assert json.dumps(declared) == json.dumps(tool)


BODIES = [b"", b"{", b"[1]", b'"a"', b'{"messages": NaN}', b"\xff", b"[" * 10_000]


@pytest.mark.parametrize("body", [*BODIES, b'{"messages":[{"role":"user","content":"\\ud800"}]}'])
def test_a_body_that_is_no_json_object_is_refused(body):
    assert refusal(ChatRequest, body).status == 400


def test_an_error_does_not_grow_with_its_cause():
    for body in (
        {"messages": "x" * 10**6},
        {"messages": [{"role": "y" * 10**6}]},
        {"messages": [{"role": "user", "content": [{"type": "z" * 10**6}]}]},
        {"messages": MESSAGES, "seed": int("9" * 4000)},
    ):
        error = refusal(ChatRequest, json.dumps(body).encode())
        assert len(error.message) <= MAX_MESSAGE_LENGTH
        assert len(json.dumps(error.body())) < 2 * MAX_MESSAGE_LENGTH
