"""The benchmark's other measurements, each small: the start, the front end's ceiling, the engine alone."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from glm_jax.engine.request import Turn
from serving.bench import frontend, startup
from serving.bench.__main__ import main
from serving.bench.decode import Bench, EngineFailedError
from serving.bridge import Deliver
from tests.serving.live import ROOT
from tests.serving.model_dir import write_model_dir
from tests.serving.scripted import ScriptedEngine

NANO = ROOT / "checkpoints" / "nano"


@pytest.fixture(scope="module")
def mock_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model") / "tiny")


def result_of(tmp_path: Path, *arguments: str, expected: int = 0) -> dict:
    path = tmp_path / "result.json"
    done = CliRunner().invoke(main, [*arguments, "--json", str(path)])
    assert done.exit_code == expected, done.output
    return json.loads(path.read_text())


def test_a_start_is_measured_cold_and_warm_by_phase(tmp_path, mock_dir):
    flags = ("--model-dir", str(mock_dir), "--serve-flags", "--mock", "--warm", "1")
    got = result_of(tmp_path, "startup", *flags)
    assert [len(got["starts"][kind]) for kind in ("cold", "warm")] == [1, 1]
    for kind in ("cold", "warm"):
        phases = got["medians"][kind]
        assert 0 < phases["listening"] <= phases["ready"] <= phases["first_token"] < 60
    assert got["commit"]
    assert got["machine"]["cores"]


def test_phases_that_only_some_starts_have_are_medians_of_those():
    got = startup.medians([{"a": 1.0}, {"a": 3.0, "b": 5.0}])
    assert got == {"a": 2.0, "b": 5.0}


def test_a_server_that_cannot_start_is_exit_code_three(mock_dir):
    flags = ("--model-dir", str(mock_dir), "--serve-flags", "--max-seq-len 0")
    done = CliRunner().invoke(main, ["startup", *flags])
    assert done.exit_code == 3
    assert "--max-seq-len" in done.output


def test_the_front_end_is_measured_with_every_token_accounted_for(tmp_path, mock_dir):
    flags = ("--model-dir", str(mock_dir), "--concurrency", "3,6", "--duration", "0.3")
    got = result_of(tmp_path, "frontend", *flags, "--output-len", "40", "--prompt-len", "4")
    assert [run["peak_concurrency"] for run in got["runs"]] == [3, 6]
    for run in got["runs"]:
        assert run["output_tokens"] == 40 * run["completed"] > 0
        assert run["output_tokens"] == run["server"]["output_tokens"]


def test_cores_are_kept_apart_only_while_it_is_measured():
    before = os.sched_getaffinity(0)
    with frontend.cores_apart() as words:
        if words:
            assert os.sched_getaffinity(0).isdisjoint({int(words[-1])})
    assert os.sched_getaffinity(0) == before


@pytest.mark.slow
def test_the_engine_alone_is_measured(tmp_path):
    flags = ("--model-dir", str(NANO), "--concurrency", "2", "--rounds", "2")
    got = result_of(tmp_path, "decode", *flags, "--prompt-len", "8", "--output-len", "6")
    (run,) = got["runs"]
    assert len(run["rounds"]) == 2
    for found in run["rounds"]:
        assert found["output_tokens"] == 12
        assert found["output_throughput"] == pytest.approx(12 / found["seconds"])
    low, high = run["decode_throughput_range"]
    assert 0 < low <= run["decode_throughput"] <= high
    assert run["step_ms"] > 0 and run["ttft_ms"] > 0
    assert {"weights", "compile", "warm_up", "total"} <= run["startup"].keys()


class Failing(ScriptedEngine):
    """Ends every request with an error."""

    def run_turns(self, deliver: Deliver) -> None:
        def fail(turn: Turn) -> None:
            lost = [event._replace(finish_reason="error", error="lost") for event in turn.events]
            deliver(Turn(lost))

        super().run_turns(fail)


def test_an_engine_that_fails_a_request_is_no_measurement():
    bench = Bench(Failing(lambda request: []))
    with pytest.raises(EngineFailedError, match="lost"):
        bench.round([[1, 2]], 1, "round")
    bench.close()


def test_a_page_shows_every_result_with_what_it_was_measured_on(tmp_path, mock_dir):
    (tmp_path / "results").mkdir()
    flags = ("--model-dir", str(mock_dir), "--concurrency", "2,4", "--duration", "0.3")
    got = result_of(tmp_path, "frontend", *flags, "--output-len", "20", "--prompt-len", "4")
    spread = {"output_throughput_range": [1, 3], "tokens_per_cpu_second_range": [4, 6]}
    ratio = {"concurrency": 8, "over": "them", "output_throughput": 2, "tokens_per_cpu_second": 5}
    several = {
        "frontend": got,
        "load": {**got, "kind": "load", "server": {"model": "tiny"}},
        "peers": {
            **got,
            "kind": "peers",
            "models": {
                "small": {
                    "parameters": 5e6,
                    "runs": [{**ratio, "engine": "them"}],
                    "ratios": [ratio | spread],
                    "left_out": {"others": "it ended"},
                }
            },
        },
        "kernels-x": {
            "kind": "kernels",
            "device": "A card",
            "jax": "0.12",
            "date": "today",
            "commit": "abc",
            "command": "measure it",
            "copy_bytes_per_second": 3e12,
            "operations_per_second": {"bf16": 7e14},
            "empty_kernel_us": 0.9,
            "results": [
                {
                    "kernel": "norm",
                    "shape": "T=1",
                    "phase": "decode",
                    "error": 1e-3,
                    "is_right": True,
                    "us": 2.0,
                    "us_graph": 2.5,
                    "floor_us": 1.0,
                    "small_floor_us": 1.5,
                    "alternatives": {"XLA": {"us": 4.0}},
                    "peers": {
                        "torch": {"us": 3.0, "us_graph": 4.0},
                        "Triton": {"us": 3.1, "us_graph": 3.5},
                    },
                },
                {"kernel": "route", "shape": "T=1", "phase": "", "failed": "ValueError: a | b"},
            ],
        },
        "layer": {
            "kind": "layer",
            "device": "A card",
            "jax": "0.12",
            "date": "today",
            "commit": "abc",
            "command": "measure it",
            "copy_bytes_per_second": 3e12,
            "layers": [8, 16],
            "results": [
                {
                    "rows": 64,
                    "layer_us": 90.0,
                    "alone_us": 95.0,
                    "floor_us": 60.0,
                    "gaps_us": 10.0,
                    "launches": 1.0,
                    "kernels": [{"kernel": "gate_up", "runs": 1.0, "us": 80.0, "floor_us": 60.0}],
                }
            ],
        },
    }
    for name, result in several.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(result))
    done = CliRunner().invoke(main, ["page", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.count(f"at commit {got['commit']} on ") == 3
    assert page.count("| 2 at a time | ") == 2
    assert f"{got['runs'][0]['output_throughput']:,.0f}" in page
    assert "| 8 | them | 2.00 | 1.00 … 3.00 | 5.00 | 4.00 … 6.00 |" in page
    assert "| 8 | them | 2.0 | 5.0 |" in page and "others was left out: it ended" in page
    others = "3.0 (4.0) torch, (3.5) Triton"
    cells = f"1.0e-03 | 2.0 (2.5) | 50% | 75% | {others} | 1.50 (1.40)"
    assert f"| norm | T=1 | decode | {cells} |" in page
    assert "| 64 | gate_up | 1.0 | 80.0 | 60.0 | 75% |" in page
    assert "| 64 | all, one after the other |  | 95.0 |  |  |" in page
    assert "steps of 8 and of 16 layers" in page
    assert "| 64 | **all** | 1.0 | 90.0 | 60.0 | 67% |" in page
    assert "| route | T=1 | - | ValueError: a / b |" in page and "Command: `measure it`" in page
    assert "<svg" in (tmp_path / "results" / "load.svg").read_text()


def test_a_page_of_nothing_or_of_something_else_is_refused(tmp_path):
    done = CliRunner().invoke(main, ["page", str(tmp_path)])
    assert done.exit_code == 1 and "no JSON files" in done.output
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text("{}")
    done = CliRunner().invoke(main, ["page", str(tmp_path)])
    assert done.exit_code == 1 and "x.json is no result" in done.output
