"""The command line: plan a model on a machine that is not there, and compile it for one.

Knows no arithmetic: it reads what the user says and hands it on.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from glm_jax.aot import saved
from glm_jax.aot.inspection import InspectionError, differences_of, inspect_steps
from glm_jax.aot.memory import Limits, engine_shapes
from glm_jax.aot.plan import ACTIVATIONS, PLANNED_KV_DTYPES, make_plan
from glm_jax.aot.presets import PRESETS, find_config
from glm_jax.aot.topology import mesh_of, stay_off_devices
from glm_jax.cache import KV_DTYPES
from glm_jax.config import ConfigError
from glm_jax.kernels import Kernels
from glm_jax.runner import Bucket, buckets
from glm_jax.shapes import MAX_DRAFTS
from glm_jax.sizing import SizingError
from glm_jax.steps import StepOptions
from glm_jax.targets.target import TargetError, parse_target

_COUNT = click.IntRange(min=1)
_MODEL = f"Directory with a config.json, or a published shape: {', '.join(PRESETS)}."
# NotImplementedError: a step for a GPU that has no kernel for it.
_USER_ERRORS = (
    ConfigError, SizingError, TargetError, InspectionError, saved.EngineMismatchError,
    NotImplementedError,
)  # fmt: skip
_DRAFTS = click.option(
    "--speculative-tokens",
    "num_drafts",
    default=0,
    type=click.IntRange(0, MAX_DRAFTS),
    show_default=True,
    help="Tokens that the MTP layer guesses in each decode step; 0: none.",
)
_TARGET = "b200, gb200, h200, h100 or cpu, then x and the number of devices."


@click.group(context_settings={"max_content_width": 100})
def main() -> None:
    """Plan, check and compile the engine for machines that are not there."""


@main.command("plan")
@click.option("--config", "model", default="glm-4.7", help=_MODEL, show_default=True)
@click.option("--target", default="b200x8", help=_TARGET, show_default=True)
@click.option("--max-concurrency", default=256, type=_COUNT, show_default=True)
@click.option("--max-seq-len", default=8192, type=click.IntRange(min=2), show_default=True)
@click.option("--max-batch-tokens", default=8192, type=_COUNT, show_default=True)
@click.option(
    "--kv-dtype", default="bf16", type=click.Choice(list(PLANNED_KV_DTYPES)), show_default=True
)
@click.option("--compile/--no-compile", "may_compile", default=True, show_default=True,
              help="Ask the compiler for the temporaries, where it is installed (extra aot).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print plain data in place of tables.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw it, as .png or .svg (extra plot).")  # fmt: skip
def plan(
    model: str,
    target: str,
    kv_dtype: str,
    may_compile: bool,
    as_json: bool,
    plot: Path | None,
    **limits: int,
) -> None:
    """What a model needs on a target, how fast it can be, and what limits it."""
    stay_off_devices()
    try:
        made = make_plan(
            model, find_config(model), parse_target(target), Limits(**limits), kv_dtype,
            may_compile=may_compile,
        )  # fmt: skip
    except (ConfigError, SizingError, TargetError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=2))
    else:
        from glm_jax.aot.report import show

        show(made, Console())
    if plot is not None:
        _draw(made, plot)
    if made.refusal is not None:
        if as_json:
            click.echo(f"does not fit: {made.refusal}", err=True)
        sys.exit(1)


@main.command("build")
@click.option("--config", "model", required=True, help=_MODEL)
@click.option("--target", default="cpu", help=_TARGET, show_default=True)
@click.option("--max-concurrency", default=64, type=_COUNT, show_default=True)
@click.option("--max-seq-len", default=4096, type=click.IntRange(min=2), show_default=True)
@click.option("--max-batch-tokens", default=32768, type=_COUNT, show_default=True)
@click.option("--kv-cache-dtype", default="auto", type=click.Choice(list(KV_DTYPES)), show_default=True, help="Of keys and values; auto: as the activations.")  # fmt: skip
@click.option("--allow-reference-ops", is_flag=True, help="Let what has no kernel on the target be a plain operation, many times slower.")  # fmt: skip
@_DRAFTS
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory of the engine; an engine that is there is replaced.")  # fmt: skip
def build(
    model: str,
    target: str,
    kv_cache_dtype: str,
    allow_reference_ops: bool,
    out: Path,
    **limits: int,
) -> None:
    """Compile every step for a target; serve --engine loads them and compiles nothing.

    The limits are the server's options of the same names: an engine is for one set of them.
    """
    stay_off_devices()
    start = time.perf_counter()
    try:
        config, parsed = find_config(model), parse_target(target)
        mesh = mesh_of(parsed)
        options = _options(kv_cache_dtype, allow_reference_ops)
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
    except _USER_ERRORS as error:
        raise click.ClickException(str(error)) from error
    seconds = time.perf_counter() - start
    click.echo(
        f"{out}: {len(buckets(shapes))} steps for {parsed}, {written / 1e6:.1f} MB, {seconds:.1f} s"
    )


@main.command("inspect")
@click.option("--config", "model", default="glm-4.7", help=_MODEL, show_default=True)
@click.option("--target", default="b200x8", help=_TARGET, show_default=True)
@click.option("--max-concurrency", default=256, type=_COUNT, show_default=True)
@click.option("--max-seq-len", default=8192, type=click.IntRange(min=2), show_default=True)
@click.option("--max-batch-tokens", default=8192, type=_COUNT, show_default=True)
@click.option("--kv-cache-dtype", default="auto", type=click.Choice(list(KV_DTYPES)), show_default=True, help="Of keys and values; auto: as the activations.")  # fmt: skip
@click.option("--allow-reference-ops", is_flag=True, help="Let what has no kernel on the target be a plain operation, many times slower.")  # fmt: skip
@_DRAFTS
@click.option("--step", "steps", multiple=True, help="As decode-64 or prefill-64, rows of the bucket; may be repeated. [default: every bucket]")  # fmt: skip
@click.option("--expect", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Fail where the programs differ from those this file describes.")  # fmt: skip
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Write what was found, for a later --expect.")  # fmt: skip
def inspect_(
    model: str,
    target: str,
    kv_cache_dtype: str,
    allow_reference_ops: bool,
    steps: tuple[str, ...],
    expect: Path | None,
    write: Path | None,
    **limits: int,
) -> None:
    """What the compiled steps do: kernels, sums over devices, copies, memory, graphs."""
    stay_off_devices()
    try:
        found = inspect_steps(
            find_config(model), parse_target(target), ACTIVATIONS, Limits(**limits), steps,
            _options(kv_cache_dtype, allow_reference_ops),
        )  # fmt: skip
    except _USER_ERRORS as error:
        raise click.ClickException(str(error)) from error
    text = json.dumps(found, indent=2)
    click.echo(text)
    if write is not None:
        write.write_text(text + "\n", encoding="utf-8")
    if expect is not None:
        differences = differences_of(json.loads(expect.read_text(encoding="utf-8")), found)
        for difference in differences:
            click.echo(difference, err=True)
        sys.exit(1 if differences else 0)


def _options(kv_cache_dtype: str, allow_reference_ops: bool) -> StepOptions:
    return StepOptions(
        kv_dtype=KV_DTYPES[kv_cache_dtype],
        kernels=Kernels(allow_reference=allow_reference_ops),
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
