"""The front end's ceiling beside a bare loop and a FastAPI loop: in turn, on the same cores, as ratios.

Knows the servers by their endpoints only.

    python -m tests.perf.frontend --peers-python /path/to/venv/bin/python --json docs/frontend.json

All stream the same number of events of about the same size to the same client: ours from the mock
engine, through detokenizer, stop strings, parser and formatting; `bare` (Quart on Granian) sends
ready-made bytes; `fastapi` (on uvicorn with httptools and uvloop) dumps each event's JSON. Every
server is kept to one core and the client to another. Rounds alternate, and a ratio is of two runs
of the same round; beside tokens per second there are tokens per second of the server's own CPU
time, which other work on the machine hardly changes. The others send every token in an event of its
own; ours joins tokens that come faster than they can be written, so tokens per event are told too.
The other environment needs fastapi, uvicorn[standard]; without it that server is left out.
"""

import asyncio
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from serving.bench.frontend import cores_apart, make_sweep, mock_flags
from serving.bench.launch import LaunchedServer, free_port, launched, running
from serving.bench.machine import conditions
from serving.bench.options import COUNTS, DIRECTORY, FILE, RESULT
from serving.bench.prompts import Shape
from serving.bench.sweep import Nobody, carry_out, find_model

PEERS = Path(__file__).with_name("frontend_peers.py")
OURS = "glm-jax"


def servers(
    stack: ExitStack, model_dir: Path, concurrency: int, shape: Shape, peers_python: Path | None
) -> dict[str, LaunchedServer]:
    """Every contender, listening, each on the core that `cores_apart` gives to servers."""
    prefix = stack.enter_context(cores_apart())
    flags = mock_flags(concurrency, shape.prompt_len + shape.output_len)
    found = {OURS: stack.enter_context(launched(model_dir, flags, prefix=prefix))}
    pythons = {"bare": sys.executable}
    if peers_python is not None:
        pythons["fastapi"] = str(peers_python)
    for name, python in pythons.items():
        port = free_port()
        command = [*prefix, python, str(PEERS), name, str(port)]
        found[name] = stack.enter_context(running(command, port))
    for server in found.values():
        server.wait_for("/readyz", 120)
    return found


def measured(
    server: LaunchedServer, model_dir: Path, shape: Shape, concurrency: int, duration: float
) -> dict[str, Any]:
    """One run."""
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    model = asyncio.run(find_model(server.url))
    sweep = make_sweep(server.url, model, model_dir, shape, concurrency, duration)
    (summary,) = asyncio.run(carry_out(sweep, Nobody()))
    after = process.cpu_times()
    assert not summary["errors"], summary["error_examples"]
    # The warm-up's answers cost the server too.
    tokens = summary["output_tokens"] + concurrency * shape.output_len
    user, system = after.user - before.user, after.system - before.system
    num_events = summary["itl_ms"]["count"] + summary["completed"]
    return {
        "concurrency": concurrency,
        "output_throughput": summary["output_throughput"],
        "tokens_per_cpu_second": tokens / (user + system),
        "user_us_per_token": 1e6 * user / tokens,
        "system_us_per_token": 1e6 * system / tokens,
        "tokens_per_event": summary["output_tokens"] / num_events,
        "client_cores": summary["client"]["cpu_fraction"],
        "itl_p99_ms": summary["itl_ms"]["p99"],
    }


def ratios(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ours over each other, for each concurrency: medians over the rounds."""
    keyed = {(run["server"], run["concurrency"], run["round"]): run for run in runs}
    others = sorted({run["server"] for run in runs} - {OURS})
    for concurrency in sorted({run["concurrency"] for run in runs}):
        rounds = sorted({run["round"] for run in runs if run["concurrency"] == concurrency})
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


def show(runs: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    table = Table(title="tokens streamed, medians", title_justify="left")
    columns = {
        "tokens/s": ("output_throughput", 0),
        "user us per token": ("user_us_per_token", 2),
        "system us": ("system_us_per_token", 2),
        "tokens per event": ("tokens_per_event", 1),
        "client, cores": ("client_cores", 2),
    }
    for name in ("server", "streams", *columns):
        table.add_column(name, justify="right")
    for server, concurrency in dict.fromkeys((r["server"], r["concurrency"]) for r in runs):
        own = [r for r in runs if (r["server"], r["concurrency"]) == (server, concurrency)]
        cells = [
            f"{statistics.median(run[name] for run in own):,.{digits}f}"
            for name, digits in columns.values()
        ]
        table.add_row(server, str(concurrency), *cells)
    console = Console()
    console.print(table)
    for ratio in found:
        low, high = ratio["tokens_per_cpu_second_range"]
        console.print(
            f"{ratio['concurrency']} streams: {ratio['output_throughput']:.2f} x {ratio['over']}; "
            f"per CPU second {ratio['tokens_per_cpu_second']:.2f} x ({low:.2f} … {high:.2f})"
        )


@click.command()
@click.option("--model-dir", type=DIRECTORY, default="checkpoints/nano", help="For its tokenizer.")
@click.option("--concurrency", type=COUNTS, default=(64, 256), help="Streams at a time.")
@click.option("--output-len", type=int, default=512, help="Tokens of an answer.")
@click.option("--duration", type=float, default=8.0, help="Seconds of a run.")
@click.option("--rounds", type=int, default=5, help="Rounds.")
@click.option("--peers-python", type=FILE, help="Python that has fastapi and uvicorn.")
@click.option("--json", "json_path", type=RESULT, help="Write everything here.")
def main(
    model_dir: Path,
    concurrency: tuple[int, ...],
    output_len: int,
    duration: float,
    rounds: int,
    peers_python: Path | None,
    json_path: Path | None,
) -> None:
    """Measure the front end beside a bare loop and a FastAPI loop."""
    shape = Shape(prompt_len=16, output_len=output_len)
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        found = servers(stack, model_dir, max(concurrency), shape, peers_python)
        for round in range(rounds):
            for number in concurrency:
                for name, server in found.items():
                    run = measured(server, model_dir, shape, number, duration)
                    runs.append({"server": name, "round": round, **run})
                    click.echo(f"{round} {name} {number}: {run['output_throughput']:,.0f} tok/s")
    compared = list(ratios(runs))
    show(runs, compared)
    if json_path is not None:
        options = {"output_len": output_len, "duration": duration, "rounds": rounds}
        result = {"kind": "frontend-peers", **conditions(), "options": options}
        json_path.write_text(json.dumps({**result, "runs": runs, "ratios": compared}, indent=1))


if __name__ == "__main__":
    main()
