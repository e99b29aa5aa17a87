"""One request's progress: its tokens, its pages, its slot.

Knows neither the pool its pages come from nor who runs beside it: the scheduler moves it forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.request import FinishReason, PromptLogprob, Request
from glm_jax.engine.scores import PromptScores


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """The engine's mutable record of one request. Two sequences are never equal.

    The host runs ahead of what it has read, so progress is counted twice: what has been
    dispatched (`num_prefilled`, `num_dispatched`), and what has been read (`completion`). Where a
    step may bring fewer tokens than it could, what is dispatched is a bound until it is read.

    A preempted sequence gives up slot and pages and keeps its completion. Once admitted again it
    prefills prompt and completion together, and goes on with the next token.

    Attributes:
      request: what the client asked.
      num_prompt: tokens of the prompt.
      max_new_tokens: completion tokens at most, after capping to the longest sequence.
      max_pages: pages that the longest possible outcome fills.
      tokens: int32[prompt and longest completion]; `known_tokens` brings it up to date.
      keys: of the pages that known tokens fill, as `glm_jax.engine.prefix` makes them.
      arrival: its place in the order of submission.
      slot: the row of device state it holds; None while waiting and once finished.
      pages: page ids in order of position. A released sequence gets a new list, so the identity
        of the list names one stay in one slot.
      num_published: leading pages that are shared under their keys.
      num_to_prefill: tokens to prefill before it decodes, in this stay.
      num_prefilled: of them, those in dispatched prefill steps or found in the cache.
      num_cached: prompt tokens that its first admission found in the cache.
      began: time.monotonic() at which its first step was dispatched.
      num_dispatched: completion tokens that dispatched steps sample, at most.
      completion: tokens read and delivered.
      num_written: of them, those that `tokens` has.
      routine_until: a token that makes the completion no longer than this, and is no stop token,
        is appended and nothing else needs to be looked at.
      has_room_until: the value of num_dispatched at which its pages are full, once it decodes.
      finish_reason: None while more is to come.
      scores: of the prompt's tokens, until they are delivered; None where none are wanted.
    """

    request: Request
    num_prompt: int
    max_new_tokens: int
    max_pages: int
    tokens: NDArray[np.int32]
    keys: list[bytes] = field(default_factory=list)
    arrival: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    num_published: int = 0
    num_to_prefill: int = 0
    num_prefilled: int = 0
    num_cached: int | None = None
    began: float | None = None
    num_dispatched: int = 0
    completion: list[int] = field(default_factory=list)
    num_written: int = 0
    routine_until: int = 0
    has_room_until: int = 0
    finish_reason: FinishReason | None = None
    scores: PromptScores | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the lower."""
        return self.request.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host, of prompt and completion."""
        return self.num_prompt + len(self.completion)

    @property
    def num_in_flight(self) -> int:
        """Completion tokens that are sampled but not read, at most; 0 only if there is none."""
        return self.num_dispatched - len(self.completion)

    @property
    def computes_all(self) -> bool:
        """Whether no part of it may come from the cache: the device must see every token."""
        return self.scores is not None or self.request.sampling.needs_history

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens remain to be prefilled."""
        return self.num_prefilled < self.num_to_prefill

    @property
    def can_decode(self) -> bool:
        """Whether one more decode step can bring a token that will be kept."""
        return (
            0 < self.num_dispatched < self.max_new_tokens
            and self.num_prefilled >= self.num_to_prefill
            and (self.request.constraint is None or not self.is_behind)
        )

    @property
    def is_behind(self) -> bool:
        """Whether its constraint must see the token in flight before the next one is sampled."""
        constraint = self.request.constraint
        return (
            constraint is not None
            and len(self.completion) < self.num_dispatched
            and constraint.binds(self.num_dispatched)
        )

    @property
    def length(self) -> int:
        """Positions valid in the cache once every dispatched step has run, at most.

        The newest token is not among them: the next decode step writes it, at this position.
        """
        if self.num_prefilled < self.num_to_prefill:
            return self.num_prefilled
        return self.num_prompt + self.num_dispatched - 1

    def told_of_prompt(self) -> tuple[PromptLogprob, ...]:
        """The scores of the prompt's tokens, once: they are then forgotten."""
        scores, self.scores = self.scores, None
        return () if scores is None else scores.result()

    def known_tokens(self) -> NDArray[np.int32]:
        """Prompt and completion as far as they are read: int32[num_tokens], a view."""
        start = self.num_prompt + self.num_written
        self.tokens[start : self.num_tokens] = self.completion[self.num_written :]
        self.num_written = len(self.completion)
        return self.tokens[: self.num_tokens]

    def append(self, token: int) -> FinishReason | None:
        """Takes the next completion token in; returns why it is the last one, if it is."""
        self.completion.append(token)
        if self.request.constraint is not None:
            self.request.constraint.accept(token)
        if token in self.request.sampling.stop_token_ids:
            return "stop"
        if len(self.completion) == self.max_new_tokens:
            return "length"
        return None

    def leave(self) -> None:
        """Forgets slot and pages, and what was computed with them."""
        self.slot = None
        self.pages = []
        self.num_published = self.num_prefilled = self.num_to_prefill = 0
        self.routine_until = self.has_room_until = 0
