"""The benchmark against servers: ones that misbehave in every way, and ours, whose counts it must meet."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from serving.bench.client import Sample, Target, ask, connected
from tests.serving.bench_runs import assert_agrees, bench, run_of
from tests.serving.live import ROOT, launched, wait_until_ready
from tests.serving.model_dir import write_model_dir

NANO = ROOT / "checkpoints" / "nano"

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
PIECE = b'data: {"choices": [{"index": 0, "text": "hi"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"
ROLE = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'
THOUGHT = b'data: {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}\n\n'
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def says(*parts: bytes | float) -> Answer:
    """Writes the bytes, sleeps the seconds, and hangs up."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            else:
                await asyncio.sleep(part)

    return answer


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """A server that does just this with whatever it is asked."""
    handlers: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if b"content-length" in line]
            await reader.readexactly(int(length[0].split(b":")[1]) if length else 0)
            await answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    listening.close()
    for handler in handlers:
        if handler is not None:
            handler.cancel()
    await listening.wait_closed()


async def asked(answer: Answer, **limits: Any) -> Sample:
    async with server(answer) as url:
        target = Target(url=url, path="/v1/completions", model="m", **limits)
        async with connected(target) as session:
            return await ask(session, target, {"prompt": "x"})


async def test_an_answer_is_timed_piece_by_piece():
    got = await asked(says(HEAD, ROLE, 0.1, THOUGHT, 0.05, PIECE + PIECE, USAGE + DONE))
    assert got.error is None, got.detail
    assert (got.prompt_tokens, got.completion_tokens) == (3, 2)
    assert len(got.piece_times) == 3  # the role alone is no piece
    assert 0.1 < got.piece_times[0] - got.sent_at < 0.3
    assert got.piece_times[1] == got.piece_times[2] == got.last_at


@pytest.mark.parametrize(
    ("answer", "kind", "detail"),
    [
        (says(REFUSAL), "http 503", "busy"),
        (says(), "disconnected", ""),
        (says(HEAD, PIECE), "disconnected", "before [DONE]"),
        (says(HEAD, PIECE, DONE), "no usage", ""),
        (says(HEAD, USAGE, DONE), "empty", "2 tokens"),
        (says(HEAD, PIECE, b'data: {"error": {"message": "died"}}\n\n', DONE), "error event", "died"),
        (says(HEAD, b"data: <html>\n\n", DONE), "malformed", "html"),
        (says(HEAD, b"data: 7\n\n", DONE), "malformed", "7"),
        (says(HEAD, b'data: {"usage": {"tokens": 1}}\n\n', DONE), "no usage", "tokens"),
        (says(b"\x00\x01 not HTTP\r\n\r\n"), "disconnected", ""),
    ],
)  # fmt: skip
async def test_every_way_to_fail_has_its_name(answer, kind, detail):
    got = await asked(answer)
    assert got.error == kind
    assert detail in got.detail
    assert got.ended_at > got.sent_at


async def test_a_stalled_stream_is_left_after_the_stall_timeout():
    got = await asked(says(HEAD, PIECE, 20.0), stall_timeout=0.2)
    assert got.error == "stalled"
    assert got.ended_at - got.sent_at < 2


async def test_a_server_that_only_keeps_the_line_open_is_left_in_the_end():
    got = await asked(says(HEAD, *([b": keep-alive\n\n", 0.05] * 100)), timeout=0.4)
    assert got.error == "timeout"
    assert got.ended_at - got.sent_at < 2


async def test_nobody_there_is_refused():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        target = Target(url=url, path="/v1/completions", model="m")
        async with connected(target) as session:
            assert (await ask(session, target, {"prompt": "x"})).error == "refused"


@contextmanager
def in_thread(answer: Answer) -> Iterator[str]:
    """A misbehaving server beside a test that blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    serving = server(answer)
    yield asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result(10)
    asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


FEW = ("--model", "m", "--concurrency", "4", "--warm-up", "0", "--duration", "1")


def test_some_answers_that_fail_are_exit_code_one(tmp_path):
    turns = iter(range(10**9))
    good, bad = says(HEAD, PIECE, 0.02, PIECE, USAGE, DONE), says(HEAD, PIECE)

    async def answer(writer: asyncio.StreamWriter) -> None:
        await (bad if next(turns) % 5 == 0 else good)(writer)

    with in_thread(answer) as url:
        (got,) = run_of(url, tmp_path, *FEW, expected=1)
    assert got["completed"] > 10
    assert got["errors"] == {"disconnected": got["requests"] - got["completed"]}
    assert got["output_tokens"] == 2 * got["completed"]
    assert got["server"] is None


def test_a_server_that_stalls_makes_a_report_and_no_hang(tmp_path):
    began = time.monotonic()
    with in_thread(says(HEAD, PIECE, 20.0)) as url:
        (got,) = run_of(url, tmp_path, *FEW, "--stall-timeout", "0.5", expected=1)
    assert time.monotonic() - began < 15
    assert got["completed"] == 0
    assert set(got["errors"]) == {"stalled"}


@pytest.fixture(scope="module")
def mock_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model") / "tiny")


def test_a_server_that_dies_is_exit_code_three_with_what_there_was(tmp_path, mock_dir):
    result = tmp_path / "result.json"
    with launched(mock_dir, "--mock", "--mock-rate", "100") as process:
        wait_until_ready(process)
        flags = ("--duration", "60", "--concurrency", "8", "--output-len", "20")
        flags += ("--tokenizer", str(mock_dir))
        command = bench(process.url, result, *flags)
        measuring = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
        time.sleep(6)
        process.signal(signal.SIGKILL)
        shown, _ = measuring.communicate(timeout=20)
    assert measuring.returncode == 3, shown
    (got,) = json.loads(result.read_text())["runs"]
    assert "no connections" in got["given_up"]
    assert got["completed"] > 0
    assert got["errors"]
    assert got["requests"] == got["completed"] + sum(got["errors"].values())
    assert "given up" in shown


def test_ctrl_c_reports_what_there_was(tmp_path, mock_dir):
    result = tmp_path / "result.json"
    with launched(mock_dir, "--mock", "--mock-rate", "100") as process:
        wait_until_ready(process)
        flags = ("--duration", "60", "--concurrency", "8,16", "--output-len", "50")
        flags += ("--tokenizer", str(mock_dir))
        measuring = subprocess.Popen(bench(process.url, result, *flags), cwd=ROOT)
        time.sleep(6)
        os.kill(measuring.pid, signal.SIGINT)
        assert measuring.wait(20) == 130
    (got,) = json.loads(result.read_text())["runs"]
    assert got["completed"] > 0
    assert got["errors"] == {"unfinished": 8}


ASCII_LENGTHS = (
    "--concurrency",
    "4",
    "--prompt-len",
    "20",
    "--output-len",
    "12",
    "--duration",
    "4",
)


def test_the_benchmark_and_the_servers_metrics_agree(tmp_path):
    # A slow mock: what the sockets add is within the tolerance even on a busy machine. nano's
    # vocabulary: hardly a token is a part of a character, of which no client can see the first.
    with launched(NANO, "--mock", "--mock-rate", "8") as process:
        wait_until_ready(process)
        (got,) = run_of(process.url, tmp_path, *ASCII_LENGTHS, "--tokenizer", str(NANO))
    assert_agrees(got, ttft_within=0.05)
    assert got["input_tokens"] == 20 * got["completed"]
    assert got["output_tokens"] == 12 * got["completed"]
    assert got["tpot_ms"]["median"] == pytest.approx(125, rel=0.1)


def test_every_kind_of_load_runs_against_our_server(tmp_path, mock_dir):
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "none"},
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    chart = tmp_path / "sweep.svg"
    few = ("--duration", "0.5", "--output-len", "10", "--prompt-len", "16")
    few += ("--tokenizer", str(mock_dir))
    with launched(mock_dir, "--mock", "--mock-rate", "200") as process:
        wait_until_ready(process)
        got = run_of(process.url, tmp_path, *few, "--concurrency", "1,4", "--plot", str(chart))
        assert [run["concurrency"] for run in got] == [1, 4]
        assert got[0]["output_throughput"] < got[1]["output_throughput"]
        assert b"<svg" in chart.read_bytes()
        got = run_of(process.url, tmp_path, *few, "--request-rate", "20", "--goodput", "ttft:5000")
        assert got[0]["goodput"] == pytest.approx(got[0]["request_throughput"])
        assert got[0]["server"]["output_tokens"] == got[0]["output_tokens"]
        flags = ("--dataset", "file", "--file", str(path))
        got = run_of(process.url, tmp_path, *few, *flags)
        assert got[0]["completed"] > 0
        flags = ("--dataset", "shared-prefix", "--prefix-len", "8", "--num-prefixes", "2")
        got = run_of(process.url, tmp_path, *few, *flags)
        assert got[0]["input_tokens"] == 16 * got[0]["completed"]


def test_a_server_is_started_for_a_model_directory_and_ended(tmp_path, mock_dir):
    flags = ("--model-dir", str(mock_dir), "--serve-flags", "--mock --mock-rate 200")
    few = ("--duration", "0.5", "--output-len", "5", "--concurrency", "2")
    (got,) = run_of("http://127.0.0.1:9", tmp_path, *flags, *few)
    assert got["completed"] > 0
    done = subprocess.run(
        bench("http://127.0.0.1:9", tmp_path / "x", *flags[:2], "--serve-flags", "--no-such-flag"),
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert "No such option" in done.stderr
