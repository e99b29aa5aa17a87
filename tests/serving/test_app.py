"""The routes: every answer, every refusal, in OpenAI's own form."""

import asyncio
import json
from typing import Any

import pytest
from quart import Quart

from serving.admission import Limits
from serving.app import create_app
from tests.serving.scripted import END, ScriptedEngine, scripted_service, tokens

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"properties": {}}}}


def says(text: str, *, pause: float = 0.0, max_queue: int = 64) -> ScriptedEngine:
    return ScriptedEngine(lambda request: [*tokens(text), END], pause=pause, max_queue=max_queue)


async def post(app: Quart, path: str, body: Any) -> Any:
    response = await app.test_client().post(path, json=body)
    assert response.status_code == 200, await response.get_data()
    return await response.get_json()


async def stream(app: Quart, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, [DONE] checked and left out."""
    response = await app.test_client().post(path, json={**body, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    text = await response.get_data(as_text=True)
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def collect(events: list[dict[str, Any]]) -> dict[str, Any]:
    """A chat stream as a message, with its finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    reasons = []
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content", "")
            message["reasoning"] += delta.get("reasoning", "")
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    assert call["type"] == "function"
                    message["tool_calls"].append(call["function"])
                else:
                    message["tool_calls"][-1]["arguments"] += call["function"]["arguments"]
            reasons.append(choice["finish_reason"])
    assert [reason is None for reason in reasons] == [True] * (len(reasons) - 1) + [False]
    return {**message, "finish_reason": reasons[-1]}


async def test_a_completion_is_the_text_of_its_tokens(tmp_path):
    async with scripted_service(says("hello é"), tmp_path) as service:
        app = create_app(service)
        answer = await post(app, COMPLETIONS, {"model": "tiny", "prompt": "Hi"})
        assert answer["object"] == "text_completion"
        assert answer["model"] == "tiny"
        assert answer["choices"] == [
            {
                "index": 0,
                "text": "hello é",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ]
        num_tokens = len(tokens("hello é")) + 1
        assert answer["usage"]["completion_tokens"] == num_tokens
        assert answer["usage"]["total_tokens"] == num_tokens + 2
        events = await stream(app, COMPLETIONS, {"prompt": "Hi"})
        assert "".join(event["choices"][0]["text"] for event in events) == "hello é"
        assert {event["object"] for event in events} == {"text_completion"}


async def test_a_raw_completion_shows_the_tags(tmp_path):
    async with scripted_service(says("a</think>b"), tmp_path) as service:
        answer = await post(create_app(service), COMPLETIONS, {"prompt": [1, 2, 3]})
        assert answer["choices"][0]["text"] == "a</think>b"
        assert answer["usage"]["prompt_tokens"] == 3


async def test_a_chat_answer_has_reasoning_and_content(tmp_path):
    async with scripted_service(says("Hm.</think>Hello"), tmp_path) as service:
        app = create_app(service)
        answer = await post(app, CHAT, {"messages": HI})
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"] == {
            "role": "assistant",
            "content": "Hello",
            "refusal": None,
            "reasoning_content": "Hm.",
            "reasoning": "Hm.",
        }
        assert answer["choices"][0]["finish_reason"] == "stop"
        reasoning = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert reasoning == len(tokens("Hm.</think>"))


async def test_a_stream_says_what_the_whole_answer_says(tmp_path):
    text = "Hm.</think>Ok.<tool_call>now</tool_call>"
    async with scripted_service(says(text), tmp_path) as service:
        app = create_app(service)
        body = {"messages": HI, "tools": [TOOL]}
        message = (await post(app, CHAT, body))["choices"][0]["message"]
        events = await stream(app, CHAT, body)
        streamed = collect(events)
        assert streamed["finish_reason"] == "tool_calls"
        assert streamed["content"] == message["content"] == "Ok."
        assert streamed["reasoning"] == message["reasoning"] == "Hm."
        functions = [call["function"] for call in message["tool_calls"]]
        assert streamed["tool_calls"] == functions == [{"name": "now", "arguments": "{}"}]
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert len({event["id"] for event in events}) == 1
        assert all("usage" not in event for event in events)


async def test_usage_ends_a_stream_that_asks_for_it(tmp_path):
    async with scripted_service(says("a"), tmp_path) as service:
        body = {"messages": HI, "stream_options": {"include_usage": True}}
        *events, last = await stream(create_app(service), CHAT, body)
        assert all(event["usage"] is None for event in events)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 2


async def test_a_stream_may_take_as_long_as_it_takes(tmp_path):
    async with scripted_service(says("</think>abcdefgh", pause=0.01), tmp_path) as service:
        app = create_app(service)
        app.config["RESPONSE_TIMEOUT"] = 0.02
        assert collect(await stream(app, CHAT, {"messages": HI}))["content"] == "abcdefgh"


async def test_without_tools_a_call_is_text(tmp_path):
    async with scripted_service(says("<tool_call>now</tool_call>"), tmp_path) as service:
        body = {"messages": HI, "reasoning_effort": "none"}
        answer = await post(create_app(service), CHAT, body)
        assert answer["choices"][0]["message"]["content"] == "<tool_call>now</tool_call>"
        assert answer["choices"][0]["finish_reason"] == "stop"


async def test_one_call_is_the_last_when_parallel_calls_are_off(tmp_path):
    engine = says("<tool_call>now</tool_call><tool_call>now</tool_call>", pause=0.001)
    async with scripted_service(engine, tmp_path) as service:
        body = {"messages": HI, "tools": [TOOL], "parallel_tool_calls": False}
        answer = await post(create_app(service), CHAT, body)
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert len(engine.cancelled) == 1


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_answer_and_frees_the_engine(tmp_path, include):
    engine = says("one two three four five six seven", pause=0.001)
    async with scripted_service(engine, tmp_path) as service:
        body = {"prompt": "Hi", "stop": [" three"], "include_stop_str_in_output": include}
        answer = await post(create_app(service), COMPLETIONS, body)
        assert answer["choices"][0]["text"] == "one two" + " three" * include
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert len(engine.cancelled) == 1


async def test_a_stop_token_is_left_out_unless_asked_for(tmp_path):
    async with scripted_service(says("abc"), tmp_path) as service:
        app = create_app(service)
        body: dict[str, Any] = {"prompt": "Hi", "stop_token_ids": tokens("b")}
        assert (await post(app, COMPLETIONS, body))["choices"][0]["text"] == "a"
        body["include_stop_str_in_output"] = True
        assert (await post(app, COMPLETIONS, body))["choices"][0]["text"] == "ab"


async def test_the_length_limit_is_told(tmp_path):
    async with scripted_service(says("abcdefgh"), tmp_path) as service:
        answer = await post(create_app(service), COMPLETIONS, {"prompt": "Hi", "max_tokens": 3})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3


async def test_models_are_listed_under_all_their_names(tmp_path):
    async with scripted_service(says("a"), tmp_path) as service:
        client = create_app(service).test_client()
        listed = await (await client.get("/v1/models")).get_json()
        assert [model["id"] for model in listed["data"]] == ["tiny", "alias/of-tiny"]
        one = await (await client.get("/v1/models/alias/of-tiny")).get_json()
        assert one == listed["data"][1]
        assert one["object"] == "model"
        answer = await post(create_app(service), CHAT, {"messages": HI, "model": "alias/of-tiny"})
        assert answer["model"] == "alias/of-tiny"


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def call(**function: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}]}


TYPE, VALUE, MISSING, NOT_YET = (
    "invalid_type", "invalid_value", "missing_required_parameter", "unsupported_parameter",
)  # fmt: skip
LONG = "context_length_exceeded"
BAD = [
    # path, body, status, param, code
    (CHAT, b"", 400, None, None),
    (CHAT, b"{not json", 400, None, None),
    (CHAT, b"[]", 400, None, TYPE),
    (CHAT, {}, 400, "messages", MISSING),
    (CHAT, {"messages": []}, 400, "messages", VALUE),
    (CHAT, {"messages": "Hi"}, 400, "messages", TYPE),
    (CHAT, {"messages": [{"content": "Hi"}]}, 400, "messages[0].role", MISSING),
    (CHAT, {"messages": [{"role": "king"}]}, 400, "messages[0].role", VALUE),
    (CHAT, user(5), 400, "messages[0].content", TYPE),
    (CHAT, user([{"type": "image_url", "image_url": {}}]), 400, "messages[0].content", NOT_YET),
    (CHAT, user([{"type": "text"}]), 400, "messages[0].content[0].text", MISSING),
    (CHAT, call(name="f", arguments="{"), 400,
     "messages[0].tool_calls[0].function.arguments", VALUE),
    (CHAT, {"messages": HI, "temperature": "0.5"}, 400, "temperature", TYPE),
    (CHAT, {"messages": HI, "temperature": True}, 400, "temperature", TYPE),
    (CHAT, {"messages": HI, "temperature": 2.5}, 400, "temperature", VALUE),
    (CHAT, {"messages": HI, "temperature": -1}, 400, "temperature", VALUE),
    (CHAT, {"messages": HI, "top_p": 0}, 400, "top_p", VALUE),
    (CHAT, {"messages": HI, "top_k": 1.5}, 400, "top_k", TYPE),
    (CHAT, {"messages": HI, "min_p": 1}, 400, "min_p", VALUE),
    (CHAT, {"messages": HI, "seed": "7"}, 400, "seed", TYPE),
    (CHAT, {"messages": HI, "seed": 2**70}, 400, "seed", VALUE),
    (CHAT, {"messages": HI, "max_tokens": 0}, 400, "max_tokens", VALUE),
    (CHAT, {"messages": HI, "max_completion_tokens": 10**9}, 400, "max_completion_tokens", VALUE),
    (CHAT, {"messages": HI, "stop": [""]}, 400, "stop[0]", VALUE),
    (CHAT, {"messages": HI, "stop": ["a"] * 17}, 400, "stop", VALUE),
    (CHAT, {"messages": HI, "stop": 1}, 400, "stop", TYPE),
    (CHAT, {"messages": HI, "stream": "yes"}, 400, "stream", TYPE),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": 1}}, 400,
     "stream_options.include_usage", TYPE),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools[0].function", MISSING),
    (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "a b"}}]}, 400,
     "tools[0].function.name", VALUE),
    (CHAT, {"messages": HI, "reasoning_effort": "much"}, 400, "reasoning_effort", VALUE),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"enable_thinking": "no"}}, 400,
     "chat_template_kwargs.enable_thinking", TYPE),
    (CHAT, {"messages": HI, "model": 5}, 400, "model", TYPE),
    (CHAT, {"messages": HI, "model": "gpt-9"}, 404, "model", "model_not_found"),
    (CHAT, user("x" * 300), 400, "messages", LONG),
    (CHAT, user("x" * 10**6), 400, "messages", LONG),
    (COMPLETIONS, {}, 400, "prompt", MISSING),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", VALUE),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", TYPE),
    (COMPLETIONS, {"prompt": [10**6]}, 400, "prompt", VALUE),
    (COMPLETIONS, {"prompt": "x" * 300}, 400, "prompt", LONG),
    (COMPLETIONS, {"prompt": "x" * 90, "max_tokens": 50}, 400, "prompt", LONG),
    (COMPLETIONS, {"prompt": "Hi", "suffix": "!"}, 400, "suffix", NOT_YET),
    (COMPLETIONS, {"prompt": "Hi", "stop_token_ids": [-1]}, 400, "stop_token_ids", VALUE),
    (CHAT, {"messages": HI, "n": 0}, 400, "n", VALUE),
    (CHAT, {"messages": HI, "n": 2.5}, 400, "n", TYPE),
    (CHAT, {"messages": HI, "presence_penalty": 3}, 400, "presence_penalty", VALUE),
    (CHAT, {"messages": HI, "frequency_penalty": "0"}, 400, "frequency_penalty", TYPE),
    (CHAT, {"messages": HI, "repetition_penalty": 0}, 400, "repetition_penalty", VALUE),
    (CHAT, {"messages": HI, "logit_bias": [1]}, 400, "logit_bias", TYPE),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, 400, "logit_bias", VALUE),
    (CHAT, {"messages": HI, "logit_bias": {"999999": 1}}, 400, "logit_bias", VALUE),
    (CHAT, {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs", VALUE),
    (CHAT, {"messages": HI, "logprobs": 2}, 400, "logprobs", TYPE),
    (CHAT, {"messages": HI, "min_tokens": 65}, 400, "min_tokens", VALUE),
    (CHAT, {"messages": HI, "thinking_token_budget": -1}, 400, "thinking_token_budget", VALUE),
    (CHAT, {"messages": HI, "continue_final_message": True}, 400, "continue_final_message", VALUE),
    (CHAT, {"messages": HI, "response_format": {"type": "xml"}}, 400, "response_format.type", VALUE),
    (CHAT, {"messages": HI, "response_format": "json"}, 400, "response_format", TYPE),
    (CHAT, {"messages": HI, "guided_json": {"type": "banana"}}, 400, "guided_json", VALUE),
    (CHAT, {"messages": HI, "guided_regex": "(("}, 400, "guided_regex", VALUE),
    (CHAT, {"messages": HI, "guided_regex": "a", "guided_choice": ["a"]}, 400,
     "guided_choice", VALUE),
    (CHAT, {"messages": HI, "tool_choice": "required"}, 400, "tool_choice", VALUE),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": {"function": {"name": "x"}}}, 400,
     "tool_choice", VALUE),
    (CHAT, {"messages": HI, "audio": {}}, 400, "audio", NOT_YET),
    (CHAT, {"messages": HI, "functions": [{"name": "f"}]}, 400, "functions", NOT_YET),
    (CHAT, {"messages": HI, "use_beam_search": True}, 400, "use_beam_search", NOT_YET),
    (COMPLETIONS, {"prompt": "Hi", "best_of": 1, "n": 2}, 400, "best_of", VALUE),
    (COMPLETIONS, {"prompt": "Hi", "logprobs": True}, 400, "logprobs", TYPE),
    (COMPLETIONS, {"prompt": "Hi", "max_tokens": 0}, 400, "max_tokens", VALUE),
    (COMPLETIONS, {"prompt": "Hi", "prompt_logprobs": 21}, 400, "prompt_logprobs", VALUE),
    (CHAT, {"messages": HI, "prompt_logprobs": -1}, 400, "prompt_logprobs", VALUE),
    (
        COMPLETIONS,
        {"prompt": "Hi", "prompt_logprobs": 0, "stream": True},
        400,
        "prompt_logprobs",
        VALUE,
    ),
    (COMPLETIONS, {"prompt": ["a"] * 65}, 400, "prompt", VALUE),
    (RESPONSES, {}, 400, "input", MISSING),
    (RESPONSES, {"input": []}, 400, "input", VALUE),
    (RESPONSES, {"input": "Hi", "previous_response_id": "x"}, 400, "previous_response_id", NOT_YET),
    (RESPONSES, {"input": "Hi", "tools": [{"type": "web_search"}]}, 400, "tools", NOT_YET),
    (RESPONSES, {"input": "Hi", "max_output_tokens": 65}, 400, "max_output_tokens", VALUE),
    (RESPONSES, {"input": "x" * 300}, 400, "input", "context_length_exceeded"),
    (RESPONSES, {"input": "Hi", "text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
     400, "text.format", VALUE),
    (RESPONSES, {"input": "Hi", "model": "gpt-9"}, 404, "model", "model_not_found"),
    ("/tokenize", {}, 400, "prompt", MISSING),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]", VALUE),
    ("/v1/embeddings", {"input": "Hi"}, 404, None, "unknown_url"),
    ("/v1/models", {}, 405, None, "method_not_allowed"),
]  # fmt: skip
SMALL = Limits(max_seq_len=128, max_prompt_tokens=100, max_new_tokens=64)


async def test_bad_requests_are_told_what_is_wrong_and_harm_no_other(tmp_path):
    engine = says("</think>a long and healthy answer", pause=0.001)
    async with scripted_service(engine, tmp_path, limits=SMALL) as service:
        app = create_app(service)
        for path, body, status, param, code in BAD:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            good = asyncio.ensure_future(post(app, CHAT, {"messages": HI}))
            response = await app.test_client().post(path, data=data)
            answer = await response.get_json()
            assert set(answer) == {"error"}, (path, body)
            error = answer["error"]
            assert response.status_code == status, (path, body, error)
            assert (error["param"], error["code"]) == (param, code), (path, body, error)
            assert error["type"] == "invalid_request_error"
            assert error["message"]
            unharmed = (await good)["choices"][0]["message"]["content"]
            assert unharmed == "a long and healthy answer"
        assert len(BAD) >= 60


async def test_a_prompt_that_is_too_long_is_told_in_the_words_clients_look_for(tmp_path):
    async with scripted_service(says("a"), tmp_path, limits=SMALL) as service:
        client = create_app(service).test_client()
        for content in ("x" * 300, "x" * 10**5):
            response = await client.post(CHAT, json=user(content))
            message = (await response.get_json())["error"]["message"]
            assert "This model's maximum context length is 128 tokens" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "Invalid 'messages': should have at least 1 item, not 0."),
        ({"messages": HI, "stop": ""}, "Invalid 'stop[0]': should have at least 1 character"),
        ({"messages": HI, "stop": ["a"] * 17}, "Invalid 'stop': should have at most 16 items"),
        ({"messages": HI, "n": 0}, "Invalid 'n': should be greater than or equal to 1, not 0."),
    ],
)
async def test_an_error_is_a_sentence_about_its_field(tmp_path, fields, words):
    async with scripted_service(says("a"), tmp_path) as service:
        response = await create_app(service).test_client().post(CHAT, json=fields)
        assert (await response.get_json())["error"]["message"].startswith(words)


async def test_a_body_that_is_too_large_is_refused(tmp_path):
    async with scripted_service(says("a"), tmp_path) as service:
        response = await create_app(service).test_client().post(CHAT, data=b"x" * (17 * 2**20))
        assert response.status_code == 413
        assert (await response.get_json())["error"]["type"] == "invalid_request_error"


async def test_a_full_queue_says_when_to_come_back(tmp_path):
    async with scripted_service(says("a" * 50, pause=0.005, max_queue=1), tmp_path) as service:
        app = create_app(service)
        first = asyncio.ensure_future(post(app, CHAT, {"messages": HI}))
        await asyncio.sleep(0.02)
        response = await app.test_client().post(CHAT, json={"messages": HI, "stream": True})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        error = (await response.get_json())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "slow_down")
        assert (await first)["choices"][0]["finish_reason"] == "stop"


async def test_a_client_that_goes_away_cancels_its_request(tmp_path):
    engine = says("a" * 200, pause=0.005)
    async with scripted_service(engine, tmp_path) as service:
        app = create_app(service)
        client = app.test_client()
        body = json.dumps({"messages": HI, "stream": True}).encode()
        async with client.request(CHAT, method="POST") as connection:
            await connection.send(body)
            await connection.send_complete()
            await connection.receive()
            await connection.disconnect()
        await asyncio.sleep(0.05)
        assert engine.cancelled == [request.id for request in engine.requests]
        assert service.bridge.num_streams == 0
        metrics = await (await client.get("/metrics")).get_data(as_text=True)
        assert 'glm_request_total{endpoint="/v1/chat/completions",status="cancelled"} 1' in metrics


async def test_a_failing_engine_is_told_to_every_open_request(tmp_path):
    engine = says("a" * 500, pause=0.005)
    async with scripted_service(engine, tmp_path) as service:
        app = create_app(service)
        client = app.test_client()
        whole = asyncio.ensure_future(client.post(CHAT, json={"messages": HI}))
        streamed = asyncio.ensure_future(client.post(CHAT, json={"messages": HI, "stream": True}))
        await asyncio.sleep(0.05)
        engine.fail(RuntimeError("device lost"))
        response = await whole
        assert response.status_code == 500
        assert (await response.get_json())["error"]["type"] == "server_error"
        *_, last, done, rest = (await (await streamed).get_data(as_text=True)).split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "device lost" in error["message"]
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200
        response = await client.post(CHAT, json={"messages": HI})
        assert response.status_code == 503
        assert (await response.get_json())["error"]["code"] == "engine_dead"
        metrics = await (await client.get("/metrics")).get_data(as_text=True)
        assert 'status="error"} 2' in metrics
        assert "glm_engine_up 0" in metrics


async def test_draining_turns_new_requests_away_and_finishes_the_others(tmp_path):
    async with scripted_service(says("</think>abcdef", pause=0.005), tmp_path) as service:
        app = create_app(service)
        client = app.test_client()
        assert (await client.get("/readyz")).status_code == 200
        running = asyncio.ensure_future(post(app, CHAT, {"messages": HI}))
        await asyncio.sleep(0.01)
        service.bridge.stop()
        for probe in ("/readyz", "/health"):
            assert (await client.get(probe)).status_code == 503
        response = await client.post(CHAT, json={"messages": HI})
        assert response.status_code == 503
        assert "retry-after" in response.headers
        error = (await response.get_json())["error"]
        assert (error["type"], error["code"]) == (
            "service_unavailable_error",
            "server_shutting_down",
        )
        assert (await running)["choices"][0]["message"]["content"] == "abcdef"


async def test_metrics_show_what_was_served(tmp_path):
    async with scripted_service(says("abc"), tmp_path) as service:
        app = create_app(service)
        await post(app, COMPLETIONS, {"prompt": "Hi"})
        await app.test_client().post(COMPLETIONS, json={})
        response = await app.test_client().get("/metrics")
        text = await response.get_data(as_text=True)
        for line in (
            'glm_request_total{endpoint="/v1/completions",status="stop"} 1.0',
            'glm_request_total{endpoint="/v1/completions",status="rejected"} 1.0',
            "glm_kv_pages_used 0.0",
            "glm_queue_depth 0.0",
            "glm_active_requests 0.0",
            "glm_prompt_tokens_total 2.0",
            "glm_generation_tokens_total 4.0",
        ):
            assert line in text
        for name in ("glm_tokens_per_second", "glm_latency_avg_ms", "glm_ttft_avg_ms"):
            assert f"\n{name} " in text
