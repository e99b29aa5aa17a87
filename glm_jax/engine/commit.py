"""Reading a step: its tokens go to their sequences, and what they mean to the requests is told.

Knows neither arrivals nor threads, and not what runs next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.outcome import Outcome
from glm_jax.engine.request import FinishReason, TokenEvent, Turn
from glm_jax.engine.scheduler import Scheduler
from glm_jax.engine.score_steps import Scoring
from glm_jax.engine.sequence import Sequence
from glm_jax.shapes import NO_TOKEN, Phase, StepShapes


class Output(Protocol):
    """What a dispatched step will have computed."""

    def __array__(self) -> NDArray[Any]:
        """int32[NUM_OUTPUTS, rows], as `glm_jax.shapes` lays it out. Waits for the step.

        Of a decode step whose rows can gain several tokens, int32[M, NUM_OUTPUTS, rows].
        """
        ...


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A step in flight.

    Attributes:
      output: what it will have computed.
      phase: which step it is.
      samples: the (row, sequence) pairs it samples for.
      gains: how many tokens each of these may gain.
      scorings: what tells of its prompts' tokens.
    """

    output: Output
    phase: Phase
    samples: tuple[tuple[int, Sequence], ...]
    gains: tuple[int, ...]
    scorings: list[Scoring]


class Commits:
    """Takes the tokens of steps in, in the order of their dispatch.

    Attributes:
      num_decoded: tokens that decode steps brought.
      num_computed: tokens that they computed, padding included.
      num_offered, num_gained: as EngineStats has them.
    """

    def __init__(self, scheduler: Scheduler, shapes: StepShapes) -> None:
        self._scheduler = scheduler
        self._has_drafts = shapes.num_drafts > 0
        self._samples: tuple[tuple[int, Sequence], ...] = ()
        self._ids: tuple[str, ...] = ()  # of these samples
        self.num_decoded = self.num_computed = 0
        self.num_offered = [0] * (1 + shapes.num_drafts)
        self.num_gained = [0] * (1 + shapes.num_drafts)

    def read(self, step: Dispatched, *, in_columns: bool) -> Turn:
        """Waits for a step and tells what it brought.

        Args:
          in_columns: whether a turn may have columns; without, all are events.
        """
        # Also without samples: waiting here keeps the host from running further ahead.
        outcome = Outcome(np.asarray(step.output))
        for scoring in step.scorings:
            scoring.collect()
        if step.phase == "prefill":
            return Turn(self._events(outcome, step, [1] * len(step.samples)))
        if outcome.num_places == 1:
            return self._read_single(outcome, step, in_columns)
        gained = [outcome.num_gained(row) for row, _ in step.samples]
        # Drafts are all verified; steps in a row end with the last row that needs them.
        num_computed = outcome.num_places if self._has_drafts else max(gained)
        self._count(sum(gained), num_computed * outcome.num_rows)
        for place in range(len(self.num_offered)):
            self.num_offered[place] += sum(gain > place for gain in step.gains)
            self.num_gained[place] += sum(number > place for number in gained)
        return Turn(self._events(outcome, step, gained))

    def _read_single(self, outcome: Outcome, step: Dispatched, in_columns: bool) -> Turn:
        """A decode step that brings each row one token. All it does per token costs every answer."""
        number, (tokens,), (logprobs,) = len(step.samples), outcome.tokens, outcome.logprobs
        self._count(number, outcome.num_rows)
        self.num_offered[0] += number
        self.num_gained[0] += number
        if number < len(tokens):
            tokens, logprobs = tokens[:number], logprobs[:number]
        assert NO_TOKEN not in tokens, f"a row of {step.samples} gained no token"
        reasons: dict[int, FinishReason | None] = {}
        surplus: set[int] = set()
        told: list[tuple[int, Sequence]] = []
        for row, sequence in self._scheduler.commit_routine(step.samples, tokens):
            if sequence.finish_reason is not None:
                surplus.add(row)
                continue
            reasons[row] = self._scheduler.commit(sequence, tokens[row])
            if reasons[row] is not None or sequence.request.sampling.num_logprobs:
                told.append((row, sequence))
        if not in_columns:
            told = [sample for sample in step.samples if sample[0] not in surplus]
        events = [_event(outcome, 0, row, its, reasons.get(row)) for row, its in told]
        if not in_columns:
            return Turn(events)
        if step.samples is not self._samples:
            self._samples = step.samples
            self._ids = tuple([sequence.request.id for _, sequence in step.samples])
        if not (told or surplus):
            return Turn(events, self._ids, tokens, logprobs)
        elsewhere = surplus.union([row for row, _ in told])
        rows = [row for row in range(number) if row not in elsewhere]
        ids = tuple([self._ids[row] for row in rows])
        return Turn(events, ids, [tokens[row] for row in rows], [logprobs[row] for row in rows])

    def _events(self, outcome: Outcome, step: Dispatched, gained: list[int]) -> list[TokenEvent]:
        """Takes in what rows gained, each up to the token that ends its sequence."""
        events: list[TokenEvent] = []
        for (row, sequence), gain, number in zip(step.samples, step.gains, gained, strict=True):
            assert 1 <= number <= gain, f"{number} tokens for {sequence.request.id}, not 1 … {gain}"
            if sequence.finish_reason is not None:
                continue  # they are surplus
            self._scheduler.fall_short(sequence, gain - number)
            for place in range(number):
                reason = self._scheduler.commit(sequence, outcome.tokens[place][row])
                events.append(_event(outcome, place, row, sequence, reason))
                if reason is not None:
                    break
        return events

    def _count(self, num_tokens: int, num_computed: int) -> None:
        self.num_decoded += num_tokens
        self.num_computed += num_computed


def _event(
    outcome: Outcome, place: int, row: int, sequence: Sequence, reason: FinishReason | None
) -> TokenEvent:
    """A token that was just taken in."""
    return TokenEvent(
        sequence.request.id,
        outcome.tokens[place][row],
        outcome.logprobs[place][row],
        reason,
        top_logprobs=outcome.top_logprobs(place, row, sequence.request.sampling.num_logprobs),
        num_cached_tokens=sequence.num_cached or 0,
        began=sequence.began,
        prompt_logprobs=sequence.told_of_prompt(),
    )
