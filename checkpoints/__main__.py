"""The command line: `python -m checkpoints --help` lists what can be done with a checkpoint.

Knows what to print, not how anything is found out or done.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from checkpoints.converted import Converted, is_converted
from checkpoints.inspection import contents_of, device_bytes, parameters_of
from checkpoints.reader import Checkpoint
from glm_jax.command_line import Group, flag
from glm_jax.config import ConfigError, ModelConfig
from glm_jax.targets.target import parse_target

_DIRECTORY = click.Path(path_type=Path)
_TARGET_HELP = "The machine, as in b200x8."


_EXAMPLES = (
    (
        "What is there, what is missing, and the bytes on each of eight B200s.",
        "python -m checkpoints inspect /models/GLM-4.7-FP8 --target b200x8",
    ),
    (
        "Once, before the first start: chunks that each device reads alone.",
        "python -m checkpoints convert /models/GLM-4.7-FP8 /models/GLM-4.7-FP8-b200x8 --target b200x8\n"
        "python -m checkpoints verify /models/GLM-4.7-FP8-b200x8",
    ),
    (
        "Random weights of four layers, to try things with.",
        "python -m checkpoints dummy /tmp/small --layers 4 --dense-layers 1",
    ),
    (
        "How well the bundled model answers.",
        "python -m checkpoints evaluate checkpoints/nano --limit 50",
    ),
)


# What needs JAX is imported by the command that needs it: it takes seconds to import.
@click.group(cls=Group, examples=_EXAMPLES, context_settings={"max_content_width": 100})
def main() -> None:
    """Tools for checkpoints, in the published layout or converted."""


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (
        ValueError,
        OSError,
    ) as error:  # ConfigError, CheckpointError, TargetError are ValueErrors
        raise click.ClickException(str(error)) from None


@main.command()
@click.argument("directory", type=_DIRECTORY)
@flag("--all", "show_all", is_flag=True, help="List every tensor, not only the faults.")
@flag(
    "--target", metavar="MACHINE", help=f"{_TARGET_HELP} Adds the bytes of weights on each device."
)
def inspect(directory: Path, show_all: bool, target: str | None) -> None:
    """Checks a checkpoint's files against its config.json; exits with 1 if they do not fit."""
    with _explained():
        config = ModelConfig.from_directory(directory)
        opened = Converted(directory) if is_converted(directory) else Checkpoint(directory)
        with opened as source:
            contents = contents_of(config, source)
            count = len(contents.lines)
    for line in contents.lines if show_all else []:
        click.echo(line)
    for dtype, nbytes in contents.nbytes.most_common():
        click.echo(f"{nbytes / 1e9:10.3f} GB  {dtype}")
    what = "arrays" if is_converted(directory) else "tensors"
    click.echo(f"{contents.nbytes.total() / 1e9:10.3f} GB  in {count} {what}")
    found = parameters_of(config)
    click.echo(f"{found.total / 1e9:10.3f} B   parameters, {found.active / 1e9:.3f} B active")
    if found.mtp:
        click.echo(f"{found.mtp / 1e9:10.3f} B   parameters of the MTP layer besides")
    if target is not None:
        _show_device(config, target)
    for fault, names in (("missing", contents.missing), ("unexpected", contents.unexpected)):
        for name in names:
            click.echo(f"{fault}: {name}")
    sys.exit(1 if contents.missing or contents.unexpected else 0)


def _show_device(config: ModelConfig, target: str) -> None:
    with _explained():
        machine = parse_target(target)
        decoder, mtp = device_bytes(config, machine.num_devices)
    memory = f" of {machine.memory / 1e9:.1f} GB" if machine.memory else ""
    click.echo(f"{decoder / 1e9:10.3f} GB  of weights on each device of {machine}{memory}")
    if mtp:
        click.echo(f"{mtp / 1e9:10.3f} GB  of the MTP layer on each besides")


@main.command()
@click.argument("source", type=_DIRECTORY)
@click.argument("destination", type=_DIRECTORY)
@flag("--target", metavar="MACHINE", default="b200x8", help=_TARGET_HELP)
def convert(source: Path, destination: Path, target: str) -> None:
    """Turns SOURCE into sharded chunks that each device reads alone; a killed run goes on."""
    from checkpoints.convert import convert

    with _explained():
        is_new = convert(source, destination, parse_target(target).num_devices)
    click.echo(f"{destination} is whole" if is_new else f"{destination} was whole already")


@main.command()
@click.argument("source", type=_DIRECTORY)
@click.argument("destination", type=_DIRECTORY)
def export(source: Path, destination: Path) -> None:
    """Writes the files again that the conversion SOURCE was made of, byte for byte."""
    from checkpoints.export import export

    with _explained():
        export(source, destination)
    click.echo(f"{destination} is whole")


@main.command()
@click.argument("directory", type=_DIRECTORY)
@flag(
    "--original", metavar="DIR", type=_DIRECTORY, help="What a conversion must have been made of."
)
def verify(directory: Path, original: Path | None) -> None:
    """Reads all of a checkpoint; exits with 1 and names what is damaged if anything is."""
    from checkpoints.verify import verify

    with _explained():
        verdict = verify(directory, original)
    for fault in verdict.faults:
        click.echo(fault)
    state = f"{len(verdict.faults)} faults in" if verdict.faults else "nothing wrong with"
    click.echo(f"{state} {verdict.nbytes / 1e9:.3f} GB")
    sys.exit(1 if verdict.faults else 0)


@main.command()
@click.argument("directory", type=_DIRECTORY)
@flag(
    "--config",
    "name",
    metavar="MODEL",
    default="glm-4.7",
    help="A published model's name, or a directory with a config.json.",
)
@flag(
    "--layers", metavar="LAYERS", type=click.IntRange(min=1), help="So many decoder layers instead."
)
@flag(
    "--dense-layers",
    metavar="LAYERS",
    type=click.IntRange(min=0),
    help="So many of them dense instead.",
)
@flag("--seed", default=0, metavar="NUMBER", help="Decides every value.")
def dummy(
    directory: Path, name: str, layers: int | None, dense_layers: int | None, seed: int
) -> None:
    """Writes a random checkpoint, the MTP layer included."""
    from checkpoints.dummy_files import write_dummy

    with _explained():
        raw = _raw_config(name)
        if layers is not None:
            raw["num_hidden_layers"] = layers
        if dense_layers is not None:
            raw["first_k_dense_replace"] = dense_layers
        write_dummy(directory, raw, seed)


def _raw_config(name: str) -> dict[str, Any]:
    from glm_jax.aot.presets import PRESETS

    if name in PRESETS:
        return dict(PRESETS[name])
    path = Path(name) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{name} is neither a directory with a config.json nor {list(PRESETS)}")
    return json.loads(path.read_text(encoding="utf-8"))


@main.command()
@click.argument("source", type=_DIRECTORY)
@click.argument("destination", type=_DIRECTORY)
def quantize(source: Path, destination: Path) -> None:
    """Writes the FP8 form, as published, of a checkpoint in bf16."""
    from checkpoints.quantize_files import quantize_files

    with _explained():
        quantize_files(source, destination)


@main.command()
@click.argument("directory", type=_DIRECTORY)
@flag(
    "--limit",
    metavar="QUESTIONS",
    default=1000,
    type=click.IntRange(min=1),
    help="Held-out questions to ask.",
)
@flag("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def evaluate(directory: Path, limit: int, as_json: bool) -> None:
    """Accuracy per skill in FP8 and in bf16, and MTP acceptance, of a checkpoint of nano."""
    from checkpoints import evaluation

    with _explained():
        found = evaluation.evaluate(directory, limit)
    click.echo(found.to_json() if as_json else found.to_table())


if __name__ == "__main__":
    # Lines in place of a progress bar, where there is no terminal; of nobody else's.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("checkpoints").setLevel("INFO")
    main(prog_name="python -m checkpoints")
