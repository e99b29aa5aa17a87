"""The bundled model, served by a real process and asked by real clients."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import openai
import pytest

from tests.serving.bench_runs import assert_agrees, run_of
from tests.serving.live import (
    Process,
    body,
    client_of,
    launched,
    metric,
    stream_text,
    wait_until_ready,
)
from tests.serving.schemas import random_schema

NANO = Path(__file__).parents[2] / "checkpoints" / "nano"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
COMPILING = 300  # seconds; a machine that has run the tests before needs a few

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with launched(NANO, "--num-gpus", "1") as process:
        wait_until_ready(process, COMPILING)
        yield process


def chat_fields(**fields) -> dict:
    return {"model": "nano", "messages": FRANCE, "temperature": 0, "max_tokens": 80, **fields}


@pytest.mark.parametrize("thinking", [True, False])
def test_the_openai_client_gets_the_same_whole_and_streamed(server: Process, thinking: bool):
    fields = chat_fields(extra_body={"chat_template_kwargs": {"enable_thinking": thinking}})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        message = client.chat.completions.create(**fields).choices[0].message
        content, reasoning = "", ""
        for event in client.chat.completions.create(**fields, stream=True):
            delta = event.choices[0].delta
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
    assert content == message.content
    assert reasoning == (getattr(message, "reasoning_content", None) or "")
    assert bool(reasoning) == thinking
    assert "Paris" in content


async def test_the_async_openai_client_gets_the_same_whole_and_streamed(server: Process):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        message = (await client.chat.completions.create(**chat_fields())).choices[0].message
        events = await client.chat.completions.create(**chat_fields(stream=True))
        content = "".join([event.choices[0].delta.content or "" async for event in events])
    assert content == message.content


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 11}])
async def test_64_clients_of_which_half_hang_up_leave_the_others_as_if_alone(
    server: Process, fields: dict
):
    prompts = [f"{n} + {n % 7} =" for n in range(64)]
    async with client_of(server) as client:
        texts = await asyncio.gather(
            *(
                stream_text(client, prompt, leave_after=4 if n % 2 else 10**9, **fields)
                for n, prompt in enumerate(prompts)
            )
        )
        for n in (0, 2, 30, 62):
            assert texts[n] == await stream_text(client, prompts[n], **fields)
        again = [stream_text(client, prompt, **fields) for prompt in prompts[::2]]
        assert texts[::2] == await asyncio.gather(*again)
    assert len(set(texts[::2])) > 8
    deadline = time.monotonic() + 5
    while metric(server, "glm_kv_pages_used") and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert metric(server, "glm_kv_pages_used") == 0
    assert metric(server, "glm_active_requests") == 0


async def test_a_conversation_too_long_is_refused_and_the_next_one_answered(server: Process):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        long = [{"role": "user", "content": "again and again " * 3000}]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**chat_fields(messages=long))
        assert refused.value.code == "context_length_exceeded"
        answer = await client.chat.completions.create(**chat_fields())
    assert answer.choices[0].message.content


async def check_schemas(server: Process, seeds: range) -> int:
    """Asks for answers of random schemas; returns how many were finished. All of them must fit."""
    asking = asyncio.Semaphore(16)

    async def ask(seed: int) -> bool:
        schema = random_schema(seed)
        described = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        question = [{"role": "user", "content": f"Tell me about number {seed}, as JSON."}]
        fields = {"messages": question, "response_format": described, "max_tokens": 300}
        fields |= {"reasoning_effort": "none", "temperature": 1, "seed": seed}
        async with asking:
            answer = await client.post("/v1/chat/completions", json=fields)
        assert answer.status_code == 200, answer.text
        [choice] = answer.json()["choices"]
        if choice["finish_reason"] != "stop":
            return False
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
        return True

    async with client_of(server) as client:
        return sum(await asyncio.gather(*map(ask, seeds)))


async def test_answers_of_random_schemas_validate(server: Process):
    assert await check_schemas(server, range(8)) >= 6


@pytest.mark.perf
async def test_answers_of_two_hundred_random_schemas_validate(server: Process):
    finished = await check_schemas(server, range(200))
    print(f"{finished} of 200 answers were finished, and all of these validate")
    assert finished >= 150


async def test_a_long_prompt_is_answered_in_chunks_like_a_short_one(server: Process):
    prompt = "The capital of France is Paris. " * 120  # more tokens than one prefill step takes
    async with client_of(server) as client:
        alone = await stream_text(client, prompt)
        texts = await asyncio.gather(*(stream_text(client, prompt) for _ in range(3)))
        response = await client.post("/v1/completions", json=body(prompt))
    assert response.json()["usage"]["prompt_tokens"] > 512
    assert set(texts) == {alone} == {response.json()["choices"][0]["text"]}


def test_the_benchmark_and_the_servers_metrics_agree(server: Process, tmp_path):
    # Prompts that queue up for their prefill: a first token takes so long that what sockets and a
    # busy machine add is little.
    flags = "--concurrency 8 --prompt-len 900 --output-len 6 --num-requests 16 --duration 60 --warm-up 0"
    (got,) = run_of(server.url, tmp_path, *flags.split(), "--tokenizer", str(NANO))
    assert_agrees(got, ttft_within=0.05)
    assert (got["input_tokens"], got["output_tokens"]) == (16 * 900, 16 * 6)


async def test_sigterm_lets_running_answers_finish_and_exits_0():
    with launched(NANO, "--num-gpus", "1") as process:
        wait_until_ready(process, COMPILING)
        async with client_of(process) as client:
            alone = await stream_text(client, "Hello", max_tokens=300, ignore_eos=True)
            running = [
                asyncio.ensure_future(stream_text(client, "Hello", max_tokens=300, ignore_eos=True))
                for _ in range(8)
            ]
            while metric(process, "glm_active_requests") < 8:
                await asyncio.sleep(0.01)
            process.signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            refused = await client.post("/v1/completions", json=body("late"))
            assert refused.status_code == 503
            assert await asyncio.gather(*running) == [alone] * 8
        code, log = await asyncio.to_thread(process.wait)
    assert code == 0, log
