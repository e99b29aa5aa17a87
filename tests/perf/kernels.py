"""Checks and times every kernel at GLM-4.7's shapes on this GPU, beside what the card can do.

    python tests/perf/kernels.py [--json FILE] [--only NAME] [--seconds N] [--processes N] [--interpret]

Knows no kernel's shapes; the *_cases modules do. Needs jax, numpy and jaxtyping; PyTorch and Triton, if
the Python that --others names has them, take part in the comparison (others.py), before ours and on the
same GPU.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax

from glm_jax.pallas.chip import Chip
from tests.perf import attention_cases, expert_cases, product_cases, small_cases
from tests.perf.card import Card
from tests.perf.measure import Case, check_interpreted
from tests.perf.sizes import GLM_4_7, REHEARSAL, Sizes
from tests.perf.turns import default_processes, over_cases

_SUITES = (
    expert_cases.expert_cases,
    attention_cases.decode_cases,
    product_cases.dense_cases,
    attention_cases.prefill_cases,
    small_cases.norm_cases,
    small_cases.router_cases,
    attention_cases.write_and_attend_cases,
    attention_cases.write_cases,
)
# So slow that a case is called once.
_NO_CARD = Card("no card", Chip("sm90", 4), 1.0, {"fp8": 1.0, "bf16": 1.0})
_HEADER = (
    "| kernel | shape | error | us (in a graph) | of floor | of a copy of as much | best other |\n"
    "|---|---|---|---|---|---|---|"
)
# Of what may be waited for in all, what PyTorch and Triton may take.
_OF_OTHERS = 0.7


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
        return name + f"{result['failed'][:200]} | | | | |"
    others = result["alternatives"] | result["peers"]
    best = min(others, key=lambda other: others[other]["us"], default=None)
    compared = "" if best is None else f"{_times(others[best])} ({best})"
    error = "" if "error" not in result else f"{result['error']:.1e}"
    wrong = "" if result["is_right"] else " **wrong**"
    floors = (result[floor] for floor in ("floor_us", "small_floor_us"))
    # Without CUPTI a part has no time of its own.
    shares = (f"{floor / result['us']:.0%}" if result["us"] else "-" for floor in floors)
    return f"{name}{error}{wrong} | {_times(result)} | {' | '.join(shares)} | {compared} |"


def _times(times: dict[str, Any]) -> str:
    in_graph = f" ({times['us_graph']:.1f})" if "us_graph" in times else ""
    return f"{times['us']:.1f}{in_graph}"


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
    python: str = "",
) -> dict[str, Any]:
    """Measures the card and every case, as many as the time allows.

    Prints the table as it goes, and writes what there is to `path`.

    Args:
      interpret: rehearses that on a CPU, with no card and no time that means anything.
      commit: what this is a copy of, where no git says it.
      python: the interpreter that others.py runs in, which is to have PyTorch; none, no others.
    """
    make_cases, number = partial(listed, only, interpret), num_processes or default_processes()
    others = _Others(python, only, _OF_OTHERS * seconds, number) if python else None
    card_here = _NO_CARD if interpret else None
    try:
        wait = others.wait if others else None
        outcomes = over_cases(make_cases, number, seconds, card_here, wait)
        card = next(outcomes)
        assert isinstance(card, Card)
        report = _head(card, only, seconds, commit)
        all_cases, results = make_cases(card.chip), {}
        for outcome in outcomes:
            assert not isinstance(outcome, Card)
            case = all_cases[outcome.place]
            peers = others.found.get(f"{case.kernel}, {case.shape}", {}) if others else {}
            results[outcome.place] = list(of_case(case, card, outcome.result, peers))
            print("\n".join(map(row, results[outcome.place])), flush=True)
            report["results"] = [one for place in sorted(results) for one in results[place]]
            if path:
                path.write_text(json.dumps(report, indent=1) + "\n")
        return report
    finally:
        if others:
            others.end()


def _head(card: Card, only: str, seconds: float, commit: str) -> dict[str, Any]:
    """What is said of a measurement as a whole."""
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in card.rates.items())
    print(f"{card.name}, jax {jax.__version__}: copy {card.copy / 1e12:.2f} TB/s, {rates}")
    copies = ", ".join(f"{size >> 10} KiB {us * 1e6:.2f}" for size, us in card.copies)
    print(f"us of an empty kernel: {card.empty * 1e6:.2f}; of copies: {copies}")
    print(_HEADER, flush=True)
    return {
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
        "results": [],
    }


class _Others:
    """What others.py finds in a process of its own while we compile."""

    def __init__(self, python: str, only: str, seconds: float, number: int) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._path = Path(tempfile.mkdtemp()) / "others.json"
        command = [python, Path(__file__).with_name("others.py"), self._path, "--only", only]
        # A Python that is not ours has its own packages.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [*command, "--seconds", str(seconds), "--processes", str(number)],
            env=environment, start_new_session=True, stdout=sys.stderr,
        )  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Until it has ended, or so long; then reads what it found."""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.end()
        for path in (self._path, self._path.with_suffix(".part")):
            if path.exists():
                self.found = json.loads(path.read_text())
                return

    def end(self) -> None:
        """Ends it and its processes."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def of_case(
    case: Case, card: Card, result: dict[str, Any], peers: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A case's result beside its floors and others, and one for each of its parts."""
    head = {"shape": case.shape, "phase": case.phase}
    if "failed" in result:
        yield {"kernel": case.kernel, **head, **result}
        return
    alternatives = result["alternatives"]
    ran = {name: times for name, times in alternatives.items() if "us" in times}
    peers_ran = {name: times for name, times in peers.items() if "us" in times}
    every = {**alternatives, **peers}
    yield {
        "kernel": case.kernel, **head, **result, "alternatives": ran, "peers": peers_ran,
        "others_failed": {name: said for name, said in every.items() if "us" not in said},
        "floor_us": card.floor(case) * 1e6, "small_floor_us": card.small_floor(case) * 1e6,
        "bytes": case.bytes, "operations": case.operations,
    }  # fmt: skip
    for part in case.parts:
        of_peers = {name: _some(times, part.theirs) for name, times in peers_ran.items()}
        moved = replace(case, bytes=part.bytes, operations=0.0)
        yield {
            "kernel": f"… {part.name}", **head, "is_right": result["is_right"],
            **_some(result, part.ours), "alternatives": {}, "peers": of_peers, "others_failed": {},
            "floor_us": card.floor(moved) * 1e6, "small_floor_us": card.small_floor(moved) * 1e6,
            "bytes": part.bytes, "operations": 0.0, "part_of": case.kernel,
        }  # fmt: skip


def _some(times: dict[str, Any], pattern: str) -> dict[str, Any]:
    """What the kernels take whose names the pattern is found in."""
    mine = {name: us for name, us in times["kernels_us"].items() if re.search(pattern, name)}
    return {"us": sum(mine.values()), "kernels_us": mine}


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
        "--others", default=sys.executable if find_spec("torch") else "", metavar="PYTHON",
        help="the interpreter that has PyTorch and Triton; empty, and neither takes part",
    )  # fmt: skip
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
        interpret=options.interpret, commit=options.commit,
        python="" if options.interpret else options.others,
    )  # fmt: skip
    return any(not result.get("is_right") for result in report["results"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
