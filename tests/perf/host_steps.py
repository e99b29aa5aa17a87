"""What a step costs a CPU, with the operations in C and without: seconds of CPU time, of a bucket's best run.

Knows no engine. CPU time, since it says something on a shared machine too:

    python -m tests.perf.host_steps --size larger --decode 1,16 --prefill 4
    python -m tests.perf.host_steps --size larger --decode 1,16 --prefill 4 --plain-ops
"""

import resource
import time
from collections.abc import Iterator

import click
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from checkpoints.dummy import dummy_weights
from glm_jax import shapes as columns
from glm_jax.kernels import Kernels
from glm_jax.model import abstract_weights
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import make_mesh
from glm_jax.steps import StepOptions
from serving.bench.options import COUNTS
from tests.perf.peer_checkpoint import SIZES, config_of

_BFLOAT16 = np.dtype(jnp.bfloat16)
_TILE = 16


def cpu_seconds() -> float:
    """Of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def batch_of(shapes: StepShapes, phase: Phase, rows: int) -> np.ndarray:
    """A full batch: row i is slot i, with two pages of its own."""
    batch = np.zeros((rows, shapes.columns(phase)), np.int32)
    slots = np.arange(rows) % shapes.num_slots
    batch[:, columns.SLOT] = slots
    batch[:, columns.NUM_TOKENS] = 1 if phase == "decode" else _TILE
    batch[:, columns.TOP_P] = np.float32(1).view(np.int32)
    batch[:, columns.IS_LAST] = phase == "prefill"
    pages = 2 * slots[:, None] + np.arange(2)
    batch[:, columns.NUM_FIELDS : columns.NUM_FIELDS + 2] = pages
    return batch


def measured(
    size: str, decode: tuple[int, ...], prefill: tuple[int, ...], native: bool, repeats: int
) -> Iterator[tuple[str, str, str]]:
    """Each bucket, and its milliseconds of CPU time and of the clock."""
    config, mesh = config_of(size), make_mesh(1)
    shapes = StepShapes(
        num_slots=decode[-1], num_pages=2 * decode[-1], page_size=64, max_seq_len=128,
        prefill_tile=_TILE, prefill_buckets=prefill, decode_buckets=decode,
        vocab_size=config.vocab_size,
    )  # fmt: skip
    options = StepOptions(kernels=Kernels(native=native))
    weights = dummy_weights(abstract_weights(config, _BFLOAT16), mesh, seed=1)
    programs = compile_steps(config, shapes, mesh, _BFLOAT16, options, num_workers=1)
    runner = Runner(config, shapes, mesh, _BFLOAT16, weights, programs, options=options)
    runner.warm_up()
    for phase, rows in programs:
        batch, best = batch_of(shapes, phase, rows), (float("inf"), float("inf"))
        for _ in range(repeats):
            began = cpu_seconds(), time.perf_counter()
            np.asarray(runner.dispatch(phase, batch))
            took = cpu_seconds() - began[0], time.perf_counter() - began[1]
            best = min(best[0], took[0]), min(best[1], took[1])
        yield f"{phase}, {rows} rows", f"{1e3 * best[0]:.1f}", f"{1e3 * best[1]:.1f}"


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="larger", help="Which model.")
@click.option("--decode", type=COUNTS, default=(1, 16), help="Buckets, in rows.")
@click.option("--prefill", type=COUNTS, default=(4,), help="Buckets, in rows of 16 tokens.")
@click.option("--plain-ops", is_flag=True, help="XLA's operations rather than those in C.")
@click.option("--repeats", type=click.IntRange(1), default=20, help="Runs of a bucket.")
def main(
    size: str, decode: tuple[int, ...], prefill: tuple[int, ...], plain_ops: bool, repeats: int
) -> None:
    """Measure what steps cost a CPU."""
    table = Table("step", "CPU ms", "ms", title=f"{size}, {'plain' if plain_ops else 'in C'}")
    for row in measured(size, decode, prefill, not plain_ops, repeats):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
