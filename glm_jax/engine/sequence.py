"""One request's progress: its tokens, its pages, its slot.

Knows neither the pool its pages come from nor who runs beside it: the scheduler moves it forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.request import FinishReason, Request


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """The engine's mutable record of one request. Two sequences are never equal.

    The host runs ahead of what it has read, so progress is counted twice: what has been
    dispatched (`num_prefilled`, `num_dispatched`), and what has been read (`completion`).

    Attributes:
      request: what the client asked.
      prompt: int32[prompt tokens].
      max_new_tokens: completion tokens at most, after capping to the longest sequence.
      max_pages: pages that the longest possible outcome fills.
      slot: the row of device state it holds; None while waiting and once finished.
      pages: page ids in order of position. A released sequence gets a new list, so the identity
        of the list names one stay in one slot.
      num_prefilled: prompt tokens in dispatched prefill steps.
      num_dispatched: completion tokens that dispatched steps sample.
      completion: tokens read and delivered.
      finish_reason: None while more is to come.
    """

    request: Request
    prompt: NDArray[np.int32]
    max_new_tokens: int
    max_pages: int
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    num_prefilled: int = 0
    num_dispatched: int = 0
    completion: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens remain to be dispatched."""
        return self.num_prefilled < self.prompt.size

    @property
    def can_decode(self) -> bool:
        """Whether one more decode step can bring a token that will be kept."""
        return 0 < self.num_dispatched < self.max_new_tokens and not self.is_behind

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
        """Positions valid in the cache once every dispatched step has run.

        The newest token is not among them: the next decode step writes it, at this position.
        """
        return self.num_prefilled + max(self.num_dispatched - 1, 0)

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
