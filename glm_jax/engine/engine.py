"""Admit, schedule, dispatch, commit; forever.

Knows neither HTTP nor text nor JAX: a runner computes steps, a callback takes the events.

The life of a turn, on the engine's own thread:

1. Drain the inbox: queue what was submitted, end what was cancelled or is overdue. Blocks only
   when there is neither a sequence nor a step in flight.
2. Schedule: admit into free slots and decide step n, prefill or decode; where pages run out,
   preempt. Pack it into one array.
3. Dispatch step n. The device gets it while it still computes step n-1; the tokens that step n
   feeds are already there, in the device's slots, and never visit the host on their way.
4. Commit step n-1: wait for its tokens, append each to its sequence, free the pages and the slot
   of those that finished, and deliver all events of the turn in one call.

Several tokens: a decode step can bring a row more than one, up to a number that its plan says, and
the host learns how many only when it reads the step. Until then it counts with the most: pages are
there for all of them, and a sequence that may have reached its length sits out until it is known.

Surplus tokens: step n is dispatched before step n-1 is read, so a sequence that n-1 ends, or
that is cancelled meanwhile, can have more tokens in flight; and a step's later tokens may follow
one that ends the sequence. Commit drops them. A step in flight remembers the sequences it samples
for, not their slots; so it cannot be taken for a token of the next sequence in the slot. Pages and
slots are reused at once: the device runs steps in order, so what a surplus token still writes, it
writes before the next owner does.

A preempted sequence keeps what it has delivered, and a token of it in flight is committed all the
same. When its turn comes it prefills prompt and completion, less what the cache still holds, and
samples the next token: its stream has a pause and no seam.

What is promised: tokens and log-probabilities of a request are a function of the model, the
prompt and the sampling parameters (with a seed), bit by bit, and of nothing else: not of the
requests beside it, their order, arrivals, cancellations or priorities; not of the pages, slot and
bucket it got; not of chunks, preemptions and cache hits. The engine's part of it is that every
row names the right tokens, pages and parameters, and that a row's draws depend on its seed and
position alone. The device's part is that a row's bits depend on that row alone, and that keys and
values of a token are the same whether prefill or decode wrote them: so it is for the references
on one kind of CPU, on one device or several. Kernels of a GPU hold the first by fixed splits and
fixed orders of summation; where their prefill and their decode sum in different orders, what
follows a preemption, or a hit on pages that decode wrote, may differ in the last bits.
Between kinds of hardware, or versions of the compiler, no bits are promised.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.batch import Packer
from glm_jax.engine.commit import Commits, Dispatched, Output
from glm_jax.engine.plan import Plan
from glm_jax.engine.request import (
    EngineDeadError,
    EngineDrainingError,
    EngineStats,
    QueueFullError,
    Request,
    TokenEvent,
    Turn,
)
from glm_jax.engine.scheduler import Scheduler
from glm_jax.engine.score_steps import PromptScorer, ask
from glm_jax.engine.sequence import Sequence
from glm_jax.shapes import Phase, StepShapes

Deliver = Callable[[list[TokenEvent]], None]


class Runner(PromptScorer, Protocol):
    """Computes steps, in the order of dispatch."""

    def dispatch(self, phase: Phase, batch: NDArray[np.int32], /) -> Output:
        """Starts a step on int32[rows, columns(phase)] and returns at once."""
        ...

    def control(self, controls: NDArray[np.int32], /) -> None:
        """From the next step on: int32[slots, control_columns] in place of the controls so far."""
        ...


class Engine:
    """Serves requests on one runner. One thread runs it; any thread submits and cancels.

    Args:
      runner: computes the steps.
      shapes: the runner's shapes.
      max_queue: requests that may wait beyond those that fill the slots.
      integrity_interval: turns from one check of the account of slots and pages to the next; 0:
        never. An account that does not add up is the engine's death.

    Raises:
      ValueError: max_queue or integrity_interval is negative.
    """

    def __init__(
        self, runner: Runner, shapes: StepShapes, max_queue: int, *, integrity_interval: int = 1000
    ) -> None:
        if max_queue < 0 or integrity_interval < 0:
            raise ValueError(f"{max_queue=} and {integrity_interval=} must not be negative")
        self._runner = runner
        self._shapes = shapes
        self._max_live = shapes.num_slots + max_queue
        self._scheduler = Scheduler(shapes)
        self._packer = Packer(shapes)
        self._commits = Commits(self._scheduler, shapes)
        self._num_steps: dict[Phase, int] = {"prefill": 0, "decode": 0}
        self._num_prefilled = self._num_prefill_computed = 0
        self._num_timeouts = 0
        self._integrity_interval = integrity_interval
        self._num_turns = 0
        self._num_integrity_checks = 0
        self._integrity_seconds = 0.0
        # Guards everything below; held for moments only, never while the device is waited for.
        self._inbox = threading.Condition()
        self._arrivals: list[Sequence] = []
        self._cancellations: list[Sequence] = []
        self._live: dict[str, Sequence] = {}  # until the last event is handed over
        self._is_draining = False
        self._cause_of_death: str | None = None

    @property
    def draining(self) -> bool:
        """Whether stop() was called, so that new requests are refused."""
        return self._is_draining

    def submit(self, request: Request) -> None:
        """Accepts a request; its events will be delivered. Any thread.

        Raises:
          ValueError: the request can never fit, or its id is that of a live request.
          QueueFullError: every slot and every place in the queue is taken.
          EngineDrainingError: stop() was called.
          EngineDeadError: the engine died.
        """
        sequence = self._scheduler.sequence_for(request)
        with self._inbox:
            if self._cause_of_death is not None:
                raise EngineDeadError(f"the engine died of {self._cause_of_death}; restart it")
            if self._is_draining:
                raise EngineDrainingError("the engine is shutting down; ask another one")
            if request.id in self._live:
                raise ValueError(f"request id {request.id!r} is in use by a live request")
            if len(self._live) >= self._max_live:
                raise QueueFullError(f"{len(self._live)} requests are in work; try again later")
            self._live[request.id] = sequence
            self._arrivals.append(sequence)
            self._inbox.notify()

    def cancel(self, request_id: str) -> None:
        """Ends a request early, with a last event "cancelled". Any thread; any number of times.

        A request that is unknown or has finished is left as it is.
        """
        with self._inbox:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self._cancellations.append(sequence)
                self._inbox.notify()

    def stop(self) -> None:
        """Refuses new requests from now on; run() returns once the accepted ones have finished."""
        with self._inbox:
            self._is_draining = True
            self._inbox.notify()

    def stats(self) -> EngineStats:
        """A snapshot; any thread."""
        scheduler, pool, commits = self._scheduler, self._scheduler.pool, self._commits
        with self._inbox:
            return EngineStats(
                num_waiting=len(self._arrivals) + scheduler.num_waiting,
                num_running=scheduler.num_running,
                num_pages_used=pool.num_used,
                num_pages=pool.num_pages,
                num_prefill_steps=self._num_steps["prefill"],
                num_decode_steps=self._num_steps["decode"],
                is_alive=self._cause_of_death is None,
                num_pages_resting=pool.num_resting,
                num_evicted=pool.num_evicted,
                num_preemptions=scheduler.num_preemptions,
                num_timeouts=self._num_timeouts,
                num_admitted_tokens=scheduler.num_admitted_tokens,
                num_cached_tokens=scheduler.num_cached_tokens,
                num_prefill_tokens=self._num_prefilled,
                num_decode_tokens=commits.num_decoded,
                num_prefill_padding=self._num_prefill_computed - self._num_prefilled,
                num_decode_padding=commits.num_computed - commits.num_decoded,
                num_offered=tuple(commits.num_offered),
                num_gained=tuple(commits.num_gained),
                num_integrity_checks=self._num_integrity_checks,
                integrity_seconds=self._integrity_seconds,
            )

    def prepare_scores(self) -> None:
        """Makes ready what num_prompt_logprobs needs, which the engine would else wait for. Any thread."""
        self._runner.prepare_scores()

    def check_integrity(self) -> None:
        """Checks the account of slots and pages. Only on the engine's thread, or once it ended.

        Raises:
          AssertionError: it does not add up.
        """
        self._scheduler.check_integrity()

    def run(self, deliver: Deliver) -> None:
        """The body of the engine's thread: serves until stop() and the last request's end.

        `deliver` gets all events of a turn in one list, on this thread; it must not block.

        Raises:
          Exception: whatever the runner or `deliver` raised. Every live request then ends with
            an "error" event, and the engine accepts nothing any more.
        """
        self._serve(lambda turn: deliver(turn.events), in_columns=False)

    def run_turns(self, deliver: Callable[[Turn], None]) -> None:
        """The same for who would rather have most tokens in columns than in events."""
        self._serve(deliver, in_columns=True)

    def _serve(self, deliver: Callable[[Turn], None], *, in_columns: bool) -> None:
        in_flight: Dispatched | None = None
        try:
            while in_flight is not None or not self._is_drained():
                turn, in_flight = self._turn(in_flight, in_columns)
                if turn:
                    self._hand_over(turn, deliver)
                self._check_in_time()
        except BaseException as error:
            self._die(error, deliver)
            raise

    def _turn(
        self, in_flight: Dispatched | None, in_columns: bool
    ) -> tuple[Turn, Dispatched | None]:
        events = self._drain_inbox(block=in_flight is None and self._scheduler.is_idle)
        events += self._end_overdue()
        plan = self._scheduler.schedule()
        dispatched = self._dispatch(plan) if plan is not None else None
        if in_flight is None:
            return Turn(events), dispatched
        turn = self._commits.read(in_flight, in_columns=in_columns)
        turn.events[:0] = events
        return turn, dispatched

    def _check_in_time(self) -> None:
        self._num_turns += 1
        if self._integrity_interval and self._num_turns % self._integrity_interval == 0:
            self._check_on_duty()

    def _drain_inbox(self, *, block: bool) -> list[TokenEvent]:
        with self._inbox:
            while block and not (self._arrivals or self._cancellations or self._is_draining):
                self._inbox.wait()
            for sequence in self._arrivals:
                self._scheduler.add(sequence)
            cancellations = self._cancellations
            self._arrivals, self._cancellations = [], []
        events: list[TokenEvent] = []
        for sequence in cancellations:
            if sequence.finish_reason is None:
                self._scheduler.finish(sequence, "cancelled")
                events.append(TokenEvent(sequence.request.id, None, finish_reason="cancelled"))
        return events

    def _end_overdue(self) -> list[TokenEvent]:
        overdue = self._scheduler.overdue(time.monotonic())
        for sequence in overdue:
            self._scheduler.finish(sequence, "timeout")
        self._num_timeouts += len(overdue)
        why = "no slot or pages came free for it before its deadline"
        return [
            TokenEvent(sequence.request.id, None, finish_reason="timeout", error=why)
            for sequence in overdue
        ]

    def _check_on_duty(self) -> None:
        start = time.perf_counter()
        self._scheduler.check_integrity()
        self._num_integrity_checks += 1
        self._integrity_seconds += time.perf_counter() - start

    def _dispatch(self, plan: Plan) -> Dispatched:
        batch = self._packer.pack(plan)
        controls = self._packer.new_controls()
        if controls is not None:
            self._runner.control(controls)
        output = self._runner.dispatch(plan.phase, batch)
        for chunk in plan.chunks:
            if chunk.sequence.began is None:
                chunk.sequence.began = time.monotonic()
        self._num_steps[plan.phase] += 1
        if plan.phase == "prefill":
            self._num_prefilled += plan.num_prompt_tokens
            self._num_prefill_computed += len(batch) * self._shapes.prefill_tile
        scorings = ask(self._runner, self._shapes, plan, batch)
        return Dispatched(output, plan.phase, plan.samples, plan.gains, scorings)

    def _hand_over(self, turn: Turn, deliver: Callable[[Turn], None]) -> None:
        finished = [event.request_id for event in turn.events if event.finish_reason is not None]
        if finished:
            with self._inbox:
                for request_id in finished:
                    del self._live[request_id]
        deliver(turn)

    def _is_drained(self) -> bool:
        with self._inbox:
            return self._is_draining and not self._arrivals and self._scheduler.is_idle

    def _die(self, error: BaseException, deliver: Callable[[Turn], None]) -> None:
        cause = f"{type(error).__name__}: {error}"
        with self._inbox:
            self._cause_of_death = cause
            live = list(self._live.values())
            for sequence in self._arrivals:
                self._scheduler.add(sequence)
            self._arrivals, self._live = [], {}
        ends = [
            TokenEvent(sequence.request.id, None, finish_reason="error", error=cause)
            for sequence in live
        ]
        deliver(Turn(ends))
        for sequence in live:
            if sequence.finish_reason is None:
                self._scheduler.finish(sequence, "error")
