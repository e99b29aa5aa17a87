"""Times ways to cut a kernel's work on this GPU, each checked against the reference first.

    python tests/perf/tune.py [--only NAME] [--json FILE]

Knows no kernel's inside. The ways that answer most come first; one that is wrong, does not fit or does
not compile has its line too.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from glm_jax.pallas import decode_attention, dense_matmul
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.tiling import TuningConfig
from tests.perf import attention_cases, product_cases
from tests.perf.measure import (
    Case,
    Programs,
    Step,
    compile_case,
    expect,
    largest,
    measure,
    measure_card,
)
from tests.perf.sizes import GLM_4_7, Sizes

_COMPILERS = 4
# (rows, context) and (split, tile, stages) of decode attention.
_DECODE_SHAPES = ("B=64 S=8192", "B=1 S=8192", "B=64 S=2048", "B=256 S=2048")
_DECODE_WAYS = ((512, 64, 3), (1024, 64, 3), (1024, 128, 2), (512, 128, 2), (512, 64, 2))
_DENSE_SHAPES = tuple(
    f"{name} T={tokens}" for tokens in (64, 1, 128, 1024) for name in ("qkv", "o")
)


class Way(NamedTuple):
    """One way to cut a case.

    Attributes:
      name: what is special about it.
      step: the kernel, so cut.
    """

    name: str
    step: Step


def decode_ways(sizes: Sizes, chip: Chip) -> Iterator[tuple[Case, list[Way]]]:
    """Decode attention: how long splits and tiles are, how many tiles are in flight."""
    suite = attention_cases.decode_cases(replace(sizes, tokens=(1, 64, 256)), chip, False)
    cases = {case.shape: case for case in suite}

    def way(split: int, tile: int, stages: int) -> Way:
        config = decode_attention.TuningConfig(split_size=split, tile_size=tile, stages=stages)

        def step(operands: Any, layer: jax.Array) -> jax.Array:
            q, k_pages, v_pages, table, positions = operands
            return decode_attention.attend(
                q, k_pages, v_pages, layer, table, positions, chip=chip, config=config
            )

        return Way(f"split {split}, tile {tile}, {stages} stages", step)

    for shape in _DECODE_SHAPES:
        yield cases[shape], [way(*sizes) for sizes in _DECODE_WAYS]


def dense_ways(sizes: Sizes, chip: Chip) -> Iterator[tuple[Case, list[Way]]]:
    """The projections: K in one part, in several by a cluster of CTAs, in several by one CTA."""
    suite = product_cases.dense_cases(replace(sizes, tokens=(1, 64, 128, 1024)), chip, False)
    cases = {case.shape: case for case in suite}

    def way(name: str, config: TuningConfig | None) -> Way:
        def step(operands: Any, layer: jax.Array) -> jax.Array:
            x, x_scale, values, scale, bias = operands
            return dense_matmul.matmul(
                x, x_scale, values, scale, bias, layer, chip=chip, config=config
            )

        return Way(name, step)

    for shape in _DENSE_SHAPES:
        name, tokens = shape.split(" T=")
        rows, width = (1792, 5120) if name == "qkv" else (5120, 1536)
        spread = dense_matmul.config_in_parts(chip, int(tokens), rows, width)
        walked = replace(
            dense_matmul.default_config(chip, int(tokens), rows), parts=spread.parts, fill=None
        )
        ways = [way("default", None), way(f"{spread.parts} parts", spread)]
        yield cases[shape], [*ways, way(f"{spread.parts} parts, one CTA", walked)]


_KERNELS = {"dense": dense_ways, "decode": decode_ways}


def run(only: str) -> list[dict[str, Any]]:
    """Every way's times; prints them as they come."""
    # Before any thread compiles: XLA of jax 0.11.2 registers its targets with the first program.
    card = measure_card()
    print(f"{card.name}, jax {jax.__version__}: copy {card.copy / 1e12:.2f} TB/s", flush=True)
    results = []
    with ThreadPoolExecutor(_COMPILERS) as pool:

        def start(case: Case, way: Way) -> Future[Programs]:
            alone = replace(case, step=way.step, alternatives={}, peers={})
            return pool.submit(compile_case, alone, card, has_reference=False)

        pending = [
            (case, [(way.name, start(case, way)) for way in ways])
            for kernel, all_ways in _KERNELS.items()
            if only in kernel
            for case, ways in all_ways(GLM_4_7, card.chip)
        ]
        for case, ways in pending:
            operands, layer, expected = expect(case, 1)
            first = None
            for name, programs in ways:
                entry: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "way": name}
                try:
                    got = programs.result().step(operands, layer)
                    entry["error"] = largest(case.errors(got, expected))
                    bits = np.asarray(got).view(np.uint16)
                    first = bits if first is None else first
                    entry["same_bits"] = bool((bits == first).all())
                    entry |= measure(replace(case, alternatives={}), programs.result())
                    share = 100 * card.floor(case) * 1e6 / entry["us"]
                    said = f"{entry['us']:.2f} us, {share:.0f} % of the floor's, error "
                    said += f"{entry['error']:.1e}, bits of the first: {entry['same_bits']}"
                except Exception as error:  # one way's failure leaves the others their lines
                    entry["failed"] = said = f"{type(error).__name__}: {error}"[:200]
                results.append(entry)
                print(f"{case.kernel} {case.shape}, {name}: {said}", flush=True)
    return results


def main(arguments: list[str]) -> None:
    """Runs, and writes the results where it is told to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    options = parser.parse_args(arguments)
    results = run(options.only)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
