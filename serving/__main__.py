"""The command line: flags, environment variables, exit code.

Knows no room from inside: it reads what the user says and hands it to the wiring. What it needs for
that is imported where it is needed, so that --help and a wrong flag are answered at once.
"""

from __future__ import annotations

import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import checkpoints
from glm_jax.command_line import Group
from serving.flags import DEFAULT_SEQ_LEN, DEFAULT_SHARE, EXAMPLES, serve_flags

if TYPE_CHECKING:
    from serving.app import HttpOptions
    from serving.gate import Observe
    from serving.operations import Profiler
    from serving.wiring import BuildEngine, Options

_BEGAN = time.perf_counter()


@click.group(cls=Group, context_settings={"max_content_width": 100})
def main() -> None:
    """GLM-4.7 in JAX, behind OpenAI endpoints."""


@main.command("serve", examples=EXAMPLES)
@serve_flags
def serve(**flags: Any) -> None:
    """Serve a model over HTTP: the bundled one where nothing is said.

    Every flag is an environment variable too; what the command line says goes before it.
    """
    _check(flags)
    import uvloop

    from glm_jax.environment import prepare
    from serving.logs import set_up
    from serving.wiring import StartupError, run

    prepare()
    set_up(flags.pop("log_level").upper(), flags.pop("log_format"), sys.stderr)
    flags["model_dir"] = flags["model_dir"] or _model_at_hand()
    profiler = _profiler(flags)
    build = _engine_builder(flags.pop("mock"), flags.pop("mock_rate"))
    options = _options(flags)
    if options.process_id > 0:
        sys.exit(_follow(options))
    try:
        code = uvloop.run(run(options, build, profiler, _BEGAN))
    except StartupError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(code)


def _check(flags: dict[str, Any]) -> None:
    """Refuses flags that do not go together."""
    if (flags["tls_cert"] is None) != (flags["tls_key"] is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if flags["speculative_tokens"] and flags["decode_steps"] > 1:
        raise click.UsageError("--speculative-tokens and --decode-steps exclude each other")
    if (flags["num_processes"] > 1) != (flags["coordinator"] is not None):
        raise click.UsageError("--coordinator and --num-processes go together")
    if flags["process_id"] >= flags["num_processes"]:
        raise click.UsageError("--process-id must be less than --num-processes")


def _options(flags: dict[str, Any]) -> Options:
    """The flags as the wiring wants them; says in the log which are not as they are by default."""
    from serving.server import Address
    from serving.wiring import Options

    http = _http_options(flags)
    _log_flags(flags)
    share = DEFAULT_SHARE
    if flags["max_seq_len"] > DEFAULT_SEQ_LEN:
        share = flags["max_seq_len"]
    for name in ("max_prompt_tokens", "max_new_tokens"):
        flags[name] = flags[name] or share
    address = Address(
        host=flags.pop("host"),
        port=flags.pop("port"),
        certificate=flags.pop("tls_cert"),
        key=flags.pop("tls_key"),
        header_timeout=flags.pop("header_timeout"),
    )
    names = flags.pop("served_model_name")
    return Options(address=address, served_model_names=names, http=http, **flags)


def _log_flags(flags: dict[str, Any]) -> None:
    """Those that were set in one line; no key is among them."""
    defaults = {each.name: each.default for each in serve.params}
    changed = {name: value for name, value in flags.items() if value != defaults[name]}
    words = ", ".join(f"{name} = {value}" for name, value in sorted(changed.items()))
    told = {"flags": flags}
    logging.getLogger("serving").info("flags: %s", words or "none", extra={"facts": told})


def _follow(options: Options) -> int:
    from serving.bridge import CannotStartError
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
    from serving.app import HttpOptions
    from serving.gate import Access

    file = flags.pop("api_key_file")
    lines = file.read_text().splitlines() if file else []
    given = [key.strip() for key in flags.pop("api_key")]
    keys = [key for key in (*given, *map(str.strip, lines)) if key]
    if not keys and (given or file):
        # Whoever says that there are keys does not want to be open to all for a slip.
        raise click.UsageError(f"{file or '--api-key'} holds no key")
    is_logged = flags.pop("access_log")
    if is_logged:
        _log_access()
    return HttpOptions(
        access=Access(
            api_keys=tuple(keys),
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
        from serving.wiring import mock_engine

        return partial(mock_engine, rate=mock_rate)
    from serving.model_engine import build_engine  # JAX takes seconds, which --mock need not wait

    return build_engine


if __name__ == "__main__":
    main(prog_name="python -m serving")
