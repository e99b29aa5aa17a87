"""The clients people have, unchanged, against a live server: whole, streamed, tools, structured output."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.live import ROOT, Process, launched, wait_until_ready
from tests.serving.model_dir import write_model_dir

pytestmark = pytest.mark.slow
CLIENTS = Path(__file__).parent / "clients"
PROGRAMS = sorted(path.name for path in CLIENTS.glob("ask_*.py"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    directory = write_model_dir(tmp_path_factory.mktemp("model") / "tiny")
    with launched(directory, "--mock", "--mock-rate", "0", "--api-key", "secret") as process:
        wait_until_ready(process)
        yield process


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_client_gets_what_it_asks_for(server: Process, tmp_path: Path, program: str):
    """Each in a process of its own: they bring warnings, threads and settings of theirs."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "SERVER": server.url,
        "API_KEY": "secret",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
        "LLM_USER_PATH": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(CLIENTS / program)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert all(told.values()), told
    assert len(told) >= 4


def test_all_five_clients_are_here():
    assert PROGRAMS == [
        "ask_anthropic.py",
        "ask_langchain.py",
        "ask_litellm.py",
        "ask_llm.py",
        "ask_openai.py",
    ]
