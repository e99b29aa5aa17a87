"""Several answers, log-probabilities, penalties and what else a request may say of its sampling."""

import asyncio
import json
from typing import Any

import pytest
from quart import Quart

from glm_jax.engine.request import Request
from serving.app import create_app
from tests.serving.scripted import END, ScriptedEngine, scripted_service, tokens

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}


def numbering() -> ScriptedEngine:
    """Says, to each request, which one it is; the later ones are longer."""
    count = iter(range(100))

    def script(request: Request) -> list[int]:
        number = next(count)
        return [*tokens(f"{number}" * (number + 1)), END]

    return ScriptedEngine(script, pause=0.001)


def says(text: str) -> ScriptedEngine:
    return ScriptedEngine(lambda request: [*tokens(text), END])


async def post(app: Quart, path: str, body: dict[str, Any], status: int = 200) -> Any:
    response = await app.test_client().post(path, json=body)
    assert response.status_code == status, await response.get_data()
    return await response.get_json()


async def stream(app: Quart, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await app.test_client().post(path, json={**body, "stream": True})
    text = await response.get_data(as_text=True)
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_every_prompt_gets_its_choices_in_order(tmp_path):
    async with scripted_service(numbering(), tmp_path) as service:
        app = create_app(service)
        body = {"prompt": ["a", [1, 2], "c"], "n": 2}
        answer = await post(app, COMPLETIONS, body)
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == [str(i) * (i + 1) for i in range(6)]
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert answer["usage"]["prompt_tokens"] == 1 + 2 + 1
        assert answer["usage"]["completion_tokens"] == sum(range(1, 7)) + 6


async def test_a_stream_of_several_choices_is_all_of_them(tmp_path):
    async with scripted_service(numbering(), tmp_path) as service:
        body = {"messages": HI, "n": 3, "reasoning_effort": "none"}
        events = await stream(create_app(service), CHAT, body)
        texts, reasons = [""] * 3, [0] * 3
        for event in events:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                reasons[choice["index"]] += choice["finish_reason"] == "stop"
        assert texts == ["0", "11", "222"]
        assert reasons == [1, 1, 1]


async def test_choices_have_seeds_of_their_own_and_the_same_ones_every_time(tmp_path):
    engine = says("a")
    async with scripted_service(engine, tmp_path) as service:
        app = create_app(service)
        for _ in range(2):
            await post(app, COMPLETIONS, {"prompt": "a", "n": 4, "seed": 7})
        seeds = [request.sampling.seed for request in engine.requests]
        assert seeds[:4] == seeds[4:]
        assert len(set(seeds)) == 4
        assert seeds[0] == 7


async def test_all_choices_are_cancelled_together(tmp_path):
    engine = ScriptedEngine(lambda request: tokens("a" * 500), pause=0.005)
    async with scripted_service(engine, tmp_path) as service:
        client = create_app(service).test_client()
        body = json.dumps({"prompt": "a", "n": 3, "stream": True}).encode()
        async with client.request(COMPLETIONS, method="POST") as connection:
            await connection.send(body)
            await connection.send_complete()
            await connection.receive()
            await connection.disconnect()
        await asyncio.sleep(0.05)
        assert sorted(engine.cancelled) == sorted(request.id for request in engine.requests)
        assert service.bridge.num_streams == 0


async def test_a_request_for_which_there_is_no_room_takes_none(tmp_path):
    engine = ScriptedEngine(lambda request: tokens("a" * 50), pause=0.005, max_queue=2)
    async with scripted_service(engine, tmp_path) as service:
        app = create_app(service)
        error = await post(app, COMPLETIONS, {"prompt": "a", "n": 3}, 429)
        assert error["error"]["code"] == "slow_down"
        assert service.bridge.num_streams == 0
        assert len(engine.cancelled) == 2


async def test_the_best_are_the_likeliest_by_the_mean(tmp_path):
    async with scripted_service(numbering(), tmp_path) as service:
        app = create_app(service)
        answer = await post(app, COMPLETIONS, {"prompt": "a", "best_of": 3})
        assert len(answer["choices"]) == 1
        assert answer["usage"]["completion_tokens"] == 1 + 2 + 3 + 3
        body = {"prompt": "a", "best_of": 1, "n": 2}
        assert (await post(app, COMPLETIONS, body, 400))["error"]["param"] == "best_of"
        body = {"prompt": "a", "best_of": 2, "stream": True}
        assert (await post(app, COMPLETIONS, body, 400))["error"]["param"] == "best_of"


@pytest.mark.parametrize("prompt", ["He said: ", tokens("He said: ")])
async def test_an_echo_begins_with_the_prompt(tmp_path, prompt):
    async with scripted_service(says("hello"), tmp_path) as service:
        app = create_app(service)
        body = {"prompt": prompt, "echo": True}
        answer = await post(app, COMPLETIONS, body)
        assert answer["choices"][0]["text"] == "He said: hello"
        events = await stream(app, COMPLETIONS, body)
        assert "".join(e["choices"][0]["text"] for e in events) == "He said: hello"
        answer = await post(app, COMPLETIONS, {**body, "max_tokens": 0})
        assert answer["choices"][0]["text"] == "He said: "
        assert answer["usage"]["completion_tokens"] == 0


async def test_a_completion_tells_how_likely_each_token_was(tmp_path):
    async with scripted_service(says("hello é"), tmp_path) as service:
        app = create_app(service)
        body = {"prompt": "a", "logprobs": 2}
        [choice] = (await post(app, COMPLETIONS, body))["choices"]
        told = choice["logprobs"]
        assert told["tokens"] == ["hello", " ", "bytes:\\xc3", "bytes:\\xa9"]
        assert told["token_logprobs"] == [-0.5] * 4
        assert told["text_offset"] == [0, 5, 6, 6]
        assert told["top_logprobs"][0] == {"hello": -0.5, "x": -1.5}
        streamed: dict[str, list] = {key: [] for key in told}
        for event in await stream(app, COMPLETIONS, body):
            for key, values in (event["choices"][0]["logprobs"] or {}).items():
                streamed[key] += values
        assert streamed == told
        [choice] = (await post(app, COMPLETIONS, {"prompt": "a", "logprobs": 0}))["choices"]
        assert choice["logprobs"]["token_logprobs"] == [-0.5] * 4
        assert choice["logprobs"]["top_logprobs"] == [None] * 4


async def test_an_echo_tells_how_likely_the_prompt_was(tmp_path):
    engine = says("hello é")
    async with scripted_service(engine, tmp_path) as service:
        app = create_app(service)
        prompt = tokens("He said: ")
        body = {"prompt": prompt, "echo": True, "logprobs": 1}
        [choice] = (await post(app, COMPLETIONS, body))["choices"]
        told = choice["logprobs"]
        assert choice["text"] == "He said: hello é"
        assert told["tokens"][:2] == ["H", "e"]
        assert len(told["tokens"]) == len(prompt) + 4
        assert told["token_logprobs"] == [None, *(-token / 4 for token in prompt[1:]), *[-0.5] * 4]
        assert told["top_logprobs"][:2] == [None, {"x": -1.5}]
        assert told["text_offset"][:2] == [0, 1]
        assert told["text_offset"][len(prompt) :] == [9, 14, 15, 15]
        streamed: dict[str, list] = {key: [] for key in told}
        text = ""
        for event in await stream(app, COMPLETIONS, body):
            text += event["choices"][0]["text"]
            for key, values in (event["choices"][0]["logprobs"] or {}).items():
                streamed[key] += values
        assert (text, streamed) == (choice["text"], told)
        for streams in (False, True):
            only = {**body, "max_tokens": 0, "stream": streams}
            if streams:
                event, last = (e["choices"][0] for e in (await stream(app, COMPLETIONS, only))[1:])
                assert last["finish_reason"] == "length"
            else:
                [event] = (await post(app, COMPLETIONS, only))["choices"]
            assert event["logprobs"]["tokens"] == told["tokens"][: len(prompt)]
        assert engine.num_prepared == 4
        await post(app, COMPLETIONS, {"prompt": prompt, "echo": True})
        assert engine.num_prepared == 4


async def test_prompt_logprobs_are_told_by_token_with_ranks(tmp_path):
    async with scripted_service(says("a"), tmp_path) as service:
        app = create_app(service)
        [first, second] = prompt = tokens("Hi")
        own = {"logprob": -second / 4, "rank": 3, "decoded_token": "i"}
        body = {"prompt": [prompt, [first]], "prompt_logprobs": 1, "logprobs": 0}
        choices = (await post(app, COMPLETIONS, body))["choices"]
        likeliest = {"logprob": -1.5, "rank": 1, "decoded_token": "x"}
        x = str(tokens("x")[0])
        told = [None, {str(second): own, x: likeliest}]
        assert [choice["prompt_logprobs"] for choice in choices] == [told, [None]]
        assert choices[0]["logprobs"]["token_logprobs"] == [-0.5]
        assert choices[0]["text"] == "a"
        answer = await post(app, CHAT, {"messages": HI, "prompt_logprobs": 0})
        assert answer["prompt_logprobs"][0] is None
        assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
        assert all(len(entry) == 1 for entry in answer["prompt_logprobs"][1:])
        assert "prompt_logprobs" not in (await post(app, CHAT, {"messages": HI}))


async def test_a_chat_tells_how_likely_each_token_was(tmp_path):
    async with scripted_service(says("ab"), tmp_path) as service:
        app = create_app(service)
        body = {"messages": HI, "reasoning_effort": "none", "logprobs": True, "top_logprobs": 2}
        [choice] = (await post(app, CHAT, body))["choices"]
        first, second = choice["logprobs"]["content"]
        assert first == {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "x", "logprob": -1.5, "bytes": [120]},
            ],
        }
        assert second["token"] == "b"
        events = await stream(app, CHAT, body)
        told = [e["choices"][0]["logprobs"] for e in events]
        assert [entry for t in told if t for entry in t["content"]] == [first, second]


async def test_usage_comes_with_every_event_when_wanted(tmp_path):
    async with scripted_service(says("abc"), tmp_path) as service:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"prompt": "Hi", "stream_options": options}
        events = await stream(create_app(service), COMPLETIONS, body)
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert counts[-1] == 4


async def test_what_ended_an_answer_is_told(tmp_path):
    async with scripted_service(says("one|two"), tmp_path) as service:
        app = create_app(service)
        [choice] = (await post(app, COMPLETIONS, {"prompt": "a", "stop": ["!", "|"]}))["choices"]
        assert (choice["text"], choice["stop_reason"]) == ("one", "|")
        [stop] = tokens("t")
        [choice] = (await post(app, COMPLETIONS, {"prompt": "a", "stop_token_ids": [stop]}))[
            "choices"
        ]
        assert (choice["text"], choice["stop_reason"]) == ("one|", stop)
        [choice] = (await post(app, COMPLETIONS, {"prompt": "a"}))["choices"]
        assert choice["stop_reason"] is None


async def test_what_a_request_says_of_its_sampling_reaches_the_engine(tmp_path):
    engine = says("a")
    async with scripted_service(engine, tmp_path) as service:
        body = {
            "prompt": "a",
            "presence_penalty": 0.5,
            "frequency_penalty": -0.25,
            "repetition_penalty": 1.25,
            "logit_bias": {"5": -100, "7": 2.5},
            "min_tokens": 3,
            "logprobs": 4,
        }
        await post(create_app(service), COMPLETIONS, body)
        sampling = engine.requests[0].sampling
        assert sampling.presence_penalty == 0.5
        assert sampling.frequency_penalty == -0.25
        assert sampling.repetition_penalty == 1.25
        assert dict(sampling.logit_bias) == {5: -100, 7: 2.5}
        assert (sampling.min_tokens, sampling.num_logprobs) == (3, 4)


@pytest.mark.parametrize(
    ("last", "end", "reasoning", "content"),
    [
        ({"content": "The sum is "}, "</think>The sum is ", None, "7.</think>"),
        ({"content": "", "reasoning_content": "2 and"}, "<think>2 and", " 5", "7."),
    ],
)
async def test_a_message_is_continued_where_it_ends(tmp_path, last, end, reasoning, content):
    engine = says(" 5</think>7." if reasoning else "7.</think>")
    async with scripted_service(engine, tmp_path) as service:
        messages = [*HI, {"role": "assistant", **last}]
        answer = await post(create_app(service), CHAT, {"messages": messages, **CONTINUED})
        assert service.tokenizer.decode(engine.requests[0].prompt).endswith(end)
        message = answer["choices"][0]["message"]
        assert message["reasoning"] == reasoning
        assert message["content"] == content.removesuffix("</think>")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"n": 1000}, "n"),
        (CHAT, {"presence_penalty": 3}, "presence_penalty"),
        (CHAT, {"frequency_penalty": "much"}, "frequency_penalty"),
        (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
        (CHAT, {"logit_bias": {"a": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias[1]"),
        (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"99999": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": 5}, "logprobs"),
        (CHAT, {"min_tokens": -1}, "min_tokens"),
        (CHAT, {"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
        (CHAT, {"thinking_token_budget": -1}, "thinking_token_budget"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 65}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(tmp_path, path, fields, param):
    async with scripted_service(says("a"), tmp_path) as service:
        base: dict[str, Any] = {"messages": HI} if path == CHAT else {"prompt": "a"}
        error = (await post(create_app(service), path, {**base, **fields}, 400))["error"]
        assert error["param"] == param, error
