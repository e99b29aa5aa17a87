"""The deployment on Modal: an image, a Volume with the weights, the functions that fill it, the server.

Knows no engine: every function runs a command of this project in a container.

    modal run serving/modal_app.py::prepare   # once: weights, conversion, compiled steps
    modal deploy serving/modal_app.py         # serves on B200:8
    modal run serving/modal_app.py            # starts one, measures it, prints the table
    python -m serving.modal_app               # says what would run, asks nothing of Modal

What an operator may want otherwise is an environment variable of the command that deploys: see Plan.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import modal

MINUTES = 60  # seconds
PORT = 5000
ROOT = Path(__file__).resolve().parents[1]
CODE = "/glm-jax"
VOLUME = "/models"
# In the container /models is there at once and code starts in /glm-jax, whatever this file's place.
PACKAGES = ("glm_jax", "checkpoints", "serving")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is deployed; each field is also a variable GLM_<NAME> of the deploying environment.

    Attributes:
      gpu: as Modal says it: kind and number on one host.
      repository, revision: the model on the hub. The commit that a revision names on the day of the
        download is kept beside the weights, and later downloads take that commit.
      max_concurrency, max_seq_len, max_batch_tokens: as the flags of serve; steps are compiled for
        these, so a change needs a new `prepare`.
      tune: 1: the first server compiles the steps once more on its GPUs, where XLA tries which of its
        kernels are fastest; every later start loads those. 0: the steps stay as compiled without a GPU.
      idle: seconds without a request until the GPUs are given back.
      min_containers: 1 keeps a server warm, and pays for it.
      secret: Modal's name of the secret whose API_KEY clients must send; empty: anybody may ask.
    """

    gpu: str = "B200:8"
    repository: str = "zai-org/GLM-4.7-FP8"
    revision: str = "main"
    max_concurrency: int = 256
    max_seq_len: int = 8192
    max_batch_tokens: int = 8192
    tune: int = 1
    idle: int = 15 * MINUTES
    min_containers: int = 0
    secret: str = "glm-jax"

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Plan:
        """Reads the variables; raises ValueError that names one which cannot be read."""
        values: dict[str, str | int] = {}
        for field in fields(cls):
            text = environ.get(f"GLM_{field.name.upper()}")
            if text is None:
                continue
            try:
                values[field.name] = int(text) if isinstance(field.default, int) else text
            except ValueError:
                raise ValueError(
                    f"GLM_{field.name.upper()}={text!r} is no whole number; it is {field.default} by default"
                ) from None
        plan = cls(**values)  # type: ignore[arg-type]
        plan.target  # noqa: B018 (says what is wrong with the GPUs before anything is deployed)
        return plan

    @property
    def target(self) -> str:
        """The machine as `glm_jax.aot` says it: "B200:8" is b200x8."""
        kind, _, number = self.gpu.partition(":")
        if not kind or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"GLM_GPU={self.gpu!r} is not a kind and a number, as in B200:8")
        return f"{kind.lower()}x{number}"

    @property
    def num_gpus(self) -> int:
        return int(self.gpu.partition(":")[2])

    @property
    def published(self) -> str:
        """The weights as they were published."""
        return f"{VOLUME}/{self.repository.rpartition('/')[2]}"

    @property
    def converted(self) -> str:
        """The same, cut as the devices read them."""
        return f"{self.published}-{self.target}"

    @property
    def engine(self) -> str:
        """The compiled steps."""
        return f"{VOLUME}/engine-{self.target}"

    def limits(self) -> list[str]:
        """The flags that serve and build must agree on."""
        names = ("max_concurrency", "max_seq_len", "max_batch_tokens")
        return [
            word
            for name in names
            for word in (f"--{name.replace('_', '-')}", str(getattr(self, name)))
        ]

    def convert(self) -> list[str]:
        return [
            *("python", "-m", "checkpoints", "convert", self.published, self.converted),
            *("--target", self.target),
        ]

    def build(self) -> list[str]:
        return [
            *("python", "-m", "glm_jax.aot", "build", "--config", self.converted),
            *("--target", self.target, "--out", self.engine, *self.limits()),
        ]

    @property
    def tuned(self) -> str:
        """A file that an engine has when it was compiled on GPUs; a new `build` has it no more."""
        return f"{self.engine}/TUNED"

    def build_on_gpus(self) -> list[str]:
        return [*self.build(), "--on-devices"]

    def serve(self) -> list[str]:
        # Steps of another version compile anew rather than refuse: late is better than down.
        return [
            *("python", "-m", "serving", "serve", "--model-dir", self.converted),
            *("--engine", self.engine, "--engine-fallback", "--port", str(PORT)),
            *("--num-gpus", str(self.num_gpus), *self.limits(), "--access-log"),
        ]

    def bench(self, url: str, *flags: str) -> list[str]:
        return ["python", "-m", "serving.bench", "--url", url, "--quiet", *flags]


def image_of(extras: tuple[str, ...]) -> modal.Image:
    """Python with the locked packages of these extras, and this checkout's code."""
    scopes = " ".join(f"-e \"s/extra == '{extra}'/extra == ''/\"" for extra in extras)
    image = (
        modal.Image.debian_slim(python_version="3.12")
        .add_local_file(ROOT / "constraints.txt", "/constraints.txt", copy=True)
        .run_commands(
            f"sed {scopes} /constraints.txt > /requirements.txt",
            "pip install --no-cache-dir --require-hashes -r /requirements.txt",
        )
        .env(
            {
                "PYTHONPATH": CODE,
                # What a start has to compile after all stays on the Volume, XLA's autotuning with it.
                "JAX_COMPILATION_CACHE_DIR": f"{VOLUME}/compiled",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            }
        )
        .workdir(CODE)
    )
    # Last, and mounted rather than copied: a change of code builds no image.
    for package in PACKAGES:
        image = image.add_local_dir(ROOT / package, f"{CODE}/{package}", ignore=["**/__pycache__"])
    return image


plan = Plan.of(os.environ)
app = modal.App("glm-jax")
volume = modal.Volume.from_name("glm-jax-models", create_if_missing=True)
secrets = [modal.Secret.from_name(plan.secret, required_keys=["API_KEY"])] if plan.secret else []
# A container imports this file too, where there is no checkout to make images of.
gpu_image = image_of(("cuda12",)) if modal.is_local() else modal.Image.debian_slim()
host_image = image_of(("aot",)) if modal.is_local() else modal.Image.debian_slim()
# What a container's copy of this file must read as the deploying one did.
settings: dict[str, str | None] = {
    f"GLM_{field.name.upper()}": str(getattr(plan, field.name)) for field in fields(Plan)
}
# What the functions that fill the Volume have in common.
filling: dict[str, Any] = {"image": host_image, "volumes": {VOLUME: volume}, "env": settings}


def run(
    command: list[str], environ: Mapping[str, str] = os.environ, seconds: float | None = None
) -> None:
    """Runs a command to its end, its output in the container's log; raises where it fails.

    Raises:
      subprocess.SubprocessError: it failed, or was stopped after so many seconds.
    """
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True, env=dict(environ), timeout=seconds)


def tune(plan: Plan, seconds: float) -> bool:
    """Compiles the steps on the GPUs at hand, if that was not done before; returns whether it was now.

    An engine that could not be made in this time stays as it was: late is better than down.
    """
    if not plan.tune or Path(plan.tuned).exists():
        return False
    try:
        run(plan.build_on_gpus(), seconds=seconds)
    except subprocess.SubprocessError as error:
        print(f"the steps stay as compiled without a GPU: {error}", flush=True)
        return False
    Path(plan.tuned).touch()
    return True


@app.function(**filling, cpu=8, memory=16 * 1024, timeout=6 * 60 * MINUTES, retries=2)
def download() -> None:
    """Fetches the published weights, once; what is there already is not fetched again."""
    from huggingface_hub import HfApi, snapshot_download

    directory = Path(plan.published)
    pinned = directory / "REVISION"
    commit = (
        pinned.read_text().strip()
        if pinned.exists()
        else HfApi().model_info(plan.repository, revision=plan.revision).sha
    )
    snapshot_download(plan.repository, revision=commit, local_dir=directory)
    pinned.write_text(f"{commit}\n")
    volume.commit()


@app.function(**filling, cpu=8, memory=16 * 1024, timeout=6 * 60 * MINUTES, retries=2)
def convert() -> None:
    """Cuts the weights as the devices read them; a conversion that was cut short goes on."""
    volume.reload()
    try:
        run(plan.convert())
    finally:
        volume.commit()


@app.function(**filling, cpu=16, memory=64 * 1024, timeout=60 * MINUTES)
def build() -> None:
    """Compiles every step with no GPU; a start that loads them compiles nothing."""
    volume.reload()
    run(plan.build())
    volume.commit()


@app.cls(
    image=gpu_image,
    gpu=plan.gpu,
    volumes={VOLUME: volume},
    secrets=secrets,
    env=settings,
    cpu=16,
    memory=64 * 1024,
    timeout=24 * 60 * MINUTES,
    startup_timeout=30 * MINUTES,
    scaledown_window=plan.idle,
    min_containers=plan.min_containers,
    max_containers=1,
)
@modal.concurrent(max_inputs=plan.max_concurrency + 64, target_inputs=plan.max_concurrency)
class Server:
    """One server on one host's GPUs, reached at its own address."""

    @modal.enter()
    def start(self) -> None:
        """Returns when the server is ready, so that no request meets one that loads."""
        if tune(plan, 10 * MINUTES):
            volume.commit()  # for the next start
        self.is_stopping = False
        self.process = start_server(plan.serve(), PORT, 15 * MINUTES)
        # Modal looks at the port once, at the start.
        end_with(self.process, lambda: self.is_stopping)
        volume.commit()  # what was compiled after all serves the next start

    @modal.web_server(PORT, startup_timeout=30 * MINUTES)
    def web(self) -> None:
        """The server listens on the port itself."""

    @modal.exit()
    def stop(self) -> None:
        self.is_stopping = True
        stop_server(self.process, seconds=25)


def start_server(
    command: list[str], port: int, seconds: float, cwd: str | None = None
) -> subprocess.Popen[bytes]:
    """Starts a server and waits until it is ready.

    Args:
      seconds: how long it may take.
      cwd: the directory it runs in; None: this process's own.

    Raises:
      RuntimeError: it ended, or was not ready in time and was stopped; says which.
    """
    print("$", shlex.join(command), flush=True)
    process = subprocess.Popen(command, cwd=cwd)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}; its log says why")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return process
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    stop_server(process, seconds=10)
    raise RuntimeError(
        f"the server was not ready within {seconds:.0f} s; its log says how far it got"
    )


def stop_server(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Lets a server finish its answers for so long, then ends it; returns its exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def end_with(
    process: subprocess.Popen[bytes],
    is_meant: Callable[[], bool],
    end: Callable[[int], object] = os._exit,
) -> threading.Thread:
    """Ends the container when its server has ended by itself, so that another one takes its place."""

    def wait() -> None:
        code = process.wait()
        if not is_meant():
            print(f"the server ended with {code}: ending the container", flush=True)
            end(1)

    watcher = threading.Thread(target=wait, daemon=True)
    watcher.start()
    return watcher


@app.function(image=host_image, secrets=secrets, env=settings, cpu=4, timeout=60 * MINUTES)
def measure(url: str, flags: list[str]) -> None:
    """Runs the bench beside the server, so that no home connection is measured."""
    # By the environment, so that no log holds it.
    run(plan.bench(url, *flags), {**os.environ, "OPENAI_API_KEY": os.environ.get("API_KEY", "")})


@app.local_entrypoint()
def main(concurrency: str = "1,8,32,64", duration: float = 60.0) -> None:
    """Measures the server: modal run serving/modal_app.py --concurrency 64 --duration 60"""
    url = Server().web.get_web_url()  # pyright: ignore[reportCallIssue]
    measure.remote(url, ["--concurrency", concurrency, "--duration", str(duration)])


@app.local_entrypoint()
def prepare() -> None:
    """Fills the Volume: the published weights, the same as the devices read them, compiled steps."""
    for step in (download, convert, build):
        step.remote()


def describe() -> str:
    """What would run, for people: resources and commands, a line each."""
    key = f"secret {plan.secret} with API_KEY" if plan.secret else "no key: anybody may ask"
    lines = [
        f"download  {plan.repository} at {plan.revision} to {plan.published}",
        f"convert   {shlex.join(plan.convert())}",
        f"build     {shlex.join(plan.build())}",
        f"tune      {shlex.join(plan.build_on_gpus()) if plan.tune else 'no'}",
        f"serve     {shlex.join(plan.serve())}",
        f"on        {plan.gpu}, {plan.min_containers} to 1 containers, given back after {plan.idle} s without a request",
        f"access    {key}",
        f"measure   {shlex.join(plan.bench('https://…'))}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
    sys.exit(0)
