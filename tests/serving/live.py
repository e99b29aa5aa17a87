"""A server in a process of its own, and clients for it: for tests over real sockets.

Knows neither what the server runs nor what is asked of it.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]


class Process:
    """A running server.

    Attributes:
      url: of the server, without the endpoint.
    """

    def __init__(self, popen: subprocess.Popen[str], url: str) -> None:
        self.popen = popen
        self.url = url

    def signal(self, number: int) -> None:
        os.kill(self.popen.pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit code and log."""
        _, log = self.popen.communicate(timeout=20)
        return self.popen.returncode, log


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def launched(
    model_dir: Path, *flags: str, program: tuple[str, ...] = ("-m", "serving"), scheme: str = "http"
) -> Iterator[Process]:
    """A server on a free port that takes connections; it may not be ready yet."""
    port = free_port()
    popen = subprocess.Popen(
        [sys.executable, *program, "serve", "--host", "127.0.0.1",
         "--model-dir", str(model_dir), *flags],
        cwd=ROOT,
        env={**os.environ, "PORT": str(port), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        for _ in range(2400):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                assert popen.poll() is None, popen.communicate()[1]
                time.sleep(0.05)
        yield Process(popen, f"{scheme}://127.0.0.1:{port}")
    finally:
        popen.kill()
        popen.communicate()


def wait_until_ready(process: Process, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        # A machine that compiles has no time for the question; the deadline is what counts.
        with suppress(httpx.ReadTimeout):
            if httpx.get(f"{process.url}/readyz").status_code == 200:
                return
        assert process.popen.poll() is None, process.popen.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("the server does not get ready")


def metric(process: Process, name: str) -> float:
    text = httpx.get(f"{process.url}/metrics").text
    return float(re.findall(rf"^{re.escape(name)} (\S+)$", text, re.M)[0])


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    """A completion request, greedy and of 40 tokens unless told otherwise."""
    return {"prompt": prompt, "max_tokens": 40, "temperature": 0, **fields}


async def stream_text(
    client: httpx.AsyncClient, prompt: str, leave_after: int = 10**9, **fields: Any
) -> str:
    """Text of a streamed completion, up to so many events."""
    text = ""
    request = client.stream("POST", "/v1/completions", json=body(prompt, stream=True, **fields))
    async with request as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line in ("", "data: [DONE]"):
                continue
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            leave_after -= 1
            if leave_after == 0:
                break
    return text


@asynccontextmanager
async def client_of(process: Process) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=process.url, timeout=120, limits=limits) as client:
        yield client
