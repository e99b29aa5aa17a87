"""Many cases on one GPU: several processes compile them side by side, and run them one at a time.

Knows no kernel. Python's lock makes lowering slow in one process, however many threads it has; and a
process that a kernel brings down, or that never answers, takes only its own case with it: what is left
of its share goes to a new one.
"""

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.pallas.chip import Chip
from tests.perf import peers
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
)

# The same list in every process.
MakeCases = Callable[[Chip], Sequence[Case]]
# "alternatives" and "peers" of a result, by its kernel and shape.
Others = Mapping[tuple[str, str], dict[str, Any]]

_POISONED = 2 << 30
_SEEDS = (1, 2)
# Of the time that there is, what may go by before what is compiled is run.
_COMPILING = 0.6
# Seconds after which a case that does not answer is taken for hung.
_LONGEST = 60.0
_THREADS = 2
# Processes in which peers are compiled.
_PEERS = 4
# A process takes memory as it needs it, so that all find some.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}
# Peers are compiled in processes of ours, not in ones of their own.
_WITHOUT_GPU = {"JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


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
    others: Others | None = None,
) -> Iterator[Card | Outcome]:
    """Yields the card, then what became of each case, as many as the time allows.

    A result has "error" and "is_right"; "bits", a digest of the first output; what time_program says;
    "alternatives", the same of each; "peers", as peers.measure says. Otherwise it has "failed".

    Args:
      make_cases: at the top level of its module, or a partial of what is.
      seconds: for everything. What has not come by then has failed.
      card: not measured, but so.
      others: alternatives and peers of every case by its kernel and shape; where there are any, they are
        not measured.
    """
    end = time.monotonic() + seconds
    crew = [_Member(_serve_kernels, make_cases, _ENVIRONMENT) for _ in range(num_processes)]
    torch = _Member(_serve_peers, make_cases, _WITHOUT_GPU, has_processes=True)
    try:
        chip = crew[0].ask(("chip", None), 2 * _LONGEST) if card is None else card.chip
        cases = make_cases(chip)
        for number, member in enumerate(crew):
            share = list(range(number, len(cases), num_processes))
            has_probes = card is None and not number
            member.start(chip, share, end, has_probes=has_probes, has_others=others is None)
        with_peers = [i for i, case in enumerate(cases) if case.peers and others is None]
        torch.start(chip, with_peers, end)
        for member in [*crew, torch]:
            member.wait_until_ready(end)
        card = card or crew[0].ask(("card", None), 2 * _LONGEST)
        assert card is not None
        yield card
        of_peers = {outcome.place: outcome.result for outcome in _turns([torch], end)}
        for outcome in _turns(crew, end):
            outcome.result["peers"] = of_peers.get(outcome.place, {})
            if others is not None:
                case = cases[outcome.place]
                outcome.result.update(others.get((case.kernel, case.shape), {}))
            yield outcome
    finally:
        for member in [*crew, torch]:
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

    def __init__(
        self,
        serve: Callable[..., None],
        make_cases: MakeCases,
        environment: dict[str, str],
        *,
        has_processes: bool = False,
    ) -> None:
        self._made_of = (serve, make_cases, environment)
        self.share: list[int] = []
        self.chip: Chip | None = None
        self.has_others = True
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # A daemon may have no processes of its own.
        self._process = context.Process(
            target=serve, args=(theirs, make_cases), daemon=not has_processes
        )
        before = dict(os.environ)
        os.environ.update(environment)
        self._process.start()
        for name in environment.keys() - before.keys():
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

    def start(
        self,
        chip: Chip,
        share: list[int],
        end: float,
        *,
        has_probes: bool = False,
        has_others: bool = True,
    ) -> None:
        """Lets it compile its share, for as long as _COMPILING says; and, if so, what measures the card,
        and alternatives."""
        self.chip, self.share, self.has_others = chip, share, has_others
        seconds = _COMPILING * (end - time.monotonic())
        self._connection.send(("start", (chip, share, seconds, has_probes, has_others)))

    def wait_until_ready(self, end: float) -> None:
        """Until it has compiled, or died: which the next question finds."""
        if self._connection.poll(max(0.0, end - time.monotonic())):
            try:
                self._connection.recv()
            except EOFError:
                return

    def successor(self, end: float) -> "_Member":
        """A new process for what is left of the share, compiled anew."""
        other = _Member(*self._made_of, has_processes=not self._process.daemon)
        assert self.chip is not None
        other.start(self.chip, self.share, end, has_others=self.has_others)
        other.wait_until_ready(end)
        return other

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve_kernels(connection: Connection, make_cases: MakeCases) -> None:
    """Answers a _Member's questions about kernels."""
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
            chip, share, seconds, has_probes, has_others = argument
            cases = make_cases(chip)
            # Before any thread compiles: XLA of jax 0.11.2 registers its targets with the first program.
            jax.block_until_ready(jnp.ones(8) + 1)
            pool = ThreadPoolExecutor(_THREADS)
            probes = pool.submit(compile_probes, chip) if has_probes else None
            base = {index: pool.submit(compile_case, cases[index]) for index in share}
            others = {
                index: pool.submit(compile_alternatives, cases[index])
                for index in share
                if has_others
            }
            pending: list[Future[Any]] = [*base.values(), *others.values()]
            wait(pending, timeout=seconds)
            # What still compiled would disturb what is timed.
            pool.shutdown(wait=False, cancel_futures=True)
            connection.send("ready")
        else:
            connection.send(_run(cases[argument], base[argument], others.get(argument)))


def _serve_peers(connection: Connection, make_cases: MakeCases) -> None:
    """Answers a _Member's questions about peers: in a process where JAX has no GPU beside them."""
    cases: Sequence[Case] = []
    while True:
        verb, argument = connection.recv()
        if verb == "start":
            chip, share, seconds, *_ = argument
            cases = make_cases(chip)
            _prepare_peers(make_cases, chip, share, seconds)
            connection.send("ready")
        else:
            times: dict[str, Any] = {}
            case = cases[argument]
            for name, peer in case.peers.items():
                try:
                    times[name] = peers.measure(peer, case.num_layers)
                except Exception as error:  # the other shapes may do
                    times[name] = {"failed": _said(error)}
            connection.send(times)


def _prepare_peers(make_cases: MakeCases, chip: Chip, share: list[int], seconds: float) -> None:
    """Lets a few processes fill the caches on disk with what the peers' libraries compile."""
    number = min(_PEERS, len(share))
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_prepare_share, args=(make_cases, chip, share[first::number]))
        for first in range(number)
    ]
    for process in others:
        process.start()
    end = time.monotonic() + seconds
    for process in others:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()


def _prepare_share(make_cases: MakeCases, chip: Chip, share: list[int]) -> None:
    cases = make_cases(chip)
    for index in share:
        for peer in cases[index].peers.values():
            try:
                peers.prepare(peer)
            except Exception as error:  # measuring it says so again
                print(f"{cases[index].kernel} {cases[index].shape}: {_said(error)}", flush=True)


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
        bits = _digest(programs)
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


def _digest(programs: Programs) -> str:
    """Of the first output on inputs that are the same in every process."""
    outputs = programs.step(programs.draw(jax.random.key(1)), jnp.int32(0))
    first = np.asarray(jax.tree.leaves(outputs)[0])
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
