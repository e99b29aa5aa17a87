"""The command line: `python -m checkpoints inspect DIR` lists tensors, `evaluate DIR` examines nano.

Knows what to print, not how anything is found out.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

from checkpoints.names import compare
from checkpoints.reader import Checkpoint, CheckpointError
from glm_jax.config import ConfigError, ModelConfig


@click.group(help="Tools for checkpoints in the published layout.")
def main() -> None:
    """Takes a subcommand."""


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--all", "show_all", is_flag=True, help="List every tensor, not only the faults.")
def inspect(directory: Path, show_all: bool) -> None:
    """Checks a checkpoint's files against its config.json; exits with 1 if they do not fit."""
    try:
        config = ModelConfig.from_directory(directory)
        with Checkpoint(directory) as checkpoint:
            tensors = checkpoint.tensors
    except (CheckpointError, ConfigError) as error:
        raise click.ClickException(str(error)) from None
    missing, unexpected = compare(config, tensors)
    nbytes: Counter[str] = Counter()
    for info in tensors.values():
        nbytes[info.dtype] += info.nbytes
        if show_all:
            click.echo(f"{info.file.name}  {info.dtype:7}  {list(info.shape)!s:18}  {info.name}")
    for dtype, count in nbytes.most_common():
        click.echo(f"{count / 1e9:10.3f} GB  {dtype}")
    click.echo(f"{nbytes.total() / 1e9:10.3f} GB  in {len(tensors)} tensors")
    for fault, names in (("missing", missing), ("unexpected", unexpected)):
        for name in names:
            click.echo(f"{fault}: {name}")
    sys.exit(1 if missing or unexpected else 0)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--limit",
    default=1000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Held-out questions to ask.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def evaluate(directory: Path, limit: int, as_json: bool) -> None:
    """Accuracy per skill in FP8 and in bf16, and MTP acceptance, of a checkpoint of nano."""
    from checkpoints import evaluation  # JAX takes seconds, which inspect need not wait

    try:
        found = evaluation.evaluate(directory, limit)
    except ValueError as error:  # ConfigError and CheckpointError are such
        raise click.ClickException(str(error)) from None
    click.echo(found.to_json() if as_json else found.to_table())


if __name__ == "__main__":
    main(prog_name="python -m checkpoints")
