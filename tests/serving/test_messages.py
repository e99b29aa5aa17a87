"""Anthropic's messages: answers whole and streamed, what they are made from, and refusals."""

import asyncio
import json
from typing import Any

import pytest
from quart import Quart

from serving.anthropic import REFUSED, MessagesRequest
from serving.app import create_app
from serving.protocol import ChatRequest
from serving.wire import parse
from tests.serving.scripted import END, ScriptedEngine, scripted_service, tokens

PATH = "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"
THINKS = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


def says(text: str, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(lambda request: [*tokens(text), END], **options)


async def ask(app: Quart, **fields: Any) -> Any:
    body = {"model": "tiny", "max_tokens": 200, "messages": HI, **fields}
    response = await app.test_client().post(PATH, json=body)
    assert response.status_code == 200, await response.get_data()
    if not fields.get("stream"):
        return await response.get_json()
    text = await response.get_data(as_text=True)
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def fold(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as the message it is of; fails where it breaks the protocol."""
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message, is_open = events[0]["message"], False
    assert message["content"] == []
    partial = ""
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                is_open, partial = True, ""
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                assert is_open
                assert event["index"] == len(message["content"]) - 1
                delta, block = event["delta"], message["content"][-1]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] += delta["signature"]
                    case "input_json_delta":
                        partial += delta["partial_json"]
            case "content_block_stop":
                assert is_open
                is_open = False
                if message["content"][-1]["type"] == "tool_use":
                    message["content"][-1]["input"] = json.loads(partial)
            case other:
                assert other == "ping"
    assert not is_open
    return {**message, **events[-2]["delta"], "usage": events[-2]["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [
        {k: v for k, v in block.items() if k not in ("id", "signature")}
        for block in message["content"]
    ]
    return {**message, "id": "", "content": content}


ANSWERS = [
    ("Hello é", {}, [{"type": "text", "text": "Hello é"}], "end_turn"),
    (
        "Hm.</think>Hello",
        THINKS,
        [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello"}],
        "end_turn",
    ),
    (
        f"Look:{CALL}{CALL}",
        {"tools": [TOOL]},
        [
            {"type": "text", "text": "Look:"},
            {"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}},
            {"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}},
        ],
        "tool_use",
    ),
    ("", {}, [], "end_turn"),
    ("abcdef", {"max_tokens": 3}, [{"type": "text", "text": "abx"}], "max_tokens"),
    ("ab|cd", {"stop_sequences": ["|"]}, [{"type": "text", "text": "ab"}], "stop_sequence"),
]


@pytest.mark.parametrize(("text", "fields", "content", "reason"), ANSWERS)
async def test_a_message_is_its_blocks_whole_and_streamed(tmp_path, text, fields, content, reason):
    engine = says(text)
    async with scripted_service(engine, tmp_path) as service:
        app = create_app(service)
        whole = without_ids(await ask(app, **fields))
        assert whole["content"] == content
        assert whole["stop_reason"] == reason
        assert whole["stop_sequence"] == ("|" if reason == "stop_sequence" else None)
        assert whole["usage"]["output_tokens"] > 0
        assert (whole["type"], whole["role"]) == ("message", "assistant")
        assert without_ids(fold(await ask(app, stream=True, **fields))) == whole


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "tiny", "max_tokens": 20, "messages": HI, **fields}
    return parse(MessagesRequest, json.dumps(body).encode(), REFUSED).conversation(100)


def test_a_conversation_keeps_every_block_in_its_place():
    used = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "text", "text": "-3"}],
    }
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "x"},
                {"type": "text", "text": "Look"},
                used,
            ],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    roles = [(m.role, m.text) for m in chat(messages=messages, system="Be brief").messages]
    assert roles == [
        ("system", "Be brief"),
        ("user", "ab"),
        ("assistant", "Look"),
        ("tool", "-3"),
        ("user", "and?"),
    ]
    turn = chat(messages=messages).messages[1]
    assert turn.reasoning_content == "Hm"
    assert turn.tool_calls is not None
    assert turn.tool_calls[0].function.arguments == {"city": "Oslo"}


def test_what_changes_with_every_request_is_taken_out_of_the_system_prompt():
    def system(header: str, left: int) -> str:
        text = f"x-anthropic-billing-header: cc_version=2; cch={header}\n"
        parts = [
            {"type": "text", "text": text},
            {"type": "text", "text": f"Be brief.\n<total_tokens>{left} tokens left</total_tokens>"},
        ]
        return chat(system=parts).messages[0].text

    assert system("abc", 1000) == system("def", 999) == "Be brief."


@pytest.mark.parametrize(
    ("fields", "thinks", "budget"),
    [
        ({}, False, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "adaptive"}}, True, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, True, 2000),
    ],
)
def test_it_thinks_when_asked_to(fields, thinks, budget):
    request = chat(**fields)
    assert (request.enable_thinking, request.thinking_token_budget) == (thinks, budget)


@pytest.mark.parametrize(
    ("choice", "expected", "required"),
    [
        ({"type": "auto"}, "auto", []),
        ({"type": "none"}, "none", []),
        ({"type": "any"}, "required", ["weather"]),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", ["weather"]),
    ],
)
def test_tools_are_chosen_as_asked(choice, expected, required):
    request = chat(tools=[TOOL], tool_choice=choice)
    assert request.tool_choice == expected
    assert request.required_tools == required
    is_single = bool(choice.get("disable_parallel_tool_use"))
    assert (request.parallel_tool_calls is False) == is_single
    assert chat(tools=[TOOL], tool_choice={"type": "tool", "name": "weather"}).required_tools


def test_more_tokens_than_the_server_completes_are_as_many_as_it_does():
    assert chat(max_tokens=50).max_tokens == 50
    assert chat(max_tokens=32_000).max_tokens is None


async def test_an_answer_goes_on_where_the_last_message_ends(tmp_path):
    engine = says("B)")
    async with scripted_service(engine, tmp_path) as service:
        messages = [*HI, {"role": "assistant", "content": "The answer is ("}]
        answer = await ask(create_app(service), messages=messages)
        assert answer["content"] == [{"type": "text", "text": "B)"}]
        prompt = service.tokenizer.decode(engine.requests[0].prompt)
        assert prompt.endswith("<|assistant|></think>The answer is (")


async def test_tokens_are_counted_as_they_are_used(tmp_path):
    async with scripted_service(says("a"), tmp_path) as service:
        app = create_app(service)
        fields: dict[str, Any] = {"system": "Be brief", "tools": [TOOL]}
        body = {"model": "tiny", "messages": HI, **fields}
        response = await app.test_client().post(f"{PATH}/count_tokens", json=body)
        counted = (await response.get_json())["input_tokens"]
        assert counted == (await ask(app, **fields))["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "gpt-9"}, 404, "not_found_error", "gpt-9"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, 400, "invalid_request_error", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400,
         "invalid_request_error", "not image"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, 400,
         "invalid_request_error", "maximum context length"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error",
         "bash_20250124"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, 400, "invalid_request_error", "'x'"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers"),
    ],
)  # fmt: skip
async def test_refusals_have_anthropics_shape(tmp_path, fields, status, kind, words):
    async with scripted_service(says("a"), tmp_path) as service:
        body = {"model": "tiny", "max_tokens": 20, "messages": HI, **fields}
        response = await create_app(service).test_client().post(PATH, json=body)
        answer = await response.get_json()
        assert response.status_code == status, answer
        assert answer["type"] == "error"
        assert answer["error"]["type"] == kind
        assert words in answer["error"]["message"]
        assert answer["request_id"] == response.headers["request-id"]


async def test_a_stream_that_fails_ends_with_an_error_event(tmp_path):
    engine = says("a" * 500, pause=0.005)
    async with scripted_service(engine, tmp_path) as service:
        client = create_app(service).test_client()
        body = {"model": "tiny", "max_tokens": 400, "messages": HI, "stream": True}
        streamed = asyncio.ensure_future(client.post(PATH, json=body))
        await asyncio.sleep(0.05)
        engine.fail(RuntimeError("device lost"))
        response = await streamed
        *_, last, rest = (await response.get_data(as_text=True)).split("\n\n")
        assert rest == ""
        assert last.startswith("event: error\n")
        assert json.loads(last.partition("data: ")[2])["error"]["type"] == "api_error"
