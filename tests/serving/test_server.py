"""The whole process: real sockets, real clients, signals, exit codes. Only the model is missing."""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving.live import (
    ROOT,
    Process,
    body,
    client_of,
    free_port,
    launched,
    metric,
    stream_text,
    wait_until_ready,
)
from tests.serving.model_dir import write_model_dir

OTHER_ENGINE = """
import sys
import time
from serving.__main__ import main
from serving import wiring
from glm_jax.engine.engine import Engine
from serving.bridge import CannotStartError
from serving.wiring import mock_engine, mock_shapes

class Dying:
    def __init__(self, runner, lives):
        self.runner, self.lives = runner, lives
    def dispatch(self, phase, batch):
        self.lives -= 1
        if self.lives < 0:
            raise RuntimeError("device lost")
        return self.runner.dispatch(phase, batch)
    def control(self, controls):
        self.runner.control(controls)

def build(options, tokenizer, report, rate):
    if sys.argv[1] == "slow":
        time.sleep(60)
    if sys.argv[1] == "0":
        raise CannotStartError("the checkpoint is truncated")
    engine = mock_engine(options, tokenizer, report, rate=rate)
    return Engine(Dying(engine._runner, int(sys.argv[1])), mock_shapes(options, tokenizer.size), 8)

wiring.mock_engine = build
main(sys.argv[2:])
"""


@contextmanager
def served(
    model_dir: Path, *flags: str, program: tuple[str, ...] = ("-m", "serving"), tls: bool = False
) -> Iterator[Process]:
    """A server without a model."""
    write_model_dir(model_dir)
    scheme = "https" if tls else "http"
    with launched(model_dir, "--mock", *flags, program=program, scheme=scheme) as process:
        yield process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with served(tmp_path_factory.mktemp("model") / "tiny", "--mock-rate", "1000") as process:
        wait_until_ready(process)
        yield process


def test_the_openai_client_works_unchanged(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        completion = client.completions.create(**body("Hi", model="tiny"))
        pieces = client.completions.create(**body("Hi", model="tiny", stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 40
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            reasoning_effort="none",
            temperature=0,
            max_completion_tokens=10,
        )
        assert chat.choices[0].finish_reason == "length"
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="Hi")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(**body("Hi", model="tiny"), n=0)
        assert bad.value.param == "n"


async def test_the_async_openai_client_streams_what_it_gets_whole(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        messages = [{"role": "user", "content": "Hi"}]
        fields: dict[str, Any] = {
            "model": "tiny",
            "messages": messages,
            "temperature": 0,
            "max_tokens": 20,
        }
        fields["reasoning_effort"] = "none"
        whole = await client.chat.completions.create(**fields)
        events = await client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
        text, reasons, usage = "", [], None
        async for event in events:
            usage = event.usage
            for choice in event.choices:
                text += choice.delta.content or ""
                reasons += [choice.finish_reason] if choice.finish_reason else []
        assert text == whole.choices[0].message.content
        assert reasons == ["length"]
        assert usage == whole.usage


async def test_64_streams_at_once_say_what_each_says_alone_though_half_of_them_leave(server):
    prompts = [f"prompt number {i}" for i in range(64)]
    async with client_of(server) as client:
        alone = [await stream_text(client, prompt) for prompt in prompts[:4]]
        texts = await asyncio.gather(
            *(
                stream_text(client, prompt, leave_after=3 if i % 2 else 10**9)
                for i, prompt in enumerate(prompts)
            )
        )
        assert texts[0] == alone[0]
        assert texts[2] == alone[2]
        assert [text for i, text in enumerate(texts) if i % 2 == 0] == [
            await stream_text(client, prompt) for prompt in prompts[::2]
        ]
    deadline = time.monotonic() + 2
    while metric(server, "glm_kv_pages_used") and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert metric(server, "glm_kv_pages_used") == 0
    assert metric(server, "glm_active_requests") == 0


async def test_a_connection_that_closes_frees_its_pages_within_a_few_steps(server):
    async with client_of(server) as client:
        text = await stream_text(client, "leaving", leave_after=2)
        assert text
        started = time.monotonic()
        while metric(server, "glm_active_requests"):
            assert time.monotonic() - started < 1
            await asyncio.sleep(0.005)


async def test_a_client_that_hangs_up_on_a_whole_answer_cancels_it(server):
    async with client_of(server) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/completions", json=body("x", max_tokens=2000), timeout=0.2)
        await asyncio.sleep(0.3)
        assert metric(server, "glm_active_requests") == 0


async def test_bad_bytes_on_the_wire_harm_nobody_else(server):
    async with client_of(server) as client:
        good = asyncio.ensure_future(stream_text(client, "good"))
        for junk in (
            b"\x00\xff\x00\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\n",
            b"GET / HTTP/9\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection(*server.url[7:].split(":"))
            writer.write(junk)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        assert len(await good) > 0
        assert (await client.get("/healthz")).status_code == 200


async def test_a_reader_that_stalls_holds_up_nobody(server):
    host, port = server.url[7:].split(":")
    payload = json.dumps(body("stall", stream=True, max_tokens=2000)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(payload)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall(head.encode() + payload)
        async with client_of(server) as client:
            texts = await asyncio.gather(*(stream_text(client, f"p{i}") for i in range(8)))
            assert all(texts)


async def test_a_head_that_drips_in_is_cut_off_and_holds_nobody_up(tmp_path):
    with served(tmp_path / "tiny", "--mock-rate", "1000", "--header-timeout", "1") as process:
        wait_until_ready(process)
        host, port = process.url.removeprefix("http://").split(":")
        connections = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        started = time.monotonic()
        for _, writer in connections:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")

        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
            """A letter now and then until the server has enough; how long that took."""
            with suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"a")
                    await writer.drain()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(), 0.1)
            writer.close()
            return time.monotonic() - started

        dripping = [asyncio.create_task(drip(*connection)) for connection in connections]
        async with client_of(process) as client:
            assert await stream_text(client, "meanwhile")
            times = await asyncio.wait_for(asyncio.gather(*dripping), 60)
            assert min(times) > 0.9
            assert await stream_text(client, "afterwards")


async def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0(tmp_path):
    with served(tmp_path / "tiny", "--mock-rate", "50") as process:
        wait_until_ready(process)
        async with client_of(process) as client:
            running = [asyncio.ensure_future(stream_text(client, f"p{i}")) for i in range(8)]
            await asyncio.sleep(0.3)
            process.signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            refused = await client.post("/v1/completions", json=body("late"))
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert (await client.get("/readyz")).status_code == 503
            texts = await asyncio.gather(*running)
            again = {len(text) > 0 for text in texts}
            assert again == {True}
        code, log = await asyncio.to_thread(process.wait)
        assert code == 0, log
        assert "all requests have finished" in log


async def test_a_second_signal_ends_the_process_at_once(tmp_path):
    with served(tmp_path / "tiny", "--mock-rate", "1") as process:
        wait_until_ready(process)
        async with client_of(process) as client:
            running = asyncio.ensure_future(stream_text(client, "long"))
            await asyncio.sleep(0.2)
            process.signal(signal.SIGINT)
            await asyncio.sleep(0.2)
            process.signal(signal.SIGINT)
            with pytest.raises(httpx.HTTPError):
                await running
        code, _ = await asyncio.to_thread(process.wait)
        assert code == 128 + signal.SIGINT


async def test_an_engine_that_dies_ends_its_streams_with_an_error_and_the_process_with_1(tmp_path):
    program = ("-c", OTHER_ENGINE, "10")
    with served(tmp_path / "tiny", program=program) as process:
        wait_until_ready(process)
        async with client_of(process) as client:
            request = client.stream("POST", "/v1/completions", json=body("x", stream=True))
            async with request as response:
                lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert "device lost" in error["message"]
        code, log = await asyncio.to_thread(process.wait)
        assert code == 1
        assert "device lost" in log


def test_a_model_that_cannot_be_loaded_ends_the_process_with_1(tmp_path):
    with served(tmp_path / "tiny", program=("-c", OTHER_ENGINE, "0")) as process:
        code, log = process.wait()
        assert code == 1
        assert "the checkpoint is truncated" in log
        assert "Traceback" not in log


async def test_while_the_model_loads_the_server_says_so_and_can_be_ended(tmp_path):
    with served(tmp_path / "tiny", program=("-c", OTHER_ENGINE, "slow")) as process:
        async with client_of(process) as client:
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/readyz")).json() == {"status": "starting"}
            refused = await client.post("/v1/completions", json=body("early"))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "server_starting"
            assert "glm_engine_up 0" in (await client.get("/metrics")).text
        process.signal(signal.SIGTERM)
        code, _ = await asyncio.to_thread(process.wait)
        assert code == 0


@pytest.mark.parametrize(
    ("flags", "fits", "exceeds"),
    [
        ((), 2048, 2049),
        (("--max-seq-len", "8192"), 8000, 8192),
        (("--max-seq-len", "8192", "--max-prompt-tokens", "3000"), 3000, 3001),
    ],
)
def test_a_longer_conversation_needs_one_flag(tmp_path, flags, fits, exceeds):
    with served(tmp_path / "tiny", "--mock-rate", "0", *flags) as process:
        wait_until_ready(process)
        for tokens, status in ((fits, 200), (exceeds, 400)):
            answer = httpx.post(
                f"{process.url}/v1/completions", json={"prompt": [5] * tokens, "max_tokens": 1}
            )
            assert answer.status_code == status, answer.text


def test_https_works_with_a_certificate(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key),
         "-out", str(certificate)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    flags = ("--tls-cert", str(certificate), "--tls-key", str(key), "--mock-rate", "500")
    with served(tmp_path / "tiny", *flags, tls=True) as process:
        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=process.url, verify=context) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.02)
            answer = client.post("/v1/completions", json=body("Hi"))
            assert answer.json()["choices"][0]["finish_reason"] == "length"
            with client.stream("POST", "/v1/completions", json=body("Hi", stream=True)) as events:
                assert list(events.iter_lines())[-2] == "data: [DONE]"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model-dir", "/nowhere"], "/nowhere/tokenizer.json does not exist"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--port", "0"], "1<=x<=65535"),
        (["--tls-cert", __file__], "go together"),
        (["--tls-cert", __file__, "--tls-key", __file__], "cannot listen"),
        (["--max-concurrency", "many"], "not a valid integer"),
        (["--api-key-file", os.devnull], f"{os.devnull} holds no key"),
        (["--api-key", " "], "--api-key holds no key"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path, flags, words):
    write_model_dir(tmp_path)
    command = [sys.executable, "-m", "serving", "serve", "--mock", "--port", str(free_port())]
    done = subprocess.run(
        [*command, "--model-dir", str(tmp_path), *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(server, tmp_path):
    write_model_dir(tmp_path)
    port = server.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "serving", "serve", "--mock", "--host", "127.0.0.1", "--port", port,
         "--model-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "ddress already in use" in done.stderr


def test_every_flag_has_its_environment_variable_and_default():
    environment = {"PATH": os.environ["PATH"], "COLUMNS": "200"}
    help_ = subprocess.run(
        [sys.executable, "-m", "serving", "serve", "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = " ".join(help_.split())
    for flag, variable, default in (
        ("model-dir", "MODEL_DIR", "./model, else the bundled nano"),
        ("host", "HOST", "0.0.0.0"),
        ("port", "PORT", "5000"),
        ("max-concurrency", "MAX_CONCURRENCY", "64"),
        ("max-batch-tokens", "MAX_BATCH_TOKENS", "32768"),
        ("max-seq-len", "MAX_SEQ_LEN", "4096"),
        ("max-new-tokens", "MAX_NEW_TOKENS", "2048"),
        ("max-prompt-tokens", "MAX_PROMPT_TOKENS", "2048"),
        ("num-gpus", "NUM_GPUS", "8"),
        ("log-level", "LOG_LEVEL", "INFO"),
        ("queue-size", "QUEUE_SIZE", "256"),
    ):
        found = re.search(rf"--{flag} .*?\[env var: (\w+); default: ([^;\]]*)", words)
        assert found, flag
        assert found.groups() == (variable, default)
    assert re.search(r"--engine [^[]*\[env var: ENGINE_PATH\]", words)
