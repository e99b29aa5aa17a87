"""The command line: `python -m checkpoints inspect DIR` lists a checkpoint's tensors.

Knows no devices: only headers are read.
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


if __name__ == "__main__":
    main(prog_name="python -m checkpoints")
