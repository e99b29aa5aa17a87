"""Times what PyTorch and Triton make of each case's job, and writes that down.

    python tests/perf/others.py FILE [--only NAME] [--seconds N] [--processes N]

Processes fill the caches on disk with what those libraries compile; then one runs it, a case at a time,
and a new one takes its place where it dies. Knows no kernel. JAX is needed for the list of cases, and
finds no GPU here.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

from glm_jax.pallas.chip import Chip
from tests.perf import kernels, peers
from tests.perf.measure import Case

# Of a job that does not end.
_LONGEST = 60.0
# After it, a process has no use of the GPU any more.
_FATAL = "CUDA error"
# What cases are listed for; peers look at the GPU that is there.
_CHIP = Chip("sm90", 132)

Job = tuple[int, str]


def measure_all(only: str, seconds: float, num_processes: int, path: Path) -> None:
    """Writes a dictionary of each case's peers, by "kernel, shape": as peers.measure says, or "failed"."""
    end = time.monotonic() + seconds
    cases = _cases(only)
    jobs = [(index, name) for index, case in enumerate(cases) for name in case.peers]
    begin = time.monotonic()
    _over(num_processes, partial(_prepare, only), jobs, end - 0.5 * seconds)
    print(f"prepared in {time.monotonic() - begin:.0f} of {seconds:.0f} s", flush=True)
    found: dict[str, dict[str, Any]] = {}
    # Readers find all of it or none.
    part = path.with_suffix(".part")
    part.write_text("{}")
    crew = _Crew(partial(_measure, only))
    # The first that a process runs comes out too long in a graph: once for nothing.
    for index, name in [*jobs[:1], *jobs]:
        if time.monotonic() > end:
            break
        case = cases[index]
        said = crew.ask((index, name), min(_LONGEST, end - time.monotonic()))
        found.setdefault(f"{case.kernel}, {case.shape}", {})[name] = said
        print(f"{case.kernel} {case.shape}: {name} {said.get('us', said)}", flush=True)
        part.write_text(json.dumps(found))
    crew.end()
    print(f"measured after {time.monotonic() - begin:.0f} s", flush=True)
    part.replace(path)


class _Crew:
    """One process at a time that does jobs."""

    def __init__(self, work: Callable[[Job], dict[str, Any]]) -> None:
        self._work = work
        self._pool = _pool(1)

    def ask(self, job: Job, seconds: float) -> dict[str, Any]:
        """What the work says of a job, or "failed"."""
        try:
            said = self._pool.submit(self._work, job).result(max(0.0, seconds))
        except Exception as error:  # it died, or hangs
            said = {"failed": f"{type(error).__name__}: {error}"[:400], "is_over": True}
        if said.pop("is_over", False):
            self.end()
            self._pool = _pool(1)
        return said

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        _kill(self._pool)


def _over(number: int, work: Callable[[Job], None], jobs: Sequence[Job], end: float) -> None:
    """Does the jobs in so many processes, as many as can be done by then."""
    pool = _pool(number)
    pending: list[Future[None]] = [pool.submit(work, job) for job in jobs]
    wait(pending, timeout=end - time.monotonic())
    for future in pending:
        if future.done() and (error := future.exception()):  # measuring it says so again
            print(f"{type(error).__name__}: {error}"[:400], flush=True)
    _kill(pool)


def _pool(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, mp_context=get_context("spawn"))


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


@cache
def _cases(only: str) -> list[Case]:
    return kernels.listed(only, False, _CHIP)


def _case_of(only: str, job: Job) -> tuple[Case, peers.Peer]:
    case = _cases(only)[job[0]]
    return case, case.peers[job[1]]


def _prepare(only: str, job: Job) -> None:
    peers.prepare(_case_of(only, job)[1])


def _measure(only: str, job: Job) -> dict[str, Any]:
    case, peer = _case_of(only, job)
    try:
        return peers.measure(peer, case.num_layers)
    except Exception as error:  # the other shapes may do
        said = f"{type(error).__name__}: {error}"[:400]
        return {"failed": said, "is_over": _FATAL in said}


def main(arguments: list[str]) -> None:
    """Measures, and writes the results where it is told to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="where to write the results")
    parser.add_argument("--only", default="", help="as kernels.py takes it")
    parser.add_argument("--seconds", type=float, default=300, help="what may be waited for in all")
    parser.add_argument("--processes", type=int, default=4, help="that compile side by side")
    options = parser.parse_args(arguments)
    measure_all(options.only, options.seconds, options.processes, options.file)


if __name__ == "__main__":
    main(sys.argv[1:])
