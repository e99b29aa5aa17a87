"""The benchmark in a process of its own, and what its runs must agree with.

Knows no server.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving.bench.summary import Summary
from tests.serving.live import ROOT


def bench(url: str, result: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "serving.bench", "--url", url, "--quiet", "--json", str(result)),
        *flags,
    ]


def run_of(url: str, tmp_path: Path, *flags: str, expected: int = 0) -> list[Summary]:
    """The runs of a benchmark in a process of its own."""
    result = tmp_path / "result.json"
    done = subprocess.run(
        bench(url, result, *flags), cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return json.loads(result.read_text())["runs"]


def assert_agrees(got: Summary, *, ttft_within: float) -> None:
    assert got["completed"] == got["requests"] > 0
    assert got["server"]["output_tokens"] == got["output_tokens"]
    assert got["server"]["input_tokens"] == got["input_tokens"]
    assert got["ttft_ms"]["mean"] == pytest.approx(got["server"]["ttft_mean_ms"], rel=ttft_within)
