"""Answers of a given form: whatever the model would say, what it may say fits."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jsonschema
import pytest
from quart import Quart

from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.shapes import StepShapes
from serving.app import create_app
from tests.serving.schemas import random_schema
from tests.serving.scripted import END, TOKENIZER, ScriptedEngine, scripted_service, tokens

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
SHAPES = StepShapes(
    num_slots=8,
    num_pages=512,
    page_size=64,
    max_seq_len=4096,
    prefill_tile=128,
    prefill_buckets=(8,),
    decode_buckets=(8,),
    vocab_size=TOKENIZER.size,
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }
    for name, properties, required in (
        ("now", {}, []),
        (
            "weather",
            {
                "city": {"enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "deep": {"$ref": "#/$defs/deep"},
            },
            ["city", "days"],
        ),
    )
]


@asynccontextmanager
async def babbling(tmp_path) -> AsyncIterator[Quart]:
    """An app whose model says any token it may."""
    engine = Engine(MockRunner(SHAPES, TOKENIZER.size), SHAPES, 64)
    async with scripted_service(engine, tmp_path) as service:
        yield create_app(service)


async def post(app: Quart, path: str, body: dict[str, Any], status: int = 200) -> Any:
    response = await app.test_client().post(path, json=body)
    assert response.status_code == status, await response.get_data()
    return await response.get_json()


async def said(app: Quart, **fields: Any) -> list[str]:
    """The finished answers of many seeds, without reasoning."""
    body = {"prompt": [[i] for i in range(16)], "max_tokens": 300, **fields}
    answer = await post(app, COMPLETIONS, body)
    texts = [c["text"] for c in answer["choices"] if c["finish_reason"] == "stop"]
    assert len(texts) > 4
    return texts


async def conversed(app: Quart, **fields: Any) -> list[dict[str, Any]]:
    """The answers to many messages, without reasoning."""
    choices = []
    for number in range(24):
        messages = [{"role": "user", "content": f"Hi {number}"}]
        body = {"messages": messages, "reasoning_effort": "none", **fields}
        choices += (await post(app, CHAT, body))["choices"]
    return choices


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
    ],
)
async def test_a_schema_by_any_name_is_kept(tmp_path, fields):
    async with babbling(tmp_path) as app:
        for text in await said(app, **fields):
            answer = json.loads(text)
            assert isinstance(answer.pop("ok"), bool)
            assert answer.pop("kind") in "ab"
            assert answer == {}


async def test_space_between_values_has_an_end(tmp_path):
    async with babbling(tmp_path) as app:
        texts = await said(app, guided_json=SCHEMA)
        assert any("\n" in text for text in texts)
        for text in texts:
            assert not re.search(r"  \S|\n\s*\n|[ \t]{21}", re.sub(r"\n[ \t]*", "\n", text)), text


async def test_two_hundred_schemas_are_kept_by_every_finished_answer(tmp_path):
    async with babbling(tmp_path) as app:
        num_finished = 0
        for seed in range(200):
            schema = random_schema(seed)
            body = {"prompt": [[seed]], "max_tokens": 400, "guided_json": schema}
            [choice] = (await post(app, COMPLETIONS, body))["choices"]
            if choice["finish_reason"] == "stop":
                num_finished += 1
                jsonschema.validate(json.loads(choice["text"]), schema)
        assert num_finished > 100


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", "no", 'a "b"/é']}}, r'yes|no|a "b"/é'),
        ({"guided_choice": ["yes"]}, "yes"),
        ({"structured_outputs": {"regex": r"[0-9]{3}/[a-c]+x"}}, r"[0-9]{3}/[a-c]+x"),
        ({"regex": "a{2,4}"}, "a{2,4}"),
        ({"response_format": {"type": "regex", "regex": "ab?c"}}, "ab?c"),
        ({"structured_outputs": {"grammar": 'start: "x" NUM\nNUM: /[0-9]{2}/'}}, "x[0-9]{2}"),
        ({"ebnf": 'root ::= "p" ("q" | "r")'}, "p[qr]"),
        ({"guided_grammar": 'root ::= [a-c] "z"'}, "[a-c]z"),
    ],
)
async def test_patterns_choices_and_grammars_are_kept(tmp_path, fields, pattern):
    async with babbling(tmp_path) as app:
        for text in await said(app, **fields):
            assert re.fullmatch(pattern, text), text


async def test_json_object_is_some_object(tmp_path):
    async with babbling(tmp_path) as app:
        # What the mock says depends on the position, so that every length says something else.
        body = {"prompt": [[5] * length for length in range(1, 61)], "max_tokens": 100}
        body["response_format"] = {"type": "json_object"}
        answer = await post(app, COMPLETIONS, body)
        texts = [c["text"] for c in answer["choices"] if c["finish_reason"] == "stop"]
        assert texts
        assert all(isinstance(json.loads(text), dict) for text in texts)


async def test_the_form_begins_where_the_reasoning_ends(tmp_path):
    engine = ScriptedEngine(lambda request: [*tokens('Hm. {"no"}</think>false'), END])
    async with scripted_service(engine, tmp_path) as service:
        body = {"messages": HI, "structured_outputs": {"choice": ["true", "false"]}}
        answer = await post(create_app(service), CHAT, body)
        message = answer["choices"][0]["message"]
        assert message["reasoning"] == 'Hm. {"no"}'
        assert message["content"] == "false"


async def test_an_answer_with_a_form_does_not_end_in_its_reasoning(tmp_path):
    engine = ScriptedEngine(lambda request: [*tokens("Hm."), END, *tokens("</think>false")])
    async with scripted_service(engine, tmp_path) as service:
        body = {"messages": HI, "structured_outputs": {"choice": ["true", "false"]}}
        answer = await post(create_app(service), CHAT, body)
        assert answer["choices"][0]["message"]["content"] == "false"


@pytest.mark.parametrize("budget", [0, 3])
async def test_reasoning_ends_with_its_budget(tmp_path, budget):
    engine = ScriptedEngine(lambda request: [*tokens("abcdef"[: budget + 1]), *tokens("xy"), END])
    async with scripted_service(engine, tmp_path) as service:
        body = {"messages": HI, "thinking_token_budget": budget}
        answer = await post(create_app(service), CHAT, body)
        message = answer["choices"][0]["message"]
        assert message["reasoning"] == ("abcdef"[:budget] or None)
        assert message["content"] == "xy"


@pytest.mark.parametrize("parallel", [True, False])
async def test_required_tools_are_called_with_arguments_that_fit(tmp_path, parallel):
    async with babbling(tmp_path) as app:
        body = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 400}
        names = set()
        for choice in await conversed(app, **body, parallel_tool_calls=parallel):
            if choice["finish_reason"] == "length":
                continue
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] is None
            calls = [call["function"] for call in choice["message"]["tool_calls"]]
            assert parallel or len(calls) == 1
            for call in calls:
                arguments = json.loads(call["arguments"])
                names.add(call["name"])
                if call["name"] == "weather":
                    assert arguments["city"] in ("Oslo", "Rome")
                    assert 1 <= arguments["days"] <= 9
                else:
                    assert arguments == {}
        assert names == {"now", "weather"}


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "now"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "now"}}],
            },
        },
    ],
)
async def test_a_named_tool_is_the_one_that_is_called(tmp_path, choice):
    async with babbling(tmp_path) as app:
        body = {"messages": HI, "tools": TOOLS, "tool_choice": choice}
        body |= {"reasoning_effort": "none", "parallel_tool_calls": False}
        [answer] = (await post(app, CHAT, body))["choices"]
        assert answer["finish_reason"] == "tool_calls"
        [call] = answer["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": "{}"}


@pytest.mark.parametrize("is_strict", [True, False])
@pytest.mark.parametrize(
    "city",
    [
        {"enum": ["Oslo", "Rome"]},
        {"const": "Oslo", "type": "string"},
        {"enum": ["Oslo", None], "type": ["string", "null"]},
    ],
)
async def test_arguments_of_a_strict_tool_fit_its_schema(tmp_path, city, is_strict):
    # The model wants to call it with a city that the schema does not know.
    wish = "Hm.<tool_call>weather<arg_key>city</arg_key><arg_value>Bonn</arg_value></tool_call>"
    engine = ScriptedEngine(lambda request: [*tokens(wish), END])
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    weather = {"name": "weather", "strict": is_strict, "parameters": schema}
    async with scripted_service(engine, tmp_path) as service:
        body = {"messages": HI, "tools": [{"type": "function", "function": weather}]}
        body |= {"reasoning_effort": "none", "max_tokens": 100}
        [choice] = (await post(create_app(service), CHAT, body))["choices"]
    assert choice["message"]["content"] == "Hm."
    [call] = choice["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert (arguments["city"] in ("Oslo", "Rome", None)) == is_strict


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"type": "object"}, {"a": 1, "b": "x y"}),
        ({"$ref": "#/$defs/f", "$defs": {"f": {"properties": {"a": {}}}}}, {"a": 1, "b": "x y"}),
        ({"type": "object", "properties": {}}, {}),
        ({"type": "object", "additionalProperties": False}, {}),
        (None, {}),
    ],
)
async def test_a_schema_that_names_no_arguments_may_allow_any(tmp_path, schema, wanted):
    pairs = (("a", "1"), ("b", "x y"))
    arguments = "".join(
        f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in pairs
    )
    engine = ScriptedEngine(lambda request: [*tokens(f"<tool_call>f{arguments}</tool_call>"), END])
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    async with scripted_service(engine, tmp_path) as service:
        body = {"messages": HI, "tools": [tool], "reasoning_effort": "none", "max_tokens": 200}
        body |= {"tool_choice": "required", "parallel_tool_calls": False}
        [choice] = (await post(create_app(service), CHAT, body))["choices"]
    [call] = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == wanted


@pytest.mark.parametrize("text", ["", "No tool is for that."])
async def test_with_a_strict_tool_an_answer_may_call_none(tmp_path, text):
    engine = ScriptedEngine(lambda request: [*tokens(text), END])
    tool = {"type": "function", "function": {"name": "now", "strict": True}}
    async with scripted_service(engine, tmp_path) as service:
        body = {"messages": HI, "tools": [tool], "reasoning_effort": "none", "max_tokens": 100}
        [choice] = (await post(create_app(service), CHAT, body))["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", text)


async def test_with_tools_at_hand_an_answer_is_a_call_or_has_the_form(tmp_path):
    async with babbling(tmp_path) as app:
        body = {"tools": TOOLS[:1], "structured_outputs": {"choice": ["yes"]}}
        choices = await conversed(app, **body, parallel_tool_calls=False)
        assert {choice["finish_reason"] for choice in choices} == {"stop", "tool_calls"}
        assert {choice["message"]["content"] for choice in choices} == {"yes", None}


STRICT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f",
        "strict": True,
        "parameters": {"properties": {"a": {"type": "integer", "not": {"const": 1}}}},
    },
}
BAD = [
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"guided_json": {"type": "banana"}}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": "[]"}, "guided_json"),
    ({"guided_json": {"not": {"type": "string"}}}, "guided_json"),
    ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
    ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"ebnf": "root ::= other"}, "ebnf"),
    ({"ebnf": 'root ::= "' + "x" * 200_000 + '"'}, "ebnf"),
    ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf"),
    ({"regex": "a", "tools": TOOLS}, "regex"),
    ({"tools": [STRICT]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
async def test_a_form_that_is_none_is_refused_in_the_compilers_words(tmp_path, fields, param):
    async with babbling(tmp_path) as app:
        answer = await post(app, CHAT, {"messages": HI, **fields}, 400)
        error = answer["error"]
        assert error["param"] == param
        assert len(error["message"]) > 20
        assert not re.search(r"\d \||TEXT", error["message"]), error
