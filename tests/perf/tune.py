"""Times ways to cut a kernel's work on this GPU, each checked against the reference first.

    python tests/perf/tune.py [--only NAME] [--json FILE]

Knows no kernel's inside. A way that is wrong, does not fit or does not compile has its line too.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax

from glm_jax.pallas import decode_attention
from glm_jax.pallas.chip import Chip
from tests.perf import attention_cases
from tests.perf.measure import Case, check, compile_case, measure, measure_card
from tests.perf.sizes import GLM_4_7, Sizes

_POISONED = 1 << 30
# (split, tile, stages) of decode attention.
_DECODE_WAYS = (
    (512, 64, 3), (512, 64, 2), (512, 64, 4), (512, 128, 2), (512, 128, 3), (1024, 64, 2),
    (1024, 64, 3), (1024, 64, 4), (1024, 128, 2), (1024, 128, 3), (2048, 64, 3), (2048, 128, 2),
)  # fmt: skip


def decode_ways(sizes: Sizes, chip: Chip) -> Iterator[tuple[str, Case]]:
    """Decode attention: how long splits and tiles are, how many tiles are in flight."""
    some = replace(sizes, tokens=(64, 8, 1))
    for case in attention_cases.decode_cases(some, chip, False):
        if case.shape not in ("B=64 S=8192", "B=8 S=8192", "B=1 S=8192"):
            continue
        for split, tile, stages in _DECODE_WAYS:
            config = decode_attention.TuningConfig(split_size=split, tile_size=tile, stages=stages)

            def step(operands: Any, layer: Any, config: Any = config) -> Any:
                q, k_pages, v_pages, table, positions = operands
                return decode_attention.attend(
                    q, k_pages, v_pages, layer, table, positions, chip=chip, config=config
                )

            yield f"split {split}, tile {tile}, {stages} stages", _alone(case, step)


def _alone(case: Case, step: Any) -> Case:
    return replace(case, step=step, alternatives={}, peers={})


_KERNELS = {"decode": decode_ways}


def run(only: str) -> list[dict[str, Any]]:
    """Every way's times; prints them as they come."""
    card = measure_card()
    print(f"{card.name}, jax {jax.__version__}: copy {card.copy / 1e12:.2f} TB/s")
    results = []
    with ThreadPoolExecutor(4) as pool:
        pending = [
            (way, case, pool.submit(compile_case, case, card))
            for name, ways in _KERNELS.items()
            if only in name
            for way, case in ways(GLM_4_7, card.chip)
        ]
        for way, case, programs in pending:
            entry: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "way": way}
            try:
                error = check(case, programs.result(), 1, _POISONED)
                times = measure(case, programs.result())
                share = 100 * card.floor(case) * 1e6 / times["us"]
                entry |= {"error": error, **times}
                said = f"{times['us']:7.1f} us, {share:3.0f} % of copy, error {error:.1e}"
            except Exception as error:  # one way's failure leaves the others their lines
                entry["failed"] = said = f"{type(error).__name__}: {error}"[:200]
            results.append(entry)
            print(f"{case.kernel} {case.shape}, {way}: {said}", flush=True)
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
