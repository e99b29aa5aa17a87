"""Many cases on one GPU: several processes compile them side by side, and run them one at a time.

Knows no kernel. Python's lock makes lowering slow in one process, however many threads it has; and a
process that a kernel brings down, or that never answers, takes only its own case with it: what is left
of its share goes to a new one.
"""

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.pallas.chip import Chip
from tests.perf.card import Card, Probes, compile_probes, measure_card
from tests.perf.measure import (
    Case,
    Programs,
    check,
    chip_of,
    compile_alternatives,
    compile_case,
    measure,
    measure_alternatives,
    split,
)

# The same list in every process.
MakeCases = Callable[[Chip], Sequence[Case]]

_POISONED = 2 << 30
_SEEDS = (1, 2)
# Of the time that there is, what may go by before what is compiled is run.
_COMPILING = 0.6
# Seconds after which a case that does not answer is taken for hung.
_LONGEST = 60.0
_THREADS = 2
# A process takes memory as it needs it, so that all find some.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}


class Outcome(NamedTuple):
    """What became of a case: its place in the list, and its results or why there are none."""

    place: int
    result: dict[str, Any]


def default_processes() -> int:
    """As many as find a core for each of their threads, 8 at most."""
    return max(1, min(8, (os.cpu_count() or 1) // _THREADS))


def over_cases(
    make_cases: MakeCases,
    num_processes: int,
    seconds: float,
    card: Card | None = None,
    wait: Callable[[float], None] | None = None,
) -> Iterator[Card | Outcome]:
    """Yields the card, then what became of each case, as many as the time allows.

    A result has "error" and "is_right"; "bits", a digest of the first output; what measure says;
    "alternatives", what time_program says of each. Otherwise it has "failed".

    Args:
      make_cases: at the top level of its module, or a partial of what is.
      seconds: for everything. What has not come by then has failed.
      card: not measured, but so.
      wait: waits, up to so many seconds, until nobody else uses the GPU; everything is compiled by then.
    """
    end = time.monotonic() + seconds
    crew = [_Member(make_cases) for _ in range(num_processes)]
    try:
        chip = crew[0].ask(("chip", None), 2 * _LONGEST) if card is None else card.chip
        cases = make_cases(chip)
        for number, member in enumerate(crew):
            share = list(range(number, len(cases), num_processes))
            has_probes = card is None and not number
            member.start(chip, share, end, has_probes=has_probes)
        for member in crew:
            member.wait_until_ready(end)
        if wait is not None:
            wait(end - time.monotonic())
        card = card or crew[0].ask(("card", None), 2 * _LONGEST)
        assert card is not None
        yield card
        yield from _turns(crew, end)
    finally:
        for member in crew:
            member.end()


def _turns(crew: list["_Member"], end: float) -> Iterator[Outcome]:
    """Each member's cases, the members in turn; crew comes to hold those that took others' places."""
    while any(member.share for member in crew):
        for place, member in enumerate(crew):
            if not member.share:
                continue
            index, left = member.share.pop(0), end - time.monotonic()
            if left <= 0:
                yield Outcome(index, {"failed": "the time was over"})
                continue
            try:
                result = member.ask(("run", index), min(_LONGEST, left))
            except (EOFError, OSError, TimeoutError) as error:
                result = {"failed": f"the process ended or hung: {type(error).__name__}"}
            yield Outcome(index, result)
            is_over = result.pop("is_over", "failed" in result)
            if is_over and member.share and time.monotonic() < end:
                member.end()
                crew[place] = member.successor(end)


class _Member:
    """A process with a share of the cases, seen from outside."""

    def __init__(self, make_cases: MakeCases) -> None:
        self._make_cases = make_cases
        self.share: list[int] = []
        self.chip: Chip | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_cases), daemon=True)
        before = dict(os.environ)
        os.environ.update(_ENVIRONMENT)
        self._process.start()
        for name in _ENVIRONMENT.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        theirs.close()

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer.

        Raises:
          TimeoutError: it did not come in time.
          EOFError, OSError: the process is gone.
        """
        self._connection.send(question)
        if not self._connection.poll(max(seconds, 0.0)):
            raise TimeoutError(f"no answer to {question} after {seconds:.0f} s")
        return self._connection.recv()

    def start(self, chip: Chip, share: list[int], end: float, *, has_probes: bool = False) -> None:
        """Lets it compile its share, for as long as _COMPILING says; and, if so, what measures the card."""
        self.chip, self.share = chip, share
        seconds = _COMPILING * (end - time.monotonic())
        self._connection.send(("start", (chip, share, seconds, has_probes)))

    def wait_until_ready(self, end: float) -> None:
        """Until it has compiled, or died: which the next question finds."""
        if self._connection.poll(max(0.0, end - time.monotonic())):
            try:
                self._connection.recv()
            except EOFError:
                return

    def successor(self, end: float) -> "_Member":
        """A new process for what is left of the share, compiled anew."""
        other = _Member(self._make_cases)
        assert self.chip is not None
        other.start(self.chip, self.share, end)
        other.wait_until_ready(end)
        return other

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, make_cases: MakeCases) -> None:
    """Answers a _Member's questions."""
    base: dict[int, Future[Programs]] = {}
    others: dict[int, Future[dict[str, Any]]] = {}
    cases: Sequence[Case] = []
    probes: Future[Probes] | None = None
    while True:
        verb, argument = connection.recv()
        if verb == "chip":
            connection.send(chip_of(jax.devices()[0]))
        elif verb == "card":
            connection.send(measure_card(probes.result() if probes else None))
        elif verb == "start":
            chip, share, seconds, has_probes = argument
            cases = make_cases(chip)
            # Before any thread compiles: XLA of jax 0.11.2 registers its targets with the first program.
            jax.block_until_ready(jnp.ones(8) + 1)
            pool = ThreadPoolExecutor(_THREADS)
            probes = pool.submit(compile_probes, chip) if has_probes else None
            base = {index: pool.submit(compile_case, cases[index]) for index in share}
            others = {index: pool.submit(compile_alternatives, cases[index]) for index in share}
            pending: list[Future[Any]] = [*base.values(), *others.values()]
            wait(pending, timeout=seconds)
            # What still compiled would disturb what is timed.
            pool.shutdown(wait=False, cancel_futures=True)
            connection.send("ready")
        else:
            connection.send(_run(cases[argument], base[argument], others.get(argument)))


def _run(
    case: Case, base: Future[Programs], others: Future[dict[str, Any]] | None
) -> dict[str, Any]:
    """Checks and times a case whose turn it is."""
    if base.cancelled() or not base.done():
        return {"failed": "it was not compiled in time", "is_over": False}
    try:
        programs = base.result()
    except Exception as error:  # a kernel that does not compile leaves the GPU as it was
        return {"failed": _said(error), "is_over": False}
    try:
        poisoned = _POISONED if jax.default_backend() == "gpu" else 0
        error = max(check(case, programs, seed, poisoned) for seed in _SEEDS)
        bits = _digest(case, programs)
        times = measure(case, programs)
    except Exception as error:  # it may have broken the process
        return {"failed": _said(error), "is_over": True}
    return {
        "error": error,
        "is_right": error <= case.tolerance,
        "bits": bits,
        **times,
        "alternatives": _alternatives(case, programs, others),
    }


def _digest(case: Case, programs: Programs) -> str:
    """Of the first output on inputs that are the same in every process."""
    run = programs.graph or programs.calls
    outputs, _ = run(*split(case, programs.draw(jax.random.key(1))))
    first = np.asarray(jax.tree.leaves(outputs[0])[0])
    return hashlib.sha256(first.tobytes()).hexdigest()[:12]


def _alternatives(
    case: Case, programs: Programs, others: Future[dict[str, Any]] | None
) -> dict[str, Any]:
    if others is None or others.cancelled() or not others.done():
        return {}
    try:
        return measure_alternatives(case, programs, others.result())
    except Exception as error:  # what XLA cannot do is no fault of the kernel's
        return {"XLA": {"failed": _said(error)}}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]
