"""The command line: flags, environment variables, exit code.

Knows no room from inside: it reads what the user says and hands it to the wiring.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import uvloop

import checkpoints
from glm_jax.environment import prepare
from glm_jax.shapes import MAX_DRAFTS
from serving.app import HttpOptions
from serving.bridge import CannotStartError
from serving.gate import Access, Observe
from serving.operations import Profiler
from serving.server import Address
from serving.wiring import BuildEngine, Options, StartupError, mock_engine, run

_LOG_FORMAT = "%(asctime)s %(levelname)-8s %(name)s: %(message)s"
_COUNT = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=0)


def option(flag: str, default: Any, type: Any, help: str, env: str | None = None, **kwargs: Any):
    """A flag, and the environment variable of the same name in capitals."""
    variable = env or flag.removeprefix("--").replace("-", "_").upper()
    kwargs.setdefault("show_default", default is not None)
    return click.option(
        flag,
        default=default,
        type=type,
        help=help,
        envvar=variable,
        show_envvar=True,
        **kwargs,
    )


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(file_okay=False, path_type=Path)
_LEVELS = click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False)


@click.group(context_settings={"max_content_width": 100})
def main() -> None:
    """GLM-4.7 in JAX, behind OpenAI endpoints."""


@main.command("serve")
@option(
    "--model-dir",
    None,
    _DIRECTORY,
    "Directory of the model, published or converted.",
    show_default="./model, else the bundled nano",
)
@option(
    "--engine",
    None,
    _DIRECTORY,
    "Directory of steps compiled by python -m glm_jax.aot build: nothing is compiled at the start.",
    env="ENGINE_PATH",
)
@option(
    "--engine-fallback",
    False,
    bool,
    "Compile if the engine is for something else, in place of an error.",
    is_flag=True,
)
@option("--host", "0.0.0.0", str, "Address to listen on.")
@option("--port", 5000, click.IntRange(1, 65535), "Port to listen on.")
@option("--max-concurrency", 64, _COUNT, "Requests that generate at the same time.")
@option("--max-batch-tokens", 32768, _COUNT, "Prompt tokens of one prefill step.")
@option("--max-seq-len", 4096, click.IntRange(min=2), "Tokens of prompt and completion together.")
@option("--max-new-tokens", 2048, _COUNT, "Tokens of a completion.")
@option("--max-prompt-tokens", 2048, _COUNT, "Tokens of a prompt.")
@option("--num-gpus", 8, _COUNT, "Devices of the mesh; on CPU as many of them as exist.")
@option("--coordinator", None, str, "HOST:PORT of process 0, where several share the devices.")
@option("--num-processes", 1, _COUNT, "Processes that share the devices; all are started alike.")
@option("--process-id", 0, click.IntRange(min=0), "Which of them this is: 0 serves, others follow.")
@option("--log-level", "INFO", _LEVELS, "Least severity that is logged.")
@option("--queue-size", 256, click.IntRange(min=0), "Requests that may wait for a slot.")
@option("--queue-timeout", 0.0, _SECONDS, "Seconds a request may wait to begin; 0: no limit.")
@option(
    "--integrity-interval",
    1000,
    click.IntRange(min=0),
    "Steps between two checks of the account of slots and pages; 0: never.",
)
@option(
    "--load-format",
    "auto",
    click.Choice(["auto", "dummy"]),
    "Where weights come from; dummy: random, of the right shapes.",
)
@option(
    "--load-readers",
    4,
    click.IntRange(1, 256),
    "Reads of weights at a time; a network volume may want many more.",
)
@option(
    "--kv-cache-dtype",
    "auto",
    click.Choice(["auto", "bf16", "fp8_e4m3"]),
    "Of keys and values; auto: as the activations. FP8 holds twice the tokens, less exactly.",
)
@option(
    "--speculative-tokens",
    0,
    click.IntRange(0, MAX_DRAFTS),
    "Tokens that the model's MTP layer guesses in each decode step; answers stay the same.",
)
@option(
    "--decode-steps",
    1,
    _COUNT,
    "Tokens that the device decodes in a row while nobody waits. More of them ask the host less "
    "often, and let a new request wait longer.",
)
@option(
    "--allow-reference-ops",
    False,
    bool,
    "On GPUs, run what has no kernel as a plain operation, many times slower, in place of an error.",
    is_flag=True,
)
@option(
    "--served-model-name",
    (),
    str,
    "Name of the model for clients; may be repeated. [default: the directory's name]",
    multiple=True,
)
@option("--mock", False, bool, "No model: stream deterministic tokens.", is_flag=True)
@option("--mock-rate", 50.0, click.FloatRange(min=0), "Tokens per second and stream; 0: no limit.")
@option("--tls-cert", None, _FILE, "PEM file with the certificate chain, for HTTPS.")
@option("--tls-key", None, _FILE, "PEM file with its private key.")
@option("--api-key", (), str, "Key that clients must send; may be repeated.", multiple=True)
@option("--api-key-file", None, _FILE, "File with such keys, one a line.")
@option("--cors-origin", (), str, "Origin whose pages may ask, or *.", multiple=True)
@option("--max-body-mb", 16, _COUNT, "Megabytes of a request's body.")
@option("--header-timeout", 30.0, _SECONDS, "Seconds for a request's head to come.")
@option("--body-timeout", 60.0, _SECONDS, "Seconds for its body to come.")
@option("--keep-alive", 15.0, _SECONDS, "Seconds after which a silent stream says so; 0: never.")
@option("--access-log", False, bool, "Log every request as a line of JSON.", is_flag=True)
@option(
    "--otlp-endpoint", None, str, "Collector of OpenTelemetry traces, such as http://host:4318."
)
@option("--profile-dir", None, _DIRECTORY, "Where /start_profile writes; without it, it is off.")
def serve(**flags: Any) -> None:
    """Serve a model over HTTP."""
    level = flags.pop("log_level").upper()
    flags["model_dir"] = flags["model_dir"] or _model_at_hand()
    prepare()
    logging.basicConfig(level=level, format=_LOG_FORMAT)
    if level == "INFO":
        logging.getLogger("jax").setLevel("WARNING")  # it tells which back ends are not there
    if (flags["tls_cert"] is None) != (flags["tls_key"] is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if flags["speculative_tokens"] and flags["decode_steps"] > 1:
        raise click.UsageError("--speculative-tokens and --decode-steps exclude each other")
    if (flags["num_processes"] > 1) != (flags["coordinator"] is not None):
        raise click.UsageError("--coordinator and --num-processes go together")
    if flags["process_id"] >= flags["num_processes"]:
        raise click.UsageError("--process-id must be less than --num-processes")
    address = Address(
        host=flags.pop("host"),
        port=flags.pop("port"),
        certificate=flags.pop("tls_cert"),
        key=flags.pop("tls_key"),
        header_timeout=flags.pop("header_timeout"),
    )
    http, profiler = _http_options(flags), _profiler(flags)
    build = _engine_builder(flags.pop("mock"), flags.pop("mock_rate"))
    names = flags.pop("served_model_name")
    options = Options(address=address, served_model_names=names, http=http, **flags)
    for name in sorted(flags):
        logging.getLogger("serving").info("%s = %s", name, flags[name])
    if options.process_id > 0:
        sys.exit(_follow(options))
    try:
        code = uvloop.run(run(options, build, profiler))
    except StartupError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(code)


def _follow(options: Options) -> int:
    from serving.model_engine import follow  # JAX takes seconds, which --mock need not wait

    try:
        follow(options)
    except CannotStartError as error:
        logging.getLogger("serving").critical("this process cannot follow: %s", error)
        return 1
    return 0


def _model_at_hand() -> Path:
    here = Path("model")
    return here if here.is_dir() else Path(checkpoints.__file__).with_name("nano")


def _http_options(flags: dict[str, Any]) -> HttpOptions:
    """Takes the flags that concern clients out of all flags."""
    file = flags.pop("api_key_file")
    lines = file.read_text().splitlines() if file else []
    keys = [key.strip() for key in (*flags.pop("api_key"), *lines)]
    is_logged = flags.pop("access_log")
    if is_logged:
        _log_access()
    return HttpOptions(
        access=Access(
            api_keys=tuple(key for key in keys if key),
            cors_origins=flags.pop("cors_origin"),
            is_logged=is_logged,
        ),
        max_body_bytes=flags.pop("max_body_mb") * 2**20,
        body_timeout=flags.pop("body_timeout"),
        keep_alive=flags.pop("keep_alive"),
        observe=_tracing(flags.pop("otlp_endpoint")),
    )


def _tracing(endpoint: str | None) -> Observe | None:
    """What makes traces, where they are asked for."""
    if endpoint is None:
        return None
    try:
        from serving import tracing  # an extra, which nobody else needs

        return tracing.to_collector(endpoint)
    except ImportError as error:
        message = "--otlp-endpoint needs the packages of the extra otel: make env EXTRAS=otel"
        raise click.UsageError(f"{message} ({error})") from error


def _log_access() -> None:
    """Lines of JSON to the standard output, apart from all other logs."""
    log = logging.getLogger("serving.access")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel("INFO")
    log.propagate = False


def _profiler(flags: dict[str, Any]) -> Profiler | None:
    directory = flags.pop("profile_dir")
    if directory is None or flags["mock"]:
        return None
    from serving.profiling import JaxProfiler  # JAX takes seconds, which --mock need not wait

    return JaxProfiler(directory)


def _engine_builder(mock: bool, mock_rate: float) -> BuildEngine:
    if mock:
        return partial(mock_engine, rate=mock_rate)
    from serving.model_engine import build_engine  # JAX takes seconds, which --mock need not wait

    return build_engine


if __name__ == "__main__":
    main(prog_name="python -m serving")
