"""Checks and times every kernel at GLM-4.7's shapes on this GPU, beside what the card can do.

    python tests/perf/kernels.py [--json FILE] [--only NAME] [--seconds N] [--processes N] [--interpret]

Knows no kernel's shapes; the *_cases modules do. Needs jax, numpy and jaxtyping; PyTorch, if it is
there, takes part in the comparison.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax

from glm_jax.pallas.chip import Chip
from tests.perf import attention_cases, expert_cases, product_cases, small_cases
from tests.perf.card import Card
from tests.perf.measure import Case, check_interpreted
from tests.perf.sizes import GLM_4_7, REHEARSAL, Sizes
from tests.perf.turns import Others, default_processes, over_cases

_SUITES = (
    expert_cases.expert_cases,
    attention_cases.decode_cases,
    product_cases.dense_cases,
    attention_cases.prefill_cases,
    small_cases.norm_cases,
    small_cases.sum_cases,
    small_cases.router_cases,
    attention_cases.write_and_attend_cases,
    attention_cases.write_cases,
)
# So slow that a case is called once.
_NO_CARD = Card("no card", Chip("sm90", 4), 1.0, {"fp8": 1.0, "bf16": 1.0})
_HEADER = (
    "| kernel | shape | error | us | floor, us | of floor | copy of as much, us | best other, us |\n"
    "|---|---|---|---|---|---|---|---|"
)


def cases(sizes: Sizes, chip: Chip, interpret: bool, only: str) -> Iterator[Case]:
    """Every case whose kernel's name holds one of the names in `only`."""
    for suite in _SUITES:
        for case in suite(sizes, chip, interpret):
            if any(name in case.kernel for name in only.split(",")):
                yield case


def listed(only: str, interpret: bool, chip: Chip) -> list[Case]:
    """The cases of a measurement, or of its rehearsal."""
    return list(cases(REHEARSAL if interpret else GLM_4_7, chip, interpret, only))


def row(result: dict[str, Any]) -> str:
    """A result as a line of a Markdown table."""
    name = f"| {result['kernel']} | {result['shape']} | "
    if "failed" in result:
        return name + f"{result['failed'][:200]} | | | | | |"
    others = {other: times["us"] for other, times in result["alternatives"].items()}
    others |= result["peers_us"]
    best = min(others, key=lambda other: others[other], default=None)
    compared = "" if best is None else f"{others[best]:.1f} ({best})"
    wrong = "" if result["is_right"] else " **wrong**"
    share = 100 * result["floor_us"] / result["us"]
    return (
        f"{name}{result['error']:.1e}{wrong} | {result['us']:.1f} | {result['floor_us']:.1f} | "
        f"{share:.0f} % | {result['small_floor_us']:.1f} | {compared} |"
    )


def rehearse(only: str = "") -> list[str]:
    """Runs every case at tiny sizes in interpret mode; returns those that were wrong."""
    wrong = []
    for case in listed(only, True, _NO_CARD.chip):
        error = check_interpreted(case, 1)
        print(f"{case.kernel} {case.shape}: error {error:.1e}, {case.tolerance:.1e} allowed")
        if not error <= case.tolerance:
            wrong.append(f"{case.kernel} {case.shape}: {error}")
    return wrong


def run(
    only: str,
    seconds: float,
    path: Path | None = None,
    num_processes: int | None = None,
    *,
    interpret: bool = False,
    commit: str = "",
    others: Path | None = None,
) -> dict[str, Any]:
    """Measures the card and every case, as many as the time allows.

    Prints the table as it goes, and writes what there is to `path`.

    Args:
      interpret: rehearses that on a CPU, with no card and no time that means anything.
      commit: what this is a copy of, where no git says it.
      others: results of an earlier measurement, from which alternatives and peers are taken.
    """
    make_cases = partial(listed, only, interpret)
    earlier = None if others is None else json.loads(others.read_text())
    outcomes = over_cases(
        make_cases, num_processes or default_processes(), seconds,
        _NO_CARD if interpret else None, None if earlier is None else _others_of(earlier),
    )  # fmt: skip
    card = next(outcomes)
    assert isinstance(card, Card)
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in card.rates.items())
    print(f"{card.name}, jax {jax.__version__}: copy {card.copy / 1e12:.2f} TB/s, {rates}")
    copies = ", ".join(f"{size >> 10} KiB {us * 1e6:.2f}" for size, us in card.copies)
    print(f"us of an empty kernel: {card.empty * 1e6:.2f}; of copies: {copies}")
    print(_HEADER, flush=True)
    results: dict[int, dict[str, Any]] = {}
    all_cases = make_cases(card.chip)
    report: dict[str, Any] = {
        "kind": "kernels",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or _commit(),
        "command": f"python tests/perf/kernels.py {f'--only {only} ' * bool(only)}--seconds {seconds:g}",
        "device": card.name,
        "jax": jax.__version__,
        "copy_bytes_per_second": card.copy,
        "operations_per_second": card.rates,
        "copies_us": {str(size): seconds * 1e6 for size, seconds in card.copies},
        "empty_kernel_us": card.empty * 1e6,
    }
    if earlier is not None:
        report["others"] = {name: earlier[name] for name in ("date", "commit", "device", "jax")}
    for outcome in outcomes:
        assert not isinstance(outcome, Card)
        case = all_cases[outcome.place]
        results[outcome.place] = {
            "kernel": case.kernel,
            "shape": case.shape,
            **_with_others_that_ran(outcome.result),
            "floor_us": card.floor(case) * 1e6,
            "small_floor_us": card.small_floor(case) * 1e6,
            "bytes": case.bytes,
            "operations": case.operations,
        }
        print(row(results[outcome.place]), flush=True)
        report["results"] = [results[index] for index in sorted(results)]
        if path:
            path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _others_of(report: dict[str, Any]) -> Others:
    return {
        (result["kernel"], result["shape"]): {
            "alternatives": result["alternatives"] | result["others_failed"],
            "peers": result["peers"],
        }
        for result in report["results"]
        if "failed" not in result
    }


def _with_others_that_ran(result: dict[str, Any]) -> dict[str, Any]:
    """The result, with alternatives and peers that failed in a place of their own."""
    if "failed" in result:
        return result
    ran = {name: times for name, times in result["alternatives"].items() if "us" in times}
    peers = {name: times["us"] for name, times in result["peers"].items() if "us" in times}
    failed = {**result["alternatives"], **result["peers"]}
    others = {name: said for name, said in failed.items() if name not in ran | peers}
    return {**result, "alternatives": ran, "peers_us": peers, "others_failed": others}


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
    parser.add_argument(
        "--only", default="", help="kernels whose name holds one of these, with commas between"
    )
    parser.add_argument("--seconds", type=float, default=480, help="what may be waited for in all")
    parser.add_argument("--processes", type=int, help="that compile side by side")
    parser.add_argument("--commit", default="", help="what this is a copy of, where no git says it")
    parser.add_argument(
        "--others", type=Path, help="results whose alternatives and peers are taken over"
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="rehearse on a CPU; by several processes where --processes says so",
    )
    options = parser.parse_args(arguments)
    if options.interpret and not options.processes:
        return bool(rehearse(options.only))
    report = run(
        options.only, options.seconds, options.json, options.processes,
        interpret=options.interpret, commit=options.commit, others=options.others,
    )  # fmt: skip
    return any(not result.get("is_right") for result in report["results"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
