"""The command line: load on a server, and `startup`, `frontend`, `decode`, `page`; flags, files, exit code.

Knows no measurement from inside.

Exit codes: 0, all requests were answered whole; 1, some were not; 2, the command line is wrong; 3,
the server could not be reached, was given up, or does not start; 130, interrupted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import click
import uvloop
from rich.console import Console

from serving.bench import chart, prompts, report
from serving.bench.client import Target
from serving.bench.commands import decode_command, frontend_command, page_command, startup_command
from serving.bench.launch import LaunchedServer, ServerError, launched
from serving.bench.live import ProgressBar
from serving.bench.load import Load
from serving.bench.machine import conditions
from serving.bench.options import COUNTS, DIRECTORY, FILE, RATES, RESULT, SLO
from serving.bench.summary import Summary
from serving.bench.sweep import Sweep, UnreachableError, carry_out, find_model

_POSITIVE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)
_START_SECONDS = 3600.0
_ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@click.group(
    invoke_without_command=True,
    context_settings={"max_content_width": 100, "show_default": True},
)
@click.option("--url", default="http://127.0.0.1:5000", help="Server to measure.")
@click.option("--model-dir", type=DIRECTORY, help="Start a server of this model instead.")
@click.option("--serve-flags", default="", help='Its flags, as in "--max-concurrency 32".')
@click.option("--model", help="Name of the model.  [default: the server's first]")
@click.option("--api-key", envvar="OPENAI_API_KEY", default="", help="Bearer token.")
@click.option("--duration", type=_POSITIVE, default=60.0, help="Seconds in which requests start.")
@click.option("--num-requests", type=_COUNT, help="End earlier, after so many.")
@click.option(
    "--concurrency", type=COUNTS, help="Requests at a time; several, as in 1,8,32, are a sweep.  "
    "[default: 32; with a rate: no limit]",
)  # fmt: skip
@click.option("--request-rate", type=RATES, help="Requests a second, instead; several are a sweep.")
@click.option(
    "--burstiness", type=_POSITIVE, default=1.0,
    help="Shape of the gamma distributed gaps at a rate: 1 Poisson, below burstier, above steadier.",
)  # fmt: skip
@click.option("--ramp", type=click.FloatRange(min=0), default=0.0, help="Seconds the load grows.")
@click.option("--ramp-rate", type=_POSITIVE, default=1.0, help="Rate that it grows from.")
@click.option(
    "--ramp-shape", type=click.Choice(["linear", "exponential"]), default="linear",
    help="How the rate grows.",
)  # fmt: skip
@click.option(
    "--warm-up", type=click.IntRange(min=0),
    help="Requests before each run that do not count.  [default: the concurrency]",
)  # fmt: skip
@click.option(
    "--dataset", type=click.Choice(["random", "shared-prefix", "file"]), default="random",
    help="What is asked.",
)  # fmt: skip
@click.option("--file", "path", type=FILE, help="JSON lines with messages or prompt, for file.")
@click.option("--prompt-len", type=_COUNT, default=128, help="Tokens of a prompt.")
@click.option(
    "--output-len", type=_COUNT, default=128, help="Tokens of an answer, at most for file."
)
@click.option(
    "--range-ratio", type=click.FloatRange(0, 1, max_open=True), default=0.0,
    help="Spread of both lengths: len*(1-r) … len*(1+r).",
)  # fmt: skip
@click.option("--prefix-len", type=_COUNT, default=64, help="Shared tokens, for shared-prefix.")
@click.option("--num-prefixes", type=_COUNT, default=4, help="Different ones of them.")
@click.option(
    "--tokenizer", type=DIRECTORY,
    help="Directory with tokenizer.json: random prompts are drawn from all of its text tokens.  "
    "[default: --model-dir, else tokens 100 … 999]",
)  # fmt: skip
@click.option(
    "--endpoint", type=click.Choice(list(_ENDPOINTS)),
    help="[default: completions; for a file what its lines are for]",
)  # fmt: skip
@click.option(
    "--ignore-eos/--no-ignore-eos", default=None,
    help="Answers of the full length.  [default: not for a file]",
)  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="Of the sampling.")
@click.option("--extra-body", default="{}", help="JSON object of further fields of each request.")
@click.option(
    "--goodput", "slos", type=SLO, multiple=True,
    help="ttft:MS, tpot:MS or e2e:MS: also count the answers that are as fast; may be repeated.",
)  # fmt: skip
@click.option("--timeout", type=_POSITIVE, default=600.0, help="Seconds for a whole answer.")
@click.option("--stall-timeout", type=_POSITIVE, default=60.0, help="Seconds without a byte.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of prompts and gaps.")
@click.option("--json", "json_path", type=RESULT, help="Write everything here.")
@click.option("--plot", type=RESULT, help="Draw latency over throughput here (.svg, .png).")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def main(context: click.Context, **flags: Any) -> None:
    """Measure a server: throughput and latencies under a load.

    \b
    python -m serving.bench                                  # the server on port 5000
    python -m serving.bench --model-dir checkpoints/nano --concurrency 1,4,16,32 --plot sweep.svg
    python -m serving.bench --request-rate 8 --burstiness 0.5 --goodput ttft:500 --goodput tpot:50
    """
    if context.invoked_subcommand is None:
        sys.exit(_measure(flags))


def _measure(flags: dict[str, Any]) -> int:
    console = Console(stderr=True)
    try:
        loads, fields, slos = _loads(flags), _fields(flags), dict(flags["slos"])
        path, make_prompts = _prompts(flags)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with ExitStack() as stack:
        try:
            url = flags["url"].rstrip("/")
            if flags["model_dir"] is not None:
                url = _start(stack, flags, console).url
            model = flags["model"] or asyncio.run(find_model(url, flags["api_key"]))
        except (ServerError, UnreachableError) as error:
            console.print(str(error), style="red", markup=False)
            return 3
        target = Target(
            url=url,
            path=path,
            model=model,
            api_key=flags["api_key"],
            timeout=flags["timeout"],
            stall_timeout=flags["stall_timeout"],
        )
        sweep = Sweep(target=target, loads=loads, prompts=make_prompts, fields=fields, slos=slos)
        watcher = stack.enter_context(
            ProgressBar(Console(stderr=True, quiet=flags["quiet"]), len(loads))
        )
        summaries = uvloop.run(carry_out(sweep, watcher))
    report.show(summaries, Console())
    _write(flags, target, summaries)
    return _exit_code(summaries)


def _start(stack: ExitStack, flags: dict[str, Any], console: Console) -> LaunchedServer:
    with console.status(f"starting a server of {flags['model_dir']}"):
        server = launched(flags["model_dir"], shlex.split(flags["serve_flags"]))
        process = stack.enter_context(server)
        process.wait_for("/readyz", _START_SECONDS)
    return process


def _loads(flags: dict[str, Any]) -> list[Load]:
    """The runs: of every rate, or of every concurrency."""
    rates: Sequence[float | None] = flags["request_rate"] or (None,)
    at_once: Sequence[int | None] = flags["concurrency"] or ((None,) if rates[0] else (32,))
    return [
        Load(
            duration=flags["duration"],
            concurrency=concurrency,
            rate=rate,
            burstiness=flags["burstiness"],
            ramp=flags["ramp"],
            ramp_rate=flags["ramp_rate"],
            is_ramp_exponential=flags["ramp_shape"] == "exponential",
            num_requests=flags["num_requests"],
            warm_up=(concurrency or 8) if flags["warm_up"] is None else flags["warm_up"],
            seed=flags["seed"],
        )
        for rate, concurrency in itertools.product(rates, at_once)
    ]


def _fields(flags: dict[str, Any]) -> prompts.Fields:
    extra = json.loads(flags["extra_body"])
    if not isinstance(extra, dict):
        raise ValueError("--extra-body must be a JSON object")
    ignores_eos = flags["ignore_eos"]
    if ignores_eos is None:
        ignores_eos = flags["dataset"] != "file"
    fields = {"temperature": flags["temperature"]}
    return {**fields, **({"ignore_eos": True} if ignores_eos else {}), **extra}


def _prompts(flags: dict[str, Any]) -> tuple[str, prompts.MakePrompts]:
    """The endpoint's path, and what to ask it."""
    if flags["dataset"] == "file":
        if flags["path"] is None:
            raise ValueError("--dataset file needs --file")
        found = prompts.read_prompts(flags["path"], flags["output_len"])
        kind = "chat" if "messages" in found[0] else "completions"
        if flags["endpoint"] not in (None, kind):
            raise ValueError(f"the prompts of {flags['path']} are for {kind}")
        return _ENDPOINTS[kind], lambda number: prompts.cycled(found, flags["seed"])
    shape = prompts.Shape(
        prompt_len=flags["prompt_len"],
        output_len=flags["output_len"],
        range_ratio=flags["range_ratio"],
        prefix_len=flags["prefix_len"] if flags["dataset"] == "shared-prefix" else 0,
        num_prefixes=flags["num_prefixes"] if flags["dataset"] == "shared-prefix" else 1,
    )
    vocabulary = prompts.Vocabulary(flags["tokenizer"] or flags["model_dir"])
    is_chat = flags["endpoint"] == "chat"
    if is_chat:
        vocabulary.text([])  # says now that a tokenizer is missing

    def make(number: int) -> Iterator[prompts.Fields]:
        seed = (flags["seed"], number)
        return prompts.random_prompts(shape, vocabulary, seed=seed, is_chat=is_chat)

    return _ENDPOINTS["chat" if is_chat else "completions"], make


def _write(flags: dict[str, Any], target: Target, summaries: Sequence[Summary]) -> None:
    if flags["json_path"]:
        options = {k: v for k, v in flags.items() if k not in ("api_key", "json_path", "plot")}
        result = {
            "kind": "load",
            **conditions(),
            "server": {"model": target.model, "path": target.path},
            "options": json.loads(json.dumps(options, default=str)),
            "runs": list(summaries),
        }
        flags["json_path"].write_text(json.dumps(result, indent=1) + "\n")
    if flags["plot"]:
        try:
            chart.draw(summaries, flags["plot"], f"{target.model}, {target.path}")
        except chart.NoMatplotlibError as error:
            raise click.ClickException(str(error)) from error


def _exit_code(summaries: Sequence[Summary]) -> int:
    given_up = summaries[-1]["given_up"]
    if given_up:
        return 130 if given_up in ("SIGINT", "SIGTERM") else 3
    return int(any(summary["errors"] for summary in summaries))


for command in (startup_command, frontend_command, decode_command, page_command):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="python -m serving.bench")
