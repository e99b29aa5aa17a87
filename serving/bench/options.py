"""The flags of a load, and kinds of values on the command line.

Knows not what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from glm_jax.command_line import flag

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
RESULT = click.Path(dir_okay=False, writable=True, path_type=Path)

SloValue = tuple[str, float]


class _List(click.ParamType):
    """Positive numbers with commas between them."""

    def __init__(self, name: str, type: type[int] | type[float]) -> None:
        self.name = name
        self._type = type

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._type(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not {self.name} with commas between", param, ctx)
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r} has a number that is not positive", param, ctx)
        return numbers


class _Slo(click.ParamType):
    """What may take how many milliseconds, as in ttft:500."""

    name = "NAME:MS"

    def convert(self, value: Any, param: Any, ctx: Any) -> SloValue:
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).partition(":")
        name = {"e2el": "e2e"}.get(name, name)
        if name not in ("ttft", "tpot", "e2e"):
            self.fail(f"{value!r}: {name!r} is none of ttft, tpot, e2e", param, ctx)
        try:
            return name, float(number)
        except ValueError:
            self.fail(f"{value!r}: {number!r} is no number of milliseconds", param, ctx)


COUNTS = _List("INTEGERS", int)
RATES = _List("NUMBERS", float)
SLO = _Slo()

_POSITIVE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)
_server = partial(flag, group="The server")
_load = partial(flag, group="The load")
_asked = partial(flag, group="What is asked")
_limits = partial(flag, group="What is fast enough")
_output = partial(flag, group="Output")

_LOAD_FLAGS = (
    _server("--url", default="http://127.0.0.1:5000", help="Server to measure.", metavar="URL"),
    _server(
        "--model-dir", type=DIRECTORY, help="Start a server of this model instead.", metavar="DIR"
    ),
    _server(
        "--serve-flags",
        default="",
        help='Its flags, as in "--max-concurrency 32".',
        metavar="FLAGS",
    ),
    _server(
        "--model", help="Name of the model.", show_default="the server's first", metavar="NAME"
    ),
    _server("--api-key", envvar="OPENAI_API_KEY", default="", help="Bearer token.", metavar="KEY"),
    _server(
        "--endpoint",
        type=click.Choice(["completions", "chat"]),
        help="What is asked for.",
        show_default="completions; for a file what its lines are for",
        metavar="KIND",
    ),
    _load(
        "--duration",
        type=_POSITIVE,
        default=60.0,
        help="Seconds in which requests start.",
        metavar="SECONDS",
    ),
    _load("--num-requests", type=_COUNT, help="End earlier, after so many.", metavar="REQUESTS"),
    _load(
        "--concurrency",
        type=COUNTS,
        help="Requests at a time; several, as in 1,8,32, are a sweep.",
        show_default="32; with a rate: no limit",
        metavar="REQUESTS",
    ),
    _load(
        "--request-rate",
        type=RATES,
        help="Requests a second, instead; several are a sweep.",
        metavar="RATE",
    ),
    _load(
        "--burstiness",
        type=_POSITIVE,
        default=1.0,
        help="Shape of the gamma distributed gaps at a rate: 1 Poisson, below burstier, above steadier.",
        metavar="SHAPE",
    ),
    _load(
        "--ramp",
        type=click.FloatRange(min=0),
        default=0.0,
        help="Seconds the load grows.",
        metavar="SECONDS",
    ),
    _load(
        "--ramp-rate", type=_POSITIVE, default=1.0, help="Rate that it grows from.", metavar="RATE"
    ),
    _load(
        "--ramp-shape",
        type=click.Choice(["linear", "exponential"]),
        default="linear",
        help="How the rate grows.",
        show_default="linear; or exponential",
        metavar="SHAPE",
    ),
    _load(
        "--warm-up",
        type=click.IntRange(min=0),
        help="Requests before each run that do not count.",
        show_default="the concurrency",
        metavar="REQUESTS",
    ),
    _asked(
        "--dataset",
        type=click.Choice(["random", "shared-prefix", "file"]),
        default="random",
        help="What is asked.",
        show_default="random; or shared-prefix, file",
        metavar="KIND",
    ),
    _asked(
        "--file",
        "path",
        type=FILE,
        help="JSON lines with messages or prompt, for file.",
        metavar="FILE",
    ),
    _asked("--prompt-len", type=_COUNT, default=128, help="Tokens of a prompt.", metavar="TOKENS"),
    _asked(
        "--output-len",
        type=_COUNT,
        default=128,
        help="Tokens of an answer, at most for file.",
        metavar="TOKENS",
    ),
    _asked(
        "--range-ratio",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        help="Spread of both lengths: len*(1-r) … len*(1+r).",
        metavar="SHARE",
    ),
    _asked(
        "--prefix-len",
        type=_COUNT,
        default=64,
        help="Shared tokens, for shared-prefix.",
        metavar="TOKENS",
    ),
    _asked(
        "--num-prefixes", type=_COUNT, default=4, help="Different ones of them.", metavar="NUMBER"
    ),
    _asked(
        "--tokenizer",
        type=DIRECTORY,
        help="Directory with tokenizer.json: random prompts are drawn from all of its text tokens.",
        show_default="--model-dir, else tokens 100 … 999",
        metavar="DIR",
    ),
    _asked(
        "--ignore-eos/--no-ignore-eos",
        default=None,
        help="Answers of the full length.",
        show_default="not for a file",
    ),
    _asked(
        "--temperature",
        type=click.FloatRange(0, 2),
        default=0.0,
        help="Of the sampling.",
        metavar="NUMBER",
    ),
    _asked(
        "--extra-body",
        default="{}",
        help="JSON object of further fields of each request.",
        metavar="JSON",
    ),
    _asked(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        help="Of prompts and gaps.",
        metavar="NUMBER",
    ),
    _limits(
        "--timeout",
        type=_POSITIVE,
        default=600.0,
        help="Seconds for a whole answer.",
        metavar="SECONDS",
    ),
    _limits(
        "--stall-timeout",
        type=_POSITIVE,
        default=60.0,
        help="Seconds without a byte.",
        metavar="SECONDS",
    ),
    _limits(
        "--goodput",
        "slos",
        type=SLO,
        multiple=True,
        help="ttft:MS, tpot:MS or e2e:MS: also count the answers that are as fast; may be repeated.",
    ),
    _output("--json", "json_path", type=RESULT, help="Write everything here.", metavar="FILE"),
    _output(
        "--plot",
        type=RESULT,
        help="Draw latency over throughput here (.svg, .png).",
        metavar="FILE",
    ),
    _output("--quiet", is_flag=True, help="No progress bar."),
)


def load_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of a load, in this order."""
    for decorate in reversed(_LOAD_FLAGS):
        command = decorate(command)
    return command
