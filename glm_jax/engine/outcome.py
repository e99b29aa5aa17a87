"""What a step brought, row by row.

Knows neither sequences nor who wants what: one output in, tokens and log-probabilities out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_jax.shapes import (
    NO_TOKEN,
    OUTPUT_LOGPROBS,
    OUTPUT_TOKENS,
    OUTPUT_TOP_LOGPROBS,
    OUTPUT_TOP_TOKENS,
)


class Outcome:
    """A step's output, read. A place is where a token stands among those that a row gained.

    Args:
      output: int32[NUM_OUTPUTS, rows], or int32[places, NUM_OUTPUTS, rows] where rows can gain
        several tokens.

    Attributes:
      num_places: tokens that a row can gain.
      num_rows: rows, padding included.
      tokens: by place and row; NO_TOKEN where there is none.
      logprobs: log-probabilities of the tokens, by place and row.
    """

    def __init__(self, output: NDArray[Any]) -> None:
        planes = output if output.ndim == 3 else output[None]
        self._planes = planes
        self.num_places, _, self.num_rows = planes.shape
        self.tokens: list[list[int]] = planes[:, OUTPUT_TOKENS].tolist()
        bits = np.ascontiguousarray(planes[:, OUTPUT_LOGPROBS])
        self.logprobs: list[list[float]] = bits.view(np.float32).tolist()

    def num_gained(self, row: int) -> int:
        """How many tokens a row gained; they are in the first places."""
        for place, tokens in enumerate(self.tokens):
            if tokens[row] == NO_TOKEN:
                return place
        return self.num_places

    def top_logprobs(self, place: int, row: int, number: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens in the place of a token, and their log-probabilities."""
        if not number:
            return ()
        plane = self._planes[place]
        tokens = plane[OUTPUT_TOP_TOKENS, row][:number].tolist()
        logprobs = plane[OUTPUT_TOP_LOGPROBS, row][:number].view(np.float32).tolist()
        return tuple(zip(tokens, logprobs, strict=True))
