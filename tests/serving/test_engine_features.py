"""What the engine can do, as clients see it: cached tokens, priorities, a time to begin in."""

import asyncio
import time

import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.shapes import StepShapes
from serving.admission import Limits
from serving.app import create_app
from tests.serving.scripted import TOKENIZER, scripted_service
from tests.serving.test_app import CHAT, COMPLETIONS, post, stream

SHAPES = StepShapes(
    num_slots=1,
    num_pages=64,
    page_size=8,
    max_seq_len=256,
    prefill_tile=8,
    prefill_buckets=(32,),
    decode_buckets=(1,),
    vocab_size=TOKENIZER.size,
)
PATIENT = Limits(max_seq_len=256, max_prompt_tokens=200, max_new_tokens=50)
HASTY = Limits(max_seq_len=256, max_prompt_tokens=200, max_new_tokens=50, max_queue_seconds=0.05)
PROMPT = list(range(40, 70))


def mock_engine(seconds_per_step: float = 0.0) -> Engine:
    text = range(min(TOKENIZER.control_tokens.values()))
    runner = MockRunner(SHAPES, TOKENIZER.size, seconds_per_step=seconds_per_step, tokens=text)
    return Engine(runner, SHAPES, max_queue=8, integrity_interval=1)


async def test_the_tokens_found_in_the_cache_are_told(tmp_path):
    async with scripted_service(mock_engine(), tmp_path, limits=PATIENT) as service:
        app = create_app(service)
        body = {"prompt": PROMPT, "max_tokens": 5, "seed": 1, "temperature": 0}
        answers = [await post(app, COMPLETIONS, body) for _ in range(2)]
        cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
        assert cached == [0, 24]
        assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
        salted = await post(app, COMPLETIONS, {**body, "cache_salt": "other"})
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        streamed = await stream(
            app, COMPLETIONS, {**body, "stream_options": {"include_usage": True}}
        )
        assert streamed[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 24


async def test_the_next_turn_of_a_chat_finds_the_turns_before_in_the_cache(tmp_path):
    async with scripted_service(mock_engine(), tmp_path, limits=PATIENT) as service:
        app = create_app(service)
        messages = [{"role": "user", "content": "a" * 30}]
        body = {"messages": messages, "max_tokens": 20, "reasoning_effort": "none"}
        first = await post(app, CHAT, body)
        messages += [first["choices"][0]["message"], {"role": "user", "content": "and then?"}]
        second = await post(app, CHAT, {**body, "messages": messages})
        usage = second["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 24
        assert usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


async def test_the_lower_priority_number_is_served_first(tmp_path):
    async with scripted_service(mock_engine(0.002), tmp_path, limits=PATIENT) as service:
        app = create_app(service)
        ends: list[int] = []

        async def ask(priority: int) -> None:
            await post(app, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 9, "priority": priority})
            ends.append(priority)

        async with asyncio.TaskGroup() as group:
            for priority in (5, 3, 4):
                group.create_task(ask(priority))
                await asyncio.sleep(0.004)
        assert ends == [3, 4, 5]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_request_that_waits_too_long_is_told_so(tmp_path, is_stream: bool):
    async with scripted_service(mock_engine(0.01), tmp_path, limits=HASTY) as service:
        app = create_app(service)
        body = {"prompt": PROMPT, "max_tokens": 40}
        first = asyncio.ensure_future(post(app, COMPLETIONS, body))
        await asyncio.sleep(0.02)
        start = time.monotonic()
        response = await app.test_client().post(COMPLETIONS, json={**body, "stream": is_stream})
        text = await response.get_data(as_text=True)
        assert "queue_timeout" in text and "did not begin" in text
        assert time.monotonic() - start < 0.25
        if not is_stream:
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
        assert (await first)["usage"]["completion_tokens"] == 40
