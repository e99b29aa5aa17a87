"""The Dockerfile: linted, held against the server, run as far as no engine is needed.

What its installation brings is what `pip install .` brings: whole, away from the checkout.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.serving.live import free_port

ROOT = Path(__file__).parents[1]
STARTING = 300  # seconds; a machine that has run the tests before needs a few


class Instruction(NamedTuple):
    """One instruction of a stage, its lines joined."""

    name: str
    rest: str


def read_stages() -> dict[str, list[Instruction]]:
    """The Dockerfile's instructions by stage; the last stage's name is empty."""
    text = "\n".join(
        line
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if not line.startswith("#") and line
    )
    stages: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.replace("\\\n", " ").splitlines():
        name, _, rest = line.partition(" ")
        if name == "FROM":
            current = stages.setdefault(rest.partition(" AS ")[2], [])
        else:
            current.append(Instruction(name, rest.strip()))
    return stages


STAGES = read_stages()


def only(stage: str, name: str) -> str:
    """The one instruction of this name."""
    (rest,) = (each.rest for each in STAGES[stage] if each.name == name)
    return rest


def copied_from_checkout() -> set[str]:
    return {
        source
        for stage in STAGES.values()
        for name, rest in stage
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }


def environment_of(stage: str) -> dict[str, str]:
    """What ENV sets, variables left as they are."""
    pairs = [
        pair.partition("=")
        for name, rest in STAGES[stage]
        if name == "ENV"
        for pair in shlex.split(rest)
    ]
    return {name: value for name, _, value in pairs}


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    run = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && sudo pip install jax\n")
    hadolint = Path(sys.executable).parent / "hadolint"
    run = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 1 and "DL3006" in run.stdout


def test_what_is_copied_is_what_the_builder_gets() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines and "**/__pycache__" in lines
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert copied_from_checkout() == let_in
    assert all((ROOT / name).exists() for name in let_in)


@pytest.mark.parametrize(("extra", "has_gpu_packages"), [("cuda12", True), ("none", False)])
def test_the_packages_are_those_of_the_lock_all_hashed(
    tmp_path: Path, extra: str, has_gpu_packages: bool
) -> None:
    _, sed, install = only("packages", "RUN").split(" && ")
    assert "--require-hashes -r requirements.txt" in install
    assert only("packages", "ARG") == "EXTRA=cuda12"
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    subprocess.run(
        ["sh", "-euc", sed], cwd=tmp_path, env={**os.environ, "EXTRA": extra}, check=True
    )
    entries = entries_of(tmp_path / "requirements.txt")
    assert all("--hash=sha256:" in entry for entry in entries)
    # pip takes what has no marker, and a marker that names the empty extra.
    taken = {
        re.split("[=; ]", entry)[0]
        for entry in entries
        if "extra ==" not in entry or "extra == ''" in entry
    }
    assert {"jax", "granian", "tokenizers"} <= taken
    assert ("jax-cuda12-plugin" in taken) == has_gpu_packages
    assert not taken & {"pytest", "modal"}


@pytest.mark.parametrize(("extra", "has_compiler"), [("cuda12", False), ("none", True)])
def test_an_image_without_cuda_has_a_c_compiler(
    tmp_path: Path, extra: str, has_compiler: bool
) -> None:
    calls = tmp_path / "calls"
    for name in ("apt-get", "rm"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\n')
        program.chmod(0o755)
    environ = {**os.environ, "EXTRA": extra, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(["sh", "-euc", only("", "RUN")], env=environ, check=True)
    assert only("", "ARG") == only("packages", "ARG")
    assert calls.exists() == has_compiler
    # One that native/library.py looks for, and the headers that it needs.
    assert not has_compiler or {"gcc", "libc6-dev"} <= set(calls.read_text().split())


def test_what_builds_the_wheel_is_pinned_and_hashed(tmp_path: Path) -> None:
    sed, install = first_run("project").split(" && ")
    assert "--require-hashes -r builders.txt" in install
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    subprocess.run(["sh", "-euc", sed], cwd=tmp_path, check=True)
    (entry,) = entries_of(tmp_path / "builders.txt")
    assert re.match(r"setuptools==[\d.]+ +--hash=sha256:", entry) and "extra" not in entry


def first_run(stage: str) -> str:
    return next(rest for name, rest in STAGES[stage] if name == "RUN")


def entries_of(requirements: Path) -> list[str]:
    text = requirements.read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's stage run in a scratch directory, which has the container's /opt and /tmp."""
    root = tmp_path_factory.mktemp("container")
    build = root / "build"
    build.mkdir()
    for name in copied_from_checkout():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, build / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, build)
    *_, install = (rest for name, rest in STAGES["project"] if name == "RUN")
    assert install.startswith("pip install ")
    # This Python may itself be below /tmp or /opt.
    command = f"{shlex.quote(sys.executable)} -m {inside(install, root)}"
    subprocess.run(["sh", "-euc", command], cwd=build, check=True, capture_output=True)
    return root


@pytest.fixture
def environment(installed: Path) -> dict[str, str]:
    """The last stage's environment, with a port of its own.

    The packages are this environment's, which are the lock's too.
    """
    ours = {key: inside(value, installed) for key, value in environment_of("").items()}
    # One device, for which other tests' servers have compiled already.
    changed = {"PATH": os.environ["PATH"], "PORT": str(free_port()), "NUM_GPUS": "1"}
    return {**os.environ, **ours, **changed}


def inside(text: str, root: Path) -> str:
    """Paths of the container as paths in the scratch directory."""
    return re.sub(r"(?<![\w/])/(opt|tmp)\b", rf"{root}/\1", text)


DATA = (
    "checkpoints/nano/model-00001-of-00001.safetensors",
    "checkpoints/nano/tokenizer.json",
    "checkpoints/nano/chat_template.jinja",
    "glm_jax/targets/b200.txtpb",
    "serving/grafana.json",
    "serving/static/chat.html",
)


@pytest.mark.parametrize("name", DATA)
def test_the_installation_brings_what_is_no_code(installed: Path, name: str) -> None:
    assert (installed / "opt" / "app" / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_installation_brings_every_file_that_is_no_module(installed: Path) -> None:
    """A new kind of file has to be named in pyproject.toml, which nobody is reminded of elsewhere."""
    tracked = subprocess.run(
        ["git", "ls-files", "glm_jax", "checkpoints", "serving"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if tracked.returncode:
        pytest.skip("no checkout of git's, which would say which files belong here")
    missing = [
        name for name in tracked.stdout.split() if not (installed / "opt" / "app" / name).is_file()
    ]
    assert not missing


def test_the_installation_serves_its_own_model_when_nothing_is_said(
    environment: dict[str, str], installed: Path, tmp_path: Path
) -> None:
    site = installed / "opt" / "app"
    environ = environment | {"MODEL_DIR": ""}  # click takes it as not set
    where = "import serving, checkpoints; print(serving.__file__, checkpoints.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert all(Path(file).is_relative_to(site) for file in found), found
    command = [sys.executable, "-m", "serving", "serve", "--mock"]
    with subprocess.Popen(command, cwd=tmp_path, env=environ) as server:
        try:
            url = f"http://127.0.0.1:{environ['PORT']}"
            wait_for(lambda: is_answered(f"{url}/readyz"), server)
            with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
                assert b'"nano"' in answer.read()
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


@pytest.mark.slow
def test_the_container_serves_nano_tells_its_health_and_drains(
    environment: dict[str, str], installed: Path
) -> None:
    work = installed / only("", "WORKDIR").strip("/")
    work.mkdir()
    _, python, *arguments = ["", *json.loads(only("", "CMD"))]
    assert python == "python"
    health = json.loads(only("", "HEALTHCHECK").partition(" CMD ")[2])[1:]
    url = f"http://127.0.0.1:{environment['PORT']}"
    log = (installed / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, *arguments], cwd=work, env=environment, stdout=log, stderr=log
    )
    try:

        def is_healthy() -> bool:
            run = subprocess.run([sys.executable, *health], env=environment, capture_output=True)
            return run.returncode == 0

        wait_for(is_healthy, server)
        wait_for(lambda: is_answered(f"{url}/readyz"), server)
        body = {"model": "nano", "prompt": "Hi", "max_tokens": 1}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 1
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not is_healthy()
    finally:
        server.kill()
        server.wait()
        log.close()


def is_answered(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def wait_for(condition: Any, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTING
    while not condition():
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.3)


def test_nobody_is_root_and_the_port_is_the_servers() -> None:
    assert only("", "USER") == "10001:10001"
    assert only("", "EXPOSE") == environment_of("")["PORT"] == "5000"
