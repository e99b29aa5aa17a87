"""Schedules: requests that arrive and are cancelled between steps, played against an engine.

Knows no runner: whoever makes the engine sees to it that every step asks the schedule first.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams, TokenEvent
from glm_jax.shapes import StepShapes
from tests.engine.attentive import Events, request

Answers = list[tuple[int, float]]


@dataclass(frozen=True)
class Visit:
    """A request that arrives before some step and may be cancelled some steps later."""

    at_step: int
    request: Request
    cancel_after: int | None


class Schedule:
    """Plays visits against an engine: each action when its step comes, or sooner when it idles.

    Args:
      visits: who comes and goes.
      make_engine: builds the engine; its runner calls what it is given with each step's number.
    """

    def __init__(
        self, visits: list[Visit], make_engine: Callable[[Callable[[int], None]], Engine]
    ) -> None:
        self.engine = make_engine(self._act)
        self.events = Events()
        actions: list[tuple[int, Callable[[], None]]] = []
        for visit in visits:
            actions.append((visit.at_step, lambda v=visit: self.engine.submit(v.request)))
            if visit.cancel_after is not None:
                at = visit.at_step + visit.cancel_after
                actions.append((at, lambda v=visit: self.engine.cancel(v.request.id)))
        self._actions = deque(sorted(actions, key=lambda action: action[0]))

    def play(self) -> Events:
        self._feed_if_idle()
        self.engine.run(self._deliver)
        return self.events

    def _act(self, step: int) -> None:
        self.engine.check_integrity()
        while self._actions and self._actions[0][0] <= step:
            self._actions.popleft()[1]()

    def _deliver(self, events: list[TokenEvent]) -> None:
        self.events(events)
        self.engine.check_integrity()
        self._feed_if_idle()

    def _feed_if_idle(self) -> None:
        while self._actions and not self._num_live():
            self._act(self._actions[0][0])
        if not self._actions:
            self.engine.stop()

    def _num_live(self) -> int:
        stats = self.engine.stats()
        return stats.num_waiting + stats.num_running


def check_answers(visits: list[Visit], events: Events, lone: Callable[[Request], Answers]) -> None:
    """Compares every answer with that of a lone run: tokens and log-probabilities, bit by bit."""
    for visit in visits:
        asked, answers = visit.request, events.answers(visit.request.id)
        expected = lone(asked)
        if events.reason(asked.id) == "cancelled":
            assert visit.cancel_after is not None
            assert answers == expected[: len(answers)] and len(answers) < len(expected)
            continue
        assert answers == expected, asked
        stopped = answers[-1][0] in asked.sampling.stop_token_ids
        assert events.reason(asked.id) == ("stop" if stopped else "length")


def draw_visits(rng: random.Random, shapes: StepShapes, vocab_size: int) -> list[Visit]:
    """Requests of a few families of prompts, so that some share beginnings, and some whole prompts."""
    longest = shapes.max_seq_len - 1
    families = [[rng.randrange(vocab_size) for _ in range(longest)] for _ in range(3)]
    return [
        Visit(
            at_step=rng.randint(0, 40),
            request=_draw_request(rng, f"request {i}", rng.choice(families), vocab_size),
            cancel_after=rng.randint(0, 12) if rng.random() < 0.25 else None,
        )
        for i in range(rng.randint(2, 12))
    ]


def _draw_request(rng: random.Random, id: str, family: list[int], vocab_size: int) -> Request:
    num_prompt = rng.randint(1, len(family))
    num_common = rng.randint(0, num_prompt)
    prompt = family[:num_common] + [
        rng.randrange(vocab_size) for _ in range(num_common, num_prompt)
    ]
    stops = rng.sample(range(vocab_size), rng.randint(0, vocab_size // 6))
    drawn = request(id).sampling
    sampling: SamplingParams = replace(
        drawn, max_new_tokens=rng.randint(1, len(family) + 8), stop_token_ids=frozenset(stops)
    )
    return Request(
        id=id,
        prompt=tuple(prompt),
        sampling=sampling,
        priority=rng.choice([0, 0, 0, 1, -1]),
        cache_salt=rng.choice(["", "", "salt"]),
    )


def draw_shapes(rng: random.Random, num_drafts: int = 0) -> StepShapes:
    """Shapes so tight that most schedules meet a full pool: one sequence fits, barely two do."""
    page_size, max_seq_len = rng.choice([1, 4, 5, 8]), 32
    per_sequence = -(-max_seq_len // page_size)
    num_slots, prefill_rows = rng.randint(1, 4), rng.randint(1, 5)
    return StepShapes(
        num_slots=num_slots,
        num_pages=rng.randint(per_sequence, 2 * per_sequence),
        page_size=page_size,
        max_seq_len=max_seq_len,
        prefill_tile=rng.choice([2, 4, 8]),
        prefill_buckets=tuple(sorted({1, prefill_rows})),
        decode_buckets=tuple(sorted({1, num_slots})),
        num_drafts=num_drafts,
    )
