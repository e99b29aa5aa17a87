"""A load as the flags say it: made, carried out, shown and written.

Knows no measurement from inside.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import click
import uvloop
from rich.console import Console

from serving.bench import chart, prompts, report
from serving.bench.client import Target
from serving.bench.launch import LaunchedServer, ServerError, launched
from serving.bench.live import ProgressBar
from serving.bench.load import Load
from serving.bench.machine import conditions
from serving.bench.summary import Summary
from serving.bench.sweep import Sweep, UnreachableError, carry_out, find_model

_START_SECONDS = 3600.0
_ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def measure(flags: dict[str, Any]) -> int:
    """Measures, and returns the exit code.

    Raises:
      click.UsageError: the flags contradict each other.
    """
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
