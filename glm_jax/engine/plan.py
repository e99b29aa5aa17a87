"""What the scheduler decided for one step. Plain data.

Knows neither why nor on which device.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm_jax.engine.sequence import Sequence
from glm_jax.shapes import Phase


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of one sequence's known tokens that a prefill step covers.

    Attributes:
      sequence: whose tokens.
      row: the first of its rows in the step.
      num_rows: rows it fills; all but the last are full.
      start: position of its first token, a multiple of prefill_tile.
      num_tokens: tokens it covers.
      is_last: whether it ends what is to be prefilled, so that a token is sampled after it.
    """

    sequence: Sequence
    row: int
    num_rows: int
    start: int
    num_tokens: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What the scheduler decided for one step. Valid until the next call to the scheduler.

    Attributes:
      phase: which compiled step runs.
      num_rows: rows the step needs, padding excluded.
      samples: (row, sequence) of every row that the step samples for, in row order.
      gains: how many tokens each of these may gain, at least one.
      chunks: the prompts' parts, in row order; empty for decode, where `samples` says it all.
    """

    phase: Phase
    num_rows: int
    samples: tuple[tuple[int, Sequence], ...]
    gains: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts that the step feeds, padding excluded."""
        return sum(chunk.num_tokens for chunk in self.chunks)
