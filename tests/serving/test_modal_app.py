"""The deployment on Modal: what would run there, without Modal; its server started here, with nano."""

import json
import os
import runpy
import shlex
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import modal
import pytest

from checkpoints.__main__ import main as checkpoints_main
from glm_jax.aot.__main__ import main as aot_main
from glm_jax.targets.target import parse_target
from serving import modal_app
from serving.__main__ import main as serving_main
from serving.bench.__main__ import main as bench_main
from serving.modal_app import Plan, start_server, stop_server
from tests.serving.live import free_port

ROOT = Path(__file__).parents[2]
PARSERS = {
    "serving": serving_main,
    "glm_jax.aot": aot_main,
    "checkpoints": checkpoints_main,
    "serving.bench": bench_main,
}


@pytest.mark.parametrize("name", ["convert", "build", "build_on_gpus", "serve"])
def test_every_command_is_one_that_its_module_understands(name: str, tmp_path: Path) -> None:
    words = [word.replace("/models", str(tmp_path)) for word in getattr(Plan(), name)()]
    assert words[:2] == ["python", "-m"]
    (tmp_path / "GLM-4.7-FP8").mkdir()
    (tmp_path / "GLM-4.7-FP8-b200x8").mkdir()
    # Parsed, not run: an unknown flag or a value out of range raises.
    group = PARSERS[words[2]]
    command = group.commands[words[3]]
    command.make_context(words[3], words[4:])


def test_the_bench_understands_what_it_is_asked() -> None:
    words = Plan().bench("https://example.com", "--concurrency", "1,64", "--duration", "5.0")
    bench_main.make_context("serving.bench", words[3:])


def test_steps_are_compiled_for_the_limits_that_are_served() -> None:
    plan = Plan(max_concurrency=32, max_seq_len=1000)
    assert shlex.join(plan.limits()) in shlex.join(plan.build())
    assert shlex.join(plan.limits()) in shlex.join(plan.serve())


def test_the_environment_changes_the_plan() -> None:
    plan = Plan.of({"GLM_GPU": "H200:8", "GLM_IDLE": "60", "GLM_SECRET": ""})
    assert plan == Plan(gpu="H200:8", idle=60, secret="")
    assert (plan.target, plan.num_gpus) == ("h200x8", 8)
    assert parse_target(plan.target).num_devices == 8
    assert plan.engine == "/models/engine-h200x8"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("GLM_IDLE", "soon", "GLM_IDLE='soon' is no whole number; it is 900 by default"),
        ("GLM_GPU", "B200", "GLM_GPU='B200' is not a kind and a number"),
        ("GLM_GPU", "B200:0", "GLM_GPU='B200:0' is not a kind and a number"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(name: str, value: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Plan.of({name: value})


def test_the_app_asks_modal_for_what_the_plan_says() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and nothing else says it yet
        functions = modal_app.app.registered_functions
        entry_points = modal_app.app.registered_entrypoints
    build, server = functions["build"]._spec_, functions["Server.*"]._spec_
    assert build is not None and server is not None
    assert build.gpus is None and server.gpus == "B200:8"
    assert [*build.volumes] == [*server.volumes] == ["/models"]
    assert (
        len(server.secrets) == 2 and len(build.secrets) == 1
    )  # the keys; the plan's own variables
    assert {*entry_points} == {"main", "prepare"}


def test_modal_is_told_when_to_start_and_to_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off the calls: what Modal made of them, it tells nobody but its own servers."""
    told: dict[str, dict[str, Any]] = {}

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            told[name] = kwargs
            return lambda decorated: decorated

        return call

    monkeypatch.setattr(modal.App, "cls", recorded("cls"))
    for name in ("concurrent", "web_server", "enter", "exit"):
        monkeypatch.setattr(modal, name, recorded(name))
    monkeypatch.setenv("GLM_IDLE", "77")
    monkeypatch.setenv("GLM_MIN_CONTAINERS", "1")
    runpy.run_path(str(ROOT / "serving" / "modal_app.py"), run_name="again")
    server, plan = told["cls"], Plan()
    assert (server["scaledown_window"], server["min_containers"]) == (77, 1)
    assert server["max_containers"] == 1  # one server has all the GPUs
    # Ten minutes to tune, fifteen to start.
    assert server["startup_timeout"] >= 25 * 60 and told["web_server"]["startup_timeout"] >= 60
    # More than run at a time, so that the server's own queue has something to refuse.
    assert told["concurrent"]["max_inputs"] > plan.max_concurrency
    assert told["concurrent"]["target_inputs"] == plan.max_concurrency
    assert {"enter", "exit"} <= told.keys()


def engine_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> Plan:
    """A plan whose engine lies below tmp_path and is compiled by this program."""
    monkeypatch.setattr(modal_app, "VOLUME", str(tmp_path))
    monkeypatch.setattr(Plan, "build_on_gpus", lambda plan: [sys.executable, "-c", command])
    plan = Plan()
    Path(plan.engine).mkdir()
    return plan


def test_steps_are_compiled_on_the_gpus_by_the_first_start_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = engine_plan(tmp_path, monkeypatch, "print('compiling')")
    assert modal_app.tune(plan, 60)
    assert not modal_app.tune(plan, 60)
    # A build replaces the directory, and the next start compiles again.
    Path(plan.tuned).unlink()
    assert not modal_app.tune(replace(plan, tune=0), 60)
    assert modal_app.tune(plan, 60)


@pytest.mark.parametrize("command", ["raise SystemExit(2)", "import time; time.sleep(60)"])
def test_a_start_goes_on_where_steps_cannot_be_compiled_on_the_gpus(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = engine_plan(tmp_path, monkeypatch, command)
    assert not modal_app.tune(plan, 1)
    assert not Path(plan.tuned).exists()
    assert "the steps stay as compiled without a GPU" in capfd.readouterr().out


@pytest.mark.parametrize(("is_meant", "codes"), [(False, [1]), (True, [])])
def test_a_server_that_dies_ends_its_container(is_meant: bool, codes: list[int]) -> None:
    ended: list[int] = []
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        modal_app.end_with(process, lambda: is_meant, ended.append).join(30)
    assert ended == codes


def test_a_dry_run_says_every_command_and_needs_no_account(tmp_path: Path) -> None:
    environ = {**os.environ, "GLM_GPU": "H200:8", "MODAL_CONFIG_PATH": str(tmp_path / "none")}
    command = [sys.executable, "-m", "serving.modal_app"]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    plan = Plan(gpu="H200:8")
    for words in (plan.convert(), plan.build(), plan.build_on_gpus(), plan.serve()):
        assert shlex.join(words) in done.stdout


@pytest.mark.slow
def test_the_container_s_server_starts_answers_and_ends_in_order() -> None:
    port = free_port()
    plan = replace(Plan(), gpu="CPU:1", max_concurrency=2, max_seq_len=256, max_batch_tokens=64)
    words = [sys.executable, *plan.serve()[1:]]
    words[words.index("--model-dir") + 1] = str(ROOT / "checkpoints" / "nano")
    words[words.index("--port") + 1] = str(port)
    words.remove("--engine-fallback")
    at = words.index("--engine")
    del words[at : at + 2]
    process = start_server(words, port, 300, cwd=str(ROOT))
    try:
        body = {"prompt": "What is the capital of France?", "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
    finally:
        code = stop_server(process, seconds=30)
    assert code == 0


def test_a_server_that_ends_at_once_is_said_to_have_ended() -> None:
    with pytest.raises(RuntimeError, match="the server ended with 3"):
        start_server([sys.executable, "-c", "raise SystemExit(3)"], free_port(), 30)


def test_a_server_that_is_never_ready_is_stopped() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(RuntimeError, match="not ready within 1 s"):
        start_server(sleeper, free_port(), 1)
