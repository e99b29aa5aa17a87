"""Checks and times every kernel at GLM-4.7's shapes on this GPU, beside what the card can do.

    python tests/perf/kernels.py [--json FILE] [--only NAME] [--seconds N] [--interpret]

Knows no kernel's shapes; the *_cases modules do. Needs jax, numpy and jaxtyping; PyTorch, if it is
there, takes part in the comparison.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# The rest of the memory is for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax

from glm_jax.pallas.chip import Chip
from tests.perf import attention_cases, product_cases, small_cases
from tests.perf.measure import (
    Case,
    Programs,
    check,
    check_interpreted,
    compile_case,
    measure,
    measure_card,
)
from tests.perf.sizes import GLM_4_7, REHEARSAL, Sizes

_SUITES = (
    product_cases.expert_cases,
    attention_cases.decode_cases,
    product_cases.dense_cases,
    attention_cases.prefill_cases,
    small_cases.norm_cases,
    small_cases.router_cases,
    attention_cases.write_cases,
)
_POISONED = 2 << 30
_SEEDS = (1, 2)
# Lowering holds Python's lock: more at a time and none is ever ready.
_COMPILERS = 4
_HEADER = (
    "| kernel | shape | error | us | floor, us | of floor | best other, us |\n"
    "|---|---|---|---|---|---|---|"
)


def cases(sizes: Sizes, chip: Chip, interpret: bool, only: str) -> Iterator[Case]:
    """Every case whose kernel's name holds `only`."""
    for suite in _SUITES:
        for case in suite(sizes, chip, interpret):
            if only in case.kernel:
                yield case


def result(case: Case, programs: Programs, floor: float) -> dict[str, Any]:
    """What is reported of a case: errors, times, the floor, others' times."""
    error = max(check(case, programs, seed, _POISONED) for seed in _SEEDS)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "error": error,
        "is_right": error <= case.tolerance,
        **measure(case, programs),
        "peers_us": {name: microseconds() for name, microseconds in case.peers.items()},
        "floor_us": floor * 1e6,
        "bytes": case.bytes,
        "operations": case.operations,
    }


def row(result: dict[str, Any]) -> str:
    """A result as a line of a Markdown table."""
    name = f"| {result['kernel']} | {result['shape']} | "
    if "failed" in result:
        return name + f"{result['failed'][:200]} | | | | |"
    others = {other: times["us"] for other, times in result["alternatives"].items()}
    others |= result["peers_us"]
    best = min(others, key=lambda other: others[other], default=None)
    compared = "" if best is None else f"{others[best]:.1f} ({best})"
    wrong = "" if result["is_right"] else " **wrong**"
    share = 100 * result["floor_us"] / result["us"]
    return (
        f"{name}{result['error']:.1e}{wrong} | {result['us']:.1f} | {result['floor_us']:.1f} | "
        f"{share:.0f} % | {compared} |"
    )


def rehearse(only: str = "") -> list[str]:
    """Runs every case at tiny sizes in interpret mode; returns those that were wrong."""
    wrong = []
    for case in cases(REHEARSAL, Chip("sm90", 4), True, only):
        error = check_interpreted(case, 1)
        print(f"{case.kernel} {case.shape}: error {error:.1e}, {case.tolerance:.1e} allowed")
        if not error <= case.tolerance:
            wrong.append(f"{case.kernel} {case.shape}: {error}")
    return wrong


def run(only: str, seconds: float, path: Path | None = None) -> dict[str, Any]:
    """Measures the card and every case, as many as the time allows.

    Prints the table as it goes, and writes what there is to `path`.
    """
    end = time.perf_counter() + seconds
    card = measure_card()
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in card.rates.items())
    print(f"{card.name}, jax {jax.__version__}: copy {card.copy / 1e12:.2f} TB/s, {rates}")
    print(_HEADER)
    results = []
    report = {
        "kind": "kernels",
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": " ".join(["python tests/perf/kernels.py", *sys.argv[1:]]),
        "device": card.name,
        "jax": jax.__version__,
        "copy_bytes_per_second": card.copy,
        "operations_per_second": card.rates,
        "results": results,
    }
    with ThreadPoolExecutor(_COMPILERS) as pool:
        pending = [
            (case, pool.submit(compile_case, case, card))
            for case in cases(GLM_4_7, card.chip, False, only)
        ]
        for case, programs in pending:
            try:
                left = max(0.0, end - time.perf_counter())
                results.append(result(case, programs.result(left), card.floor(case)))
            except Exception as error:  # one kernel's failure leaves the others their rows
                failed = f"{type(error).__name__}: {error}"
                results.append({"kernel": case.kernel, "shape": case.shape, "failed": failed})
            print(row(results[-1]), flush=True)
            if path:
                path.write_text(json.dumps(report, indent=1) + "\n")
        pool.shutdown(wait=False, cancel_futures=True)
    return report


def _commit() -> str:
    """What is checked out here; empty where no git says it."""
    git = shutil.which("git")
    if git is None:
        return ""
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main(arguments: list[str]) -> int:
    """Returns 1 if a kernel was wrong or failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--seconds", type=float, default=480, help="what may be waited for in all")
    parser.add_argument("--interpret", action="store_true", help="rehearse on a CPU, untimed")
    options = parser.parse_args(arguments)
    if options.interpret:
        return bool(rehearse(options.only))
    report = run(options.only, options.seconds, options.json)
    return any(not result.get("is_right") for result in report["results"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
