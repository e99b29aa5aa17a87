"""A newcomer's walk: what the README says to type, typed, against the server that it starts.

The notebooks, which belong to the walk, are run by tests/test_notebooks.py.
"""

import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.live import Process, launched, wait_until_ready

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
RESEARCH = BLOCK.findall((ROOT / "docs" / "research.md").read_text(encoding="utf-8"))
CURLS = [text for language, text in BLOCKS if language == "bash" and "curl" in text]
CODE = [text for language, text in BLOCKS if language == "python"]
COMPILING = 300  # seconds; a machine that has run the tests before needs a few

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with launched(ROOT / "checkpoints" / "nano", "--num-gpus", "1") as process:
        wait_until_ready(process, COMPILING)
        yield process


def typed(server: Process, *command: str) -> str:
    """What a command prints that must succeed, the README's address being the server's."""
    host = server.url.removeprefix("http://")
    words = [word.replace("localhost:5000", host) for word in command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_every_curl_of_the_readme_is_answered(server: Process) -> None:
    # A status of 400 or more is a failure, of any of the commands.
    curl = 'set -e; curl() { command curl --silent --show-error --fail-with-body "$@"; }\n'
    answers = [typed(server, "bash", "-c", curl + script) for script in CURLS]
    assert len(answers) == 3
    chat, tools, others = answers
    assert "Paris" in chat and "data: [DONE]" in chat
    assert '"get_weather"' in tools and "Oslo" in tools
    assert '"nano"' in others and '"ready"' in others and "glm_generation_tokens_total" in others


def test_the_readme_s_python_is_answered(server: Process) -> None:
    (code,) = CODE
    assert "Paris" in typed(server, sys.executable, "-c", code)


def test_the_python_of_the_page_for_research_says_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    asking, looking = (text for language, text in RESEARCH if language == "python")
    exec(compile(asking, "research.md, the first", "exec"), {})
    assert "22" in capsys.readouterr().out
    names: dict[str, Any] = {}
    exec(compile(looking, "research.md, the second", "exec"), names)
    tokens, layers = names["seen"].logits.shape[0], 4
    shapes = capsys.readouterr().out.splitlines()
    assert shapes[1] == str((layers, tokens, 256)) and len(shapes) == 5


def test_the_chat_page_is_there(server: Process) -> None:
    with urllib.request.urlopen(f"{server.url}/", timeout=30) as page:
        assert page.headers["content-type"].startswith("text/html") and b"<textarea" in page.read()


def test_the_bench_measures_it(server: Process, tmp_path: Path) -> None:
    where = ("--url", server.url, "--json", str(tmp_path / "run.json"), "--quiet")
    short = ("--duration", "2", "--concurrency", "2", "--output-len", "8")
    printed = typed(server, sys.executable, "-m", "serving.bench", *where, *short)
    assert "TTFT" in printed and (tmp_path / "run.json").exists()


def test_the_plan_needs_no_gpu() -> None:
    command = [sys.executable, "-m", "glm_jax.aot", "plan", "--no-compile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "b200x8" in done.stdout
