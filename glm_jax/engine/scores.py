"""How likely the tokens of one prompt were, as far as the device has told.

Knows neither steps nor devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.request import PromptLogprob
from glm_jax.shapes import (
    NUM_SCORE_OUTPUTS,
    SCORE_LOGPROBS,
    SCORE_RANKS,
    SCORE_TOP_LOGPROBS,
    SCORE_TOP_TOKENS,
)


class PromptScores:
    """The scores of one prompt, as they come.

    Args:
      prompt: its tokens.
      num_top: likeliest tokens to tell in each place.
    """

    def __init__(self, prompt: tuple[int, ...], num_top: int) -> None:
        self._prompt = prompt
        self._num_top = num_top
        # Column p is about the token at position p; nothing is told of the first one.
        self._told = np.zeros((NUM_SCORE_OUTPUTS, len(prompt)), np.int32)

    def targets(self, start: int, num_tokens: int) -> NDArray[np.int32]:
        """The token after each of num_tokens positions, from `start` on; 0 past the prompt's end."""
        targets = np.zeros(num_tokens, np.int32)
        following = self._prompt[start + 1 : start + 1 + num_tokens]
        targets[: len(following)] = following
        return targets

    def take(self, start: int, output: NDArray[np.int32]) -> None:
        """Keeps what was told after the positions from `start` on."""
        told = self._told[:, start + 1 : start + 1 + output.shape[1]]
        told[...] = output[:, : told.shape[1]]

    def result(self) -> tuple[PromptLogprob, ...]:
        """Every token of the prompt but the first."""
        told = self._told[:, 1:]
        logprobs = told[SCORE_LOGPROBS].view(np.float32).tolist()
        ranks = told[SCORE_RANKS].tolist()
        tops = told[SCORE_TOP_TOKENS][: self._num_top].T.tolist()
        top_bits = np.ascontiguousarray(told[SCORE_TOP_LOGPROBS][: self._num_top].T)
        top_logprobs = top_bits.view(np.float32).tolist()
        return tuple(
            PromptLogprob(token, logprob, rank, tuple(zip(top, likely, strict=True)))
            for token, logprob, rank, top, likely in zip(
                self._prompt[1:], logprobs, ranks, tops, top_logprobs, strict=True
            )
        )
