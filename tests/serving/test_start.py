"""What a start shows: on a terminal, in a pipe, as JSON; and that what it says is so."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_jax.config import ModelConfig
from glm_jax.native import library
from glm_jax.shapes import StepShapes
from serving.facts import tell_cache, tell_memory, tell_steps
from serving.model_engine import build_engine
from serving.start import Start
from serving.tokenizer import ModelTokenizer
from tests.serving.live import ROOT, free_port
from tests.serving.model_dir import write_model_dir
from tests.serving.test_model_engine import NANO, options

ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
SECONDS = 60
SHAPES = StepShapes(
    num_slots=4, num_pages=8, page_size=64, max_seq_len=128, prefill_tile=64,
    prefill_buckets=(1, 4), decode_buckets=(4,),
)  # fmt: skip
# Enough of a bar that a terminal has to be rid of it.
BAR_AND_LINE = """
import logging, sys, time
from checkpoints.progress import Progress
from serving.logs import set_up
set_up("INFO", {log_format!r}, sys.stderr)
with Progress("weights", 100) as bar:
    bar.advance(50)
    logging.getLogger("x").warning("a line meanwhile")
    time.sleep(0.2)
    bar.advance(50)
"""


def command(model_dir: Path, port: int, *flags: str) -> list[str]:
    words = ["-m", "serving", "serve", "--mock", "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, *words, "--model-dir", str(model_dir), *flags]


def on_a_terminal(words: list[str], until: str | None, **variables: str) -> str:
    """All that a command writes to a terminal until it says so and is told to end, or ends."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))  # else it has no columns, and a bar no room
    without = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environ = without | {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | variables
    process = subprocess.Popen(words, cwd=ROOT, env=environ, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text, deadline = "", time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline and select.select([ours], [], [], SECONDS)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other side has been closed
                break
            if not piece:
                break
            text += piece.decode()
            if until and until in text:
                process.send_signal(signal.SIGTERM)
                until = None
        assert process.wait(SECONDS) == 0, text
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return text


def in_a_pipe(words: list[str], until: str, **variables: str) -> list[str]:
    """The lines that a command writes to its log until it says so and is told to end."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    lines = []
    with subprocess.Popen(
        words, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                lines.append(line.removesuffix("\n"))
                if until in line:
                    process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0, lines
        finally:
            process.kill()
    return lines


def curl_of(lines: list[str]) -> list[str]:
    (line,) = (line for line in lines if "try " in line)
    return shlex.split(line[line.index("curl") :])


def test_in_a_pipe_every_line_is_plain_and_whole(tmp_path: Path) -> None:
    write_model_dir(tmp_path / "tiny")
    port = free_port()
    lines = in_a_pipe(command(tmp_path / "tiny", port), "  try ")
    head = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO     serving[.\w]*: .")
    assert all(head.match(line) for line in lines), lines
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", "".join(lines))
    assert any("port = " + str(port) in line for line in lines)
    assert any(re.search(r"ready after \d+\.\d\d s$", line) for line in lines)
    assert any(line.endswith("access    for all: there is no --api-key") for line in lines)
    words = curl_of(lines)
    assert words[1] == f"http://127.0.0.1:{port}/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "tiny"


def test_on_a_terminal_there_are_colors_unless_they_are_not_wanted(tmp_path: Path) -> None:
    write_model_dir(tmp_path / "tiny")
    words = command(tmp_path / "tiny", free_port())
    colored = on_a_terminal(words, "Hello!")
    plain = on_a_terminal(words, "Hello!", NO_COLOR="1")
    assert "\x1b[1;32mready after" in colored
    # Bars may move the cursor; colors end in m.
    assert not re.search(r"\x1b\[[0-9;]*m", plain)
    assert "ready after" in plain
    assert "listening" in plain and "curl http" in plain


def test_a_bar_is_for_a_terminal_and_lines_stand_above_it() -> None:
    words = [sys.executable, "-c", BAR_AND_LINE.format(log_format="auto")]
    text = on_a_terminal(words, None)
    assert "100%" in text and "weights:" in text
    (line,) = (line for line in re.split(r"[\r\n]+", ESCAPE.sub("", text)) if "meanwhile" in line)
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: a line meanwhile", line.strip())


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_lines_of_a_machine_s_format_have_no_bar_even_on_a_terminal(log_format: str) -> None:
    text = on_a_terminal([sys.executable, "-c", BAR_AND_LINE.format(log_format=log_format)], None)
    assert "%" not in text and "\x1b" not in text
    warning, bytes_read = text.strip().splitlines()
    assert "a line meanwhile" in warning and "0.000 of 0.000 GB" in bytes_read


def test_json_is_an_object_a_line_with_what_was_found_out(tmp_path: Path) -> None:
    write_model_dir(tmp_path / "tiny")
    words = command(tmp_path / "tiny", free_port(), "--log-format", "json")
    records = [json.loads(line) for line in in_a_pipe(words, '"ready"', API_KEY="hush")]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    (ready,) = (record for record in records if record.get("event") == "ready")
    assert ready["model"] == {"rate": 50.0} and ready["seconds"] > 0
    assert "$API_KEY" in ready["try"] and "hush" not in json.dumps(records)
    assert ready["access"] == "with a key, of 1 known"
    (flags,) = (record["flags"] for record in records if "flags" in record)
    assert flags["model_dir"] == str(tmp_path / "tiny")


def test_memory_says_what_a_device_has_left() -> None:
    stats = {"bytes_limit": 150 * 10**9, "peak_bytes_in_use": 148 * 10**9}
    device = SimpleNamespace(memory_stats=lambda: stats)
    mesh = SimpleNamespace(size=8, local_mesh=SimpleNamespace(devices=np.array([device])))
    config, start = ModelConfig.from_directory(NANO), Start()
    tell_memory(start, config, SHAPES, mesh, {}, np.dtype("float16"))  # type: ignore[arg-type]
    memory = start.facts["memory"]
    assert memory.text.endswith("; of 150.00 GB, 148.00 GB at most in use so far and 2.00 GB never")
    # Keys and values of every layer and head, of 8 pages of 64 positions, on one of eight devices.
    width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert memory.values["kv_bytes"] == 2 * width * 8 * 64 * 2 // 8


def test_what_went_wrong_is_in_the_same_object(tmp_path: Path) -> None:
    script = (
        "import logging, sys; from serving.logs import set_up; set_up('INFO', 'json', sys.stderr)\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logging.exception('it broke')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = done.stderr.splitlines()
    record = json.loads(line)
    assert (record["level"], record["message"]) == ("ERROR", "it broke")
    assert "ZeroDivisionError" in record["exception"]


def test_a_warning_of_python_s_is_a_line_like_any_other() -> None:
    script = (
        "import sys, warnings; from serving.logs import set_up; set_up('INFO', 'json', sys.stderr)\n"
        "warnings.warn('the cache is full')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    record = json.loads(done.stderr)
    assert (record["level"], record["logger"]) == ("WARNING", "py.warnings")
    assert record["message"].startswith("UserWarning: the cache is full (")


def test_the_start_of_a_model_tells_what_it_found(caplog: pytest.LogCaptureFixture) -> None:
    seen: dict[str, float] = {}
    start = Start(seen.__setitem__)
    tokenizer = ModelTokenizer.from_directory(NANO)
    build_engine(options(), tokenizer)  # so that the steps are on disk
    with caplog.at_level("INFO", "serving.start"):
        engine = build_engine(options(), tokenizer, start)
        start.ready(listening="http://here", **{"try": "curl"})
    facts = {name: fact.values for name, fact in start.facts.items()}
    assert [*facts] == ["model", "mesh", "KV cache", "weights", "steps", "memory"]
    config = ModelConfig.from_directory(NANO)
    assert facts["model"]["layers"] == config.num_hidden_layers
    assert facts["KV cache"]["tokens"] == engine.stats().num_pages * 64
    # As the files have them, all on the one device.
    assert facts["memory"]["weight_bytes"] == facts["weights"]["bytes"]
    assert facts["mesh"] == facts["mesh"] | {"devices": 1, "platform": "cpu"}
    assert facts["mesh"]["operations"] == ("C" if library.is_available() else "plain operations")
    assert facts["steps"]["compiled"] == 0
    assert start.facts["steps"].text.endswith("; all loaded from the cache")
    assert seen == start.phases and seen.keys() == {"weights", "compile", "warm_up", "total"}
    block: list[tuple[str, str]] = caplog.records[-1].block  # type: ignore[attr-defined]
    assert [label for label, _ in block] == [*facts, "start", "listening", "try"]


@pytest.mark.parametrize(
    ("num_cached", "words"),
    [
        (None, "loaded from the engine"),
        (1, "2 compiled, 1 loaded from the cache"),
        (3, "all loaded"),
    ],
)
def test_steps_that_were_compiled_are_counted(num_cached: int | None, words: str) -> None:
    start = Start()
    tell_steps(start, SHAPES, num_cached)
    assert words in start.facts["steps"].text
    assert "prefill of 64, 256 tokens, decode of 4 rows" in start.facts["steps"].text
    tell_cache(start, ModelConfig.from_directory(NANO), SHAPES, Any, options(max_batch_tokens=512))  # type: ignore[arg-type]
    assert start.facts["KV cache"].text.startswith("512 tokens, 4 requests at full length")
    assert "takes 256 tokens, not 512" in start.facts["KV cache"].text
