"""The command line: plan a model on a machine that is not there, and compile it for one.

Knows no arithmetic: it reads what the user says and hands it on. JAX is imported by the command that
needs it, so that --help and a wrong flag are answered at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm_jax.aot.presets import PRESETS, find_config
from glm_jax.command_line import Group, flag
from glm_jax.shapes import MAX_DRAFTS
from glm_jax.targets.target import parse_target

if TYPE_CHECKING:
    from glm_jax.runner import Bucket
    from glm_jax.steps import StepOptions

_COUNT = click.IntRange(min=1)
_RESULT = click.Path(dir_okay=False, path_type=Path)
_what = partial(flag, group="What, and for which machine")
_limits = partial(flag, group="How much at a time, as of the server")
_speed = partial(flag, group="How it computes, as of the server")
_output = partial(flag, group="Output")

_MODEL_HELP = f"Directory with a config.json, or a published shape: {', '.join(PRESETS)}."
_TARGET_HELP = "b200, gb200, h200, h100 or cpu, then x and the number of devices."
_Decorator = Callable[[Any], Any]


def _model_and_target(**model: Any) -> list[_Decorator]:
    target = model.pop("target")
    return [
        _what("--config", "model", metavar="MODEL", help=_MODEL_HELP, **model),
        _what("--target", metavar="MACHINE", default=target, help=_TARGET_HELP),
    ]


def _server_limits(concurrency: int, length: int, batch: int) -> list[_Decorator]:
    return [
        _limits(
            "--max-concurrency", default=concurrency, type=_COUNT, metavar="REQUESTS",
            help="Requests that generate at the same time.",
        ),
        _limits(
            "--max-seq-len", default=length, type=click.IntRange(min=2), metavar="TOKENS",
            help="Prompt and completion together, at most.",
        ),
        _limits(
            "--max-batch-tokens", default=batch, type=_COUNT, metavar="TOKENS",
            help="Prompt tokens of one prefill step.",
        ),
    ]  # fmt: skip


_HOW = [
    _speed(
        "--kv-cache-dtype", default="auto", metavar="DTYPE", show_default="auto; or bf16, fp8_e4m3",
        type=click.Choice(["auto", "bf16", "fp8_e4m3"]),
        help="Of keys and values; auto: as the activations.",
    ),
    _speed(
        "--speculative-tokens", "num_drafts", default=0, type=click.IntRange(0, MAX_DRAFTS),
        metavar="TOKENS", help="That the MTP layer guesses in each decode step; 0: none.",
    ),
    _speed(
        "--allow-reference-ops", is_flag=True,
        help="Let what has no kernel on the target be a plain operation, many times slower.",
    ),
    _speed(
        "--plain-sums", is_flag=True,
        help="Sum over devices by NCCL, not by kernels that write into each other's memory.",
    ),
]  # fmt: skip


def _all_of(*flags: _Decorator) -> _Decorator:
    """One decorator that gives a command all of these, in this order."""

    def decorate(command: Any) -> Any:
        for each in reversed(flags):
            command = each(command)
        return command

    return decorate


@click.group(cls=Group, context_settings={"max_content_width": 100})
def main() -> None:
    """Plan, check and compile the engine for machines that are not there."""


@contextmanager
def _explained() -> Iterator[None]:
    """What is the user's to mend becomes a sentence and exit code 1."""
    from glm_jax.aot.inspection import InspectionError
    from glm_jax.aot.saved import EngineMismatchError
    from glm_jax.config import ConfigError
    from glm_jax.sizing import SizingError
    from glm_jax.targets.target import TargetError

    # NotImplementedError: a step for a GPU that has no kernel for it.
    users = (ConfigError, SizingError, TargetError, InspectionError, EngineMismatchError)
    try:
        yield
    except (*users, NotImplementedError) as error:
        raise click.ClickException(str(error)) from error


@main.command(
    "plan",
    examples=(
        ("GLM-4.7-FP8 on eight B200s.", "python -m glm_jax.aot plan"),
        (
            "Whether more requests fit eight H200s with a cache in 8 bits.",
            "python -m glm_jax.aot plan --target h200x8 --max-concurrency 512 --kv-cache-dtype fp8_e4m3",
        ),
    ),
)
@_all_of(
    *_model_and_target(default="glm-4.7", target="b200x8"),
    *_server_limits(256, 8192, 8192),
    _limits(
        "--kv-cache-dtype", "kv_dtype", default="bf16", type=click.Choice(["bf16", "fp8_e4m3"]),
        help="Of keys and values; FP8 holds twice the tokens, less exactly.",
    ),
    _output("--compile/--no-compile", "may_compile", default=True,
            help="Ask the compiler for the temporaries, where it is installed (extra aot)."),
    _output("--json", "as_json", is_flag=True, help="Print plain data in place of tables."),
    _output("--plot", type=_RESULT, metavar="FILE", help="Draw it, as .png or .svg (extra plot)."),
)  # fmt: skip
def plan(
    model: str,
    target: str,
    kv_dtype: str,
    may_compile: bool,
    as_json: bool,
    plot: Path | None,
    **limits: int,
) -> None:
    """What a model needs on a target, how fast it can be, and what limits it.

    Needs neither a GPU nor weights. Exits with 1 where it does not fit, and says what would.
    """
    from glm_jax.aot import topology
    from glm_jax.aot.memory import Limits
    from glm_jax.aot.plan import make_plan

    topology.stay_off_devices()
    with _explained():
        made = make_plan(
            model, find_config(model), parse_target(target), Limits(**limits), kv_dtype,
            may_compile=may_compile,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=2))
    else:
        from rich.console import Console

        from glm_jax.aot.report import show

        show(made, Console())
    if plot is not None:
        _draw(made, plot)
    if made.refusal is not None:
        if as_json:
            click.echo(f"does not fit: {made.refusal}", err=True)
        sys.exit(1)


@main.command(
    "build",
    examples=(
        (
            "Steps for the bundled model on this machine.",
            "python -m glm_jax.aot build --config checkpoints/nano --out /tmp/engine",
        ),
        (
            "Steps for eight B200s, and the server that loads them: the same limits on both.",
            "python -m glm_jax.aot build --config /models/GLM-4.7-FP8 --target b200x8 \\\n"
            "  --out /models/engine-b200x8 --max-concurrency 256 --max-seq-len 8192\n"
            "python -m serving serve --model-dir /models/GLM-4.7-FP8 --engine /models/engine-b200x8 \\\n"
            "  --max-concurrency 256 --max-seq-len 8192",
        ),
    ),
)
@_all_of(
    *_model_and_target(required=True, target="cpu"),
    *_server_limits(64, 4096, 32768),
    *_HOW,
    _what(
        "--on-devices", is_flag=True,
        help="Compile on these devices, in this machine: XLA tries which of its kernels are fastest there, "
        "and the engine keeps what it found.",
    ),
    _output(
        "--out", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
        help="Directory of the engine; an engine that is there is replaced.",
    ),
)  # fmt: skip
def build(
    model: str,
    target: str,
    kv_cache_dtype: str,
    allow_reference_ops: bool,
    plain_sums: bool,
    on_devices: bool,
    out: Path,
    **limits: int,
) -> None:
    """Compile every step for a target; serve --engine loads them and compiles nothing.

    The limits are the server's options of the same names: an engine is for one set of them.
    """
    from rich.console import Console
    from rich.progress import Progress

    from glm_jax.aot import saved, topology
    from glm_jax.aot.memory import Limits, engine_shapes
    from glm_jax.aot.plan import ACTIVATIONS
    from glm_jax.runner import buckets

    if not on_devices:
        topology.stay_off_devices()
    start = time.perf_counter()
    with _explained():
        config, parsed = find_config(model), parse_target(target)
        mesh = topology.mesh_here(parsed) if on_devices else topology.mesh_of(parsed)
        options = _options(kv_cache_dtype, allow_reference_ops, plain_sums)
        shapes = engine_shapes(
            config, parsed, mesh, ACTIVATIONS, Limits(**limits), options.kv_dtype
        )
        console = Console(stderr=True)
        with Progress(console=console) as progress:
            task = progress.add_task("compiling", total=len(buckets(shapes)))

            def on_compiled(bucket: Bucket, seconds: float) -> None:
                progress.console.print(f"{bucket[0]} {bucket[1]}: {seconds:.1f} s")
                progress.advance(task)

            written = saved.build(
                config, shapes, mesh, ACTIVATIONS, limits, out, options,
                on_compiled=on_compiled, num_workers=os.cpu_count() or 1,
            )  # fmt: skip
    seconds = time.perf_counter() - start
    click.echo(
        f"{out}: {len(buckets(shapes))} steps for {parsed}, {written / 1e6:.1f} MB, {seconds:.1f} s"
    )


@main.command(
    "inspect",
    examples=(
        (
            "The decode step of 64 rows on eight B200s: its kernels, sums and copies.",
            "python -m glm_jax.aot inspect --step decode-64",
        ),
        (
            "Fail where a change of the code changes what is compiled.",
            "python -m glm_jax.aot inspect --write before.json\n"
            "python -m glm_jax.aot inspect --expect before.json",
        ),
    ),
)
@_all_of(
    *_model_and_target(default="glm-4.7", target="b200x8"),
    *_server_limits(256, 8192, 8192),
    *_HOW,
    _output(
        "--step", "steps", multiple=True, metavar="STEP", show_default="every bucket",
        help="As decode-64 or prefill-64, rows of the bucket; may be repeated.",
    ),
    _output(
        "--expect", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Fail where the programs differ from those this file describes.",
    ),
    _output("--write", metavar="FILE", type=_RESULT, help="Write what was found, for a later --expect."),
)  # fmt: skip
def inspect_(
    model: str,
    target: str,
    kv_cache_dtype: str,
    allow_reference_ops: bool,
    plain_sums: bool,
    steps: tuple[str, ...],
    expect: Path | None,
    write: Path | None,
    **limits: int,
) -> None:
    """What the compiled steps do: kernels, sums over devices, copies, memory, graphs."""
    from glm_jax.aot import topology
    from glm_jax.aot.inspection import differences_of, inspect_steps
    from glm_jax.aot.memory import Limits
    from glm_jax.aot.plan import ACTIVATIONS

    topology.stay_off_devices()
    with _explained():
        found = inspect_steps(
            find_config(model), parse_target(target), ACTIVATIONS, Limits(**limits), steps,
            _options(kv_cache_dtype, allow_reference_ops, plain_sums),
        )  # fmt: skip
    text = json.dumps(found, indent=2)
    click.echo(text)
    if write is not None:
        write.write_text(text + "\n", encoding="utf-8")
    if expect is not None:
        differences = differences_of(json.loads(expect.read_text(encoding="utf-8")), found)
        for difference in differences:
            click.echo(difference, err=True)
        sys.exit(1 if differences else 0)


def _options(kv_cache_dtype: str, allow_reference_ops: bool, plain_sums: bool) -> StepOptions:
    from glm_jax.cache import KV_DTYPES
    from glm_jax.kernels import Kernels
    from glm_jax.steps import StepOptions

    return StepOptions(
        kv_dtype=KV_DTYPES[kv_cache_dtype],
        kernels=Kernels(allow_reference=allow_reference_ops, fused_all_reduce=not plain_sums),
    )


def _draw(made: Any, path: Path) -> None:
    from glm_jax.aot.chart import draw

    try:
        draw(made, path)
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"--plot needs {error.name}: install the extra plot (make env EXTRAS=plot)"
        ) from error
    except ValueError as error:
        raise click.ClickException(f"--plot {path}: {error}") from error


if __name__ == "__main__":
    main(prog_name="python -m glm_jax.aot")
