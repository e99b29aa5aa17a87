"""The flags of `serve`: what each is for, in which unit, and the environment variable of the same name.

Knows not what is done with them, and loads no package of ours but for one number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from glm_jax.command_line import flag
from glm_jax.shapes import MAX_DRAFTS

_COUNT = click.IntRange(min=1)
_FROM_ZERO = click.IntRange(min=0)
_SECONDS = click.FloatRange(min=0)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(file_okay=False, path_type=Path)
_LEVELS = click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False)


def _option(
    name: str, default: Any, help: str, group: str, env: str | None = None, **kwargs: Any
) -> Callable[[Any], Any]:
    """A flag; its variable is its name in capitals, but where `env` says another."""
    variable = env or name.removeprefix("--").replace("-", "_").upper()
    if isinstance(default, bool):
        kwargs["is_flag"] = True
    return flag(name, default=default, help=help, group=group, envvar=variable, **kwargs)


# Tokens that a prompt or a completion may have where nothing is said of it: a share of a conversation
# as long as it is by default, all of one that was asked to be longer.
DEFAULT_SEQ_LEN, DEFAULT_SHARE = 4096, 2048
_SHARE = f"{DEFAULT_SHARE}; where --max-seq-len is above {DEFAULT_SEQ_LEN}, all of it"

_model = partial(_option, group="The model")
_sizes = partial(_option, group="How much at a time")
_speed = partial(_option, group="How it computes")
_devices = partial(_option, group="Devices and processes")
_address = partial(_option, group="Address")
_clients = partial(_option, group="Clients")
_watching = partial(_option, group="Watching it")
_trying = partial(_option, group="Without a model")

FLAGS = (
    _model(
        "--model-dir", None, "Directory of the model, published or converted.",
        type=_DIRECTORY, metavar="DIR", show_default="./model, else the bundled nano",
    ),
    _model(
        "--engine", None,
        "Directory of steps that python -m glm_jax.aot build made: nothing is compiled at the start.",
        type=_DIRECTORY, metavar="DIR", env="ENGINE_PATH",
    ),
    _model(
        "--engine-fallback", False,
        "Compile where that engine is for something else, rather than end with an error.",
    ),
    _model(
        "--load-format", "auto",
        "auto: the weights in DIR. dummy: random ones of the same shapes, to measure with no weights.",
        type=click.Choice(["auto", "dummy"]),
    ),
    _model(
        "--load-readers", 4, "Reads of weights at a time. A disk is busy with 4; a network volume "
        "may want many more.",
        type=click.IntRange(1, 256), metavar="READS",
    ),
    _model(
        "--served-model-name", (), "Name of the model for clients; may be repeated.",
        type=str, multiple=True, metavar="NAME", show_default="the directory's name",
    ),
    _sizes(
        "--max-concurrency", 64,
        "Requests that generate at the same time. More of them: more tokens a second in all, more "
        "pages, and each answer slower.",
        type=_COUNT, metavar="REQUESTS",
    ),
    _sizes(
        "--max-seq-len", DEFAULT_SEQ_LEN, "Prompt and completion together, at most. Longer ones take more pages.",
        type=click.IntRange(min=2), metavar="TOKENS",
    ),
    _sizes(
        "--max-prompt-tokens", None, "A prompt, at most.",
        type=_COUNT, metavar="TOKENS", show_default=_SHARE,
    ),
    _sizes(
        "--max-new-tokens", None, "A completion, at most.",
        type=_COUNT, metavar="TOKENS", show_default=_SHARE,
    ),
    _sizes(
        "--max-batch-tokens", 32768,
        "Prompt tokens of one prefill step. Fewer: answers under way wait less for long prompts.",
        type=_COUNT, metavar="TOKENS",
    ),
    _sizes(
        "--queue-size", 256, "Requests that may wait for a slot; the next one gets 429.",
        type=_FROM_ZERO, metavar="REQUESTS",
    ),
    _sizes(
        "--queue-timeout", 0.0, "Wait of a request to begin, before it gets 503; 0: no limit.",
        type=_SECONDS, metavar="SECONDS",
    ),
    _speed(
        "--kv-cache-dtype", "auto",
        "Of keys and values; auto: as the activations. FP8 holds twice the tokens, less exactly.",
        type=click.Choice(["auto", "bf16", "fp8_e4m3"]), metavar="DTYPE",
        show_default="auto; or bf16, fp8_e4m3",
    ),
    _speed(
        "--speculative-tokens", 0,
        "Tokens that the model's MTP layer guesses in each decode step: faster where few answers run; "
        "the answers stay the same.",
        type=click.IntRange(0, MAX_DRAFTS), metavar="TOKENS",
    ),
    _speed(
        "--decode-steps", 1,
        "Tokens that the device decodes in a row while nobody waits. More of them ask the host less "
        "often, and let a new request wait longer.",
        type=_COUNT, metavar="TOKENS",
    ),
    _speed(
        "--allow-reference-ops", False,
        "On GPUs, run what has no kernel as a plain operation, many times slower, rather than end "
        "with an error.",
    ),
    _speed(
        "--plain-ops", False,
        "On a CPU, run XLA's operations rather than those in C, several times slower, as happens by "
        "itself where there is no C compiler.",
    ),
    _speed(
        "--integrity-interval", 1000,
        "Steps between two checks of the account of slots and pages; 0: never.",
        type=_FROM_ZERO, metavar="STEPS",
    ),
    _devices(
        "--num-gpus", 8, "Devices of the mesh, those of all processes; on CPU as many as exist.",
        type=_COUNT, metavar="DEVICES",
    ),
    _devices(
        "--plain-sums", False,
        "Sum over devices by NCCL alone, slower, where a kernel may not write into the memory of "
        "another device.",
    ),
    _devices(
        "--coordinator", None,
        "Address of process 0, where several share the devices; the port above it is used too.",
        type=str, metavar="HOST:PORT",
    ),
    _devices(
        "--num-processes", 1, "That share the devices; all are started alike but for their number.",
        type=_COUNT, metavar="PROCESSES",
    ),
    _devices(
        "--process-id", 0, "Which of them this is: 0 serves, the others compute the same steps.",
        type=_FROM_ZERO, metavar="NUMBER",
    ),
    _address("--host", "0.0.0.0", "To listen on; 127.0.0.1: this machine alone.", type=str, metavar="ADDRESS"),
    _address("--port", 5000, "To listen on.", type=click.IntRange(1, 65535), metavar="PORT"),
    _address("--tls-cert", None, "PEM file with the certificate chain, for HTTPS.", type=_FILE, metavar="FILE"),
    _address("--tls-key", None, "PEM file with its private key.", type=_FILE, metavar="FILE"),
    _clients(
        "--api-key", (), "That clients must send; may be repeated. Better in the variable or a file: "
        "other users of a machine see its command lines.",
        type=str, multiple=True, metavar="KEY",
    ),
    _clients("--api-key-file", None, "File with such keys, one a line.", type=_FILE, metavar="FILE"),
    _clients(
        "--cors-origin", (), "Origin whose pages may ask, or *; may be repeated.",
        type=str, multiple=True, metavar="ORIGIN",
    ),
    _clients("--max-body-mb", 16, "Of a request's body.", type=_COUNT, metavar="MEGABYTES"),
    _clients("--header-timeout", 30.0, "For a request's head to come.", type=_SECONDS, metavar="SECONDS"),
    _clients("--body-timeout", 60.0, "For its body to come.", type=_SECONDS, metavar="SECONDS"),
    _clients(
        "--keep-alive", 15.0, "After which a silent stream says that it lives; 0: never.",
        type=_SECONDS, metavar="SECONDS",
    ),
    _watching(
        "--log-level", "INFO", "Least severity that is logged: debug, info, warning or error.",
        type=_LEVELS, metavar="LEVEL",
    ),
    _watching(
        "--log-format", "auto",
        "auto: with colors and progress bars on a terminal (NO_COLOR: no colors), else text. text: "
        "plain lines. json: an object a line, for collectors.",
        type=click.Choice(["auto", "text", "json"]), metavar="FORMAT",
    ),
    _watching("--access-log", False, "Write a line of JSON for every request, to the standard output."),
    _watching(
        "--otlp-endpoint", None, "Collector of OpenTelemetry traces, such as http://host:4318.",
        type=str, metavar="URL",
    ),
    _watching(
        "--profile-dir", None, "Where /start_profile writes; without it, it is off.",
        type=_DIRECTORY, metavar="DIR",
    ),
    _trying("--mock", False, "Stream deterministic tokens: the front end alone."),
    _trying(
        "--mock-rate", 50.0, "Tokens a second in each stream; 0: as fast as it can.",
        type=_SECONDS, metavar="TOKENS",
    ),
)  # fmt: skip

EXAMPLES = (
    ("The bundled model on port 5000, on whatever this machine has.", "python -m serving serve"),
    (
        "GLM-4.7 on eight GPUs, for clients with a key, with steps compiled beforehand.",
        "python -m serving serve --model-dir /models/GLM-4.7-FP8-b200x8 --engine /models/engine-b200x8 \\\n"
        "  --max-concurrency 256 --max-seq-len 8192 --api-key-file keys.txt",
    ),
    (
        "Few users who want each answer soon: the MTP layer guesses two tokens a step.",
        "python -m serving serve --max-concurrency 8 --speculative-tokens 2",
    ),
    (
        "No weights yet: random ones of the published shapes, to see speed and memory.",
        "python -m serving serve --model-dir /models/GLM-4.7-FP8 --load-format dummy",
    ),
    (
        "No model at all: the front end, for whoever writes a client.",
        "python -m serving serve --mock --mock-rate 100",
    ),
)


def serve_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command all of them, in this order."""
    for decorate in reversed(FLAGS):
        command = decorate(command)
    return command
