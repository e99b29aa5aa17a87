"""The command line's measurements without a load of one's own: `startup`, `frontend`, `decode`, `page`.

Knows no measurement from inside, and imports one when it is asked for.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from glm_jax.command_line import Command, flag
from serving.bench.options import COUNTS, DIRECTORY, RESULT

if TYPE_CHECKING:
    from serving.bench.startup import Phases

_COUNT = click.IntRange(min=1)

_model_dir = flag(
    "--model-dir",
    metavar="DIR",
    type=DIRECTORY,
    default="checkpoints/nano",
    help="Directory of the model.",
)
_json = flag("--json", "json_path", metavar="FILE", type=RESULT, help="Write everything here.")
_prompt_len = flag(
    "--prompt-len", metavar="TOKENS", type=_COUNT, default=128, help="Tokens of a prompt."
)
_output_len = flag(
    "--output-len", metavar="TOKENS", type=_COUNT, default=128, help="Tokens of an answer."
)


_EXAMPLES = {
    "startup": (
        (
            "Two cold starts of the bundled model, and three warm ones.",
            "python -m serving.bench startup --cold 2 --warm 3 --serve-flags '--num-gpus 1'",
        ),
    ),
    "frontend": (
        ("64 and 256 streams at a time.", "python -m serving.bench frontend --concurrency 64,256"),
    ),
    "decode": (
        (
            "Random weights of the published shapes, kept as JSON.",
            "python -m serving.bench decode --model-dir /models/GLM-4.7-FP8 --load-format dummy \\\n"
            "  --concurrency 1,64,256 --json decode.json",
        ),
    ),
    "page": (("The page of this checkout.", "python -m serving.bench page docs"),),
}


@click.command("startup", cls=Command, examples=_EXAMPLES["startup"])
@_model_dir
@flag("--serve-flags", metavar="FLAGS", default="", help="Flags of the server.")
@flag("--cold", metavar="STARTS", type=_COUNT, default=1, help="Cold starts.")
@flag("--warm", metavar="STARTS", type=click.IntRange(min=0), default=2, help="Warm starts.")
@_json
def startup_command(
    model_dir: Path, serve_flags: str, cold: int, warm: int, json_path: Path | None
) -> None:
    """Measure a server's start, cold and warm, by phase."""
    from rich.console import Console
    from rich.table import Table

    from serving.bench import startup
    from serving.bench.launch import ServerError

    def show(kind: str, phases: Phases) -> None:
        click.echo(f"{kind}: ready after {phases['ready']:.2f} s", err=True)

    try:
        starts = startup.measure(
            model_dir, shlex.split(serve_flags), num_cold=cold, num_warm=warm, on_start=show
        )
    except (ServerError, OSError) as error:
        _fail(str(error))
    middles = {kind: startup.medians(found) for kind, found in starts.items() if found}
    table = Table(title=f"seconds to start, {model_dir}", title_justify="left")
    table.add_column("")
    for kind in middles:
        table.add_column(f"{kind}, median of {len(starts[kind])}", justify="right")
    for phase in middles["cold"] | middles.get("warm", {}):
        cells = [f"{found[phase]:.2f}" if phase in found else "-" for found in middles.values()]
        table.add_row(phase, *cells)
    Console().print(table)
    options = {"model": model_dir.name, "serve_flags": serve_flags}
    _write(json_path, "startup", options, {"starts": starts, "medians": middles})


@click.command("frontend", cls=Command, examples=_EXAMPLES["frontend"])
@_model_dir
@flag(
    "--concurrency",
    metavar="REQUESTS",
    type=COUNTS,
    default=(64, 256),
    help="Streams, as in 64,256.",
)
@_prompt_len
@flag("--output-len", metavar="TOKENS", type=_COUNT, default=512, help="Tokens of an answer.")
@flag(
    "--duration",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=15.0,
    help="Seconds a run.",
)
@_json
def frontend_command(
    model_dir: Path,
    concurrency: tuple[int, ...],
    prompt_len: int,
    output_len: int,
    duration: float,
    json_path: Path | None,
) -> None:
    """Measure the server's ceiling: tokens streamed with no model, as fast as it can."""
    import uvloop
    from rich.console import Console

    from serving.bench import frontend, report
    from serving.bench.launch import ServerError
    from serving.bench.live import ProgressBar
    from serving.bench.prompts import Shape

    shape = Shape(prompt_len=prompt_len, output_len=output_len)
    try:
        with ProgressBar(Console(stderr=True), len(concurrency)) as watcher:
            summaries = uvloop.run(
                frontend.measure(model_dir, concurrency, shape, duration, watcher)
            )
    except ServerError as error:
        _fail(str(error))
    report.show(summaries, Console())
    options = {"model": model_dir.name, "prompt_len": prompt_len, "output_len": output_len}
    _write(json_path, "frontend", options, {"runs": summaries})
    sys.exit(int(any(summary["errors"] for summary in summaries)))


@click.command("decode", cls=Command, examples=_EXAMPLES["decode"])
@_model_dir
@flag(
    "--concurrency",
    metavar="REQUESTS",
    type=COUNTS,
    default=(1, 4, 16, 32),
    help="Requests at a time.",
)
@_prompt_len
@_output_len
@flag(
    "--rounds",
    metavar="ROUNDS",
    type=_COUNT,
    default=3,
    help="Rounds that count, for each concurrency.",
)
@flag("--num-gpus", metavar="DEVICES", type=_COUNT, default=8, help="Devices of the mesh.")
@flag(
    "--load-format", type=click.Choice(["auto", "dummy"]), default="auto", help="As of the server."
)
@flag("--seed", metavar="NUMBER", type=click.IntRange(min=0), default=0, help="Of the prompts.")
@_json
def decode_command(
    model_dir: Path,
    concurrency: tuple[int, ...],
    prompt_len: int,
    output_len: int,
    rounds: int,
    num_gpus: int,
    load_format: str,
    seed: int,
    json_path: Path | None,
) -> None:
    """Measure the engine alone, without HTTP: an engine of its own for each concurrency."""
    from rich.console import Console
    from rich.table import Table

    from serving.bench import decode
    from serving.bench.prompts import Shape
    from serving.bridge import CannotStartError

    logging.basicConfig(level="WARNING")
    shape = Shape(prompt_len=prompt_len, output_len=output_len)
    found: list[dict[str, Any]] = []
    for number in concurrency:
        options = decode.options_for(
            model_dir,
            max_concurrency=number,
            length=prompt_len + output_len,
            num_gpus=num_gpus,
            load_format=load_format,
        )
        phases: dict[str, float] = {}
        try:
            with decode.built(options, phases) as bench:
                results = [
                    bench.round(
                        decode.prompts_of(model_dir, shape, number, seed + index),
                        output_len,
                        f"round-{index}",
                    )
                    for index in range(rounds + 1)
                ]
        except (decode.EngineFailedError, CannotStartError, ValueError) as error:
            _fail(str(error))
        found.append({"concurrency": number, **decode.middle(results[1:])})
        found[-1] |= {"rounds": results[1:], "startup": phases}
    table = Table(title=f"the engine alone, {model_dir}", title_justify="left")
    for name in ("at a time", "decode tok/s", "of rounds", "output tok/s", "step, ms", "TTFT, ms"):
        table.add_column(name, justify="right")
    for row in found:
        low, high = row["decode_throughput_range"]
        table.add_row(
            str(row["concurrency"]),
            f"{row['decode_throughput']:,.1f}",
            f"{low:,.0f} … {high:,.0f}",
            f"{row['output_throughput']:,.1f}",
            f"{row['step_ms']:.2f}",
            f"{row['ttft_ms']:.1f}",
        )
    Console().print(table)
    told = {"model": model_dir.name, "prompt_len": prompt_len, "output_len": output_len}
    _write(json_path, "decode", told, {"runs": found})


@click.command("page", cls=Command, examples=_EXAMPLES["page"])
@click.argument("directory", type=DIRECTORY)
def page_command(directory: Path) -> None:
    """Write DIRECTORY/benchmarks.md from the measurements in DIRECTORY/results/*.json."""
    from serving.bench import page
    from serving.bench.chart import NoMatplotlibError

    try:
        click.echo(f"wrote {page.write(directory)}")
    except (page.PageError, NoMatplotlibError) as error:
        raise click.ClickException(str(error)) from error


def _fail(message: str) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(3)


def _write(path: Path | None, kind: str, options: Any, result: dict[str, Any]) -> None:
    from serving.bench.machine import conditions

    if path is not None:
        whole = {"kind": kind, **conditions(), "options": options, **result}
        path.write_text(json.dumps(whole, indent=1) + "\n")
