"""OpenAI's responses: answers whole and streamed, what they are made from, and refusals."""

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from quart import Quart

from serving.app import create_app
from serving.openai_responses import REFUSED, ResponsesRequest
from serving.protocol import ChatRequest
from serving.wire import parse
from tests.serving.scripted import END, ScriptedEngine, scripted_service, tokens

PATH = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"


def says(text: str) -> ScriptedEngine:
    return ScriptedEngine(lambda request: [*tokens(text), END])


async def ask(app: Quart, **fields: Any) -> dict[str, Any]:
    response = await app.test_client().post(PATH, json={"input": "Hi", **fields})
    assert response.status_code == 200, await response.get_data()
    answer = await response.get_json()
    Response.model_validate(answer)
    return answer


async def stream(app: Quart, **fields: Any) -> list[dict[str, Any]]:
    response = await app.test_client().post(PATH, json={"input": "Hi", "stream": True, **fields})
    assert response.status_code == 200
    text = await response.get_data(as_text=True)
    events = []
    for number, block in enumerate(text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event)
        events.append(event)
    return events


def fold(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that the deltas of a stream tell; fails where its other events disagree."""
    output: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
            continue
        if "output_index" not in event:
            continue
        item = output[event["output_index"]]
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][event["content_index"]]["text"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert item["content"][event["content_index"]]["text"] == event["text"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert item["arguments"] == event["arguments"]
        elif kind == "output_item.done":
            assert {**item, "status": ""} == {**event["item"], "status": ""}
            item["status"] = event["item"]["status"]
    return output


def plain(output: list[dict[str, Any]]) -> list[tuple]:
    """Items as (type, text) or (type, name, arguments)."""
    return [
        (item["type"], item["name"], item["arguments"])
        if item["type"] == "function_call"
        else (item["type"], item["content"][0]["text"])
        for item in output
    ]


@pytest.mark.parametrize(
    ("text", "fields", "output", "status"),
    [
        ("Hm.</think>Hello é", {}, [("reasoning", "Hm."), ("message", "Hello é")], "completed"),
        ("Hello", {"reasoning": {"effort": "none"}}, [("message", "Hello")], "completed"),
        (
            f"</think>Look:{CALL}{CALL}",
            {"tools": [TOOL]},
            [("message", "Look:"), *[("function_call", "weather", '{"city": "Oslo"}')] * 2],
            "completed",
        ),
        ("", {"reasoning": {"effort": "none"}}, [], "completed"),
        ("abcdef", {"max_output_tokens": 3}, [("reasoning", "abx")], "incomplete"),
    ],
)
async def test_a_response_is_its_items_whole_and_streamed(tmp_path, text, fields, output, status):
    async with scripted_service(says(text), tmp_path) as service:
        app = create_app(service)
        whole = await ask(app, **fields)
        assert plain(whole["output"]) == output
        assert whole["status"] == status
        assert whole["store"] is False
        events = await stream(app, **fields)
        assert plain(fold(events)) == output
        first, *_, last = events
        assert first["type"] == "response.created"
        assert first["response"]["output"] == []
        assert last["type"] == f"response.{status}"
        assert plain(last["response"]["output"]) == output
        assert last["response"]["usage"] == whole["usage"]
        if status == "incomplete":
            assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
            assert whole["output"][-1]["status"] == "incomplete"


async def test_log_probabilities_come_with_the_text(tmp_path):
    async with scripted_service(says("</think>ab"), tmp_path) as service:
        app = create_app(service)
        fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        whole = await ask(app, **fields)
        told = whole["output"][0]["content"][0]["logprobs"]
        assert [entry["token"] for entry in told] == ["a", "b"]
        assert [entry["logprob"] for entry in told] == [-0.5, -0.5]
        assert [len(entry["top_logprobs"]) for entry in told] == [2, 2]
        events = await stream(app, **fields)
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        assert [entry["token"] for event in deltas for entry in event["logprobs"]] == ["a", "b"]


def chat(**fields: Any) -> ChatRequest:
    return parse(ResponsesRequest, json.dumps({"input": "Hi", **fields}).encode(), REFUSED).chat()


def test_items_become_the_conversation_they_were():
    request = chat(
        instructions="Be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs", "summary": [],
             "content": [{"type": "reasoning_text", "text": "Hm"}]},
            {"type": "message", "role": "assistant", "id": "msg", "status": "completed",
             "content": [{"type": "output_text", "text": "Look", "annotations": []}]},
            {"type": "function_call", "call_id": "c", "name": "weather",
             "arguments": '{"city": "Oslo"}'},
            {"type": "function_call_output", "call_id": "c", "output": "-3"},
            {"role": "user", "content": "and?"},
        ],
    )  # fmt: skip
    assert [(m.role, m.text) for m in request.messages] == [
        ("system", "Be brief"),
        ("user", "Weather?"),
        ("assistant", "Look"),
        ("tool", "-3"),
        ("user", "and?"),
    ]
    turn = request.messages[2]
    assert turn.reasoning_content == "Hm"
    assert turn.tool_calls is not None
    assert turn.tool_calls[0].function.arguments == {"city": "Oslo"}


def test_a_response_can_be_the_next_requests_input():
    output = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "status": "completed",
         "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Yes", "annotations": [], "logprobs": []}]},
    ]  # fmt: skip
    [turn, question] = chat(input=[*output, {"role": "user", "content": "Sure?"}]).messages
    assert (turn.text, turn.reasoning_content, question.text) == ("Yes", "Hm", "Sure?")


def test_options_are_the_conversations():
    request = chat(
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        reasoning={"effort": "none"},
        tools=[TOOL],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    )
    assert request.token_limit == ("max_completion_tokens", 7)
    assert (request.temperature, request.top_p) == (0.5, 0.9)
    assert request.enable_thinking is False
    assert request.required_tools == ["weather"]
    assert request.rule is not None
    assert request.rule.source == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].message.content"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)  # fmt: skip
async def test_what_cannot_be_honored_is_refused_by_name(tmp_path, fields, param):
    async with scripted_service(says("a"), tmp_path) as service:
        client = create_app(service).test_client()
        response = await client.post(PATH, json={"input": "Hi", **fields})
        error = (await response.get_json())["error"]
        assert response.status_code == 400, error
        assert error["param"] == param
