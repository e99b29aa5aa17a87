"""A device that is not there: deterministic tokens at a chosen pace.

Knows no model: a token depends only on the one before it and on its position.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_jax.shapes import (
    CONTROL_MASK,
    IS_LAST,
    IS_MASKED,
    MAX_TOP_LOGPROBS,
    NO_TOKEN,
    NUM_LOGPROBS,
    NUM_OUTPUTS,
    NUM_TOKENS,
    OUTPUT_LOGPROBS,
    OUTPUT_TOKENS,
    OUTPUT_TOP_LOGPROBS,
    OUTPUT_TOP_TOKENS,
    SCORE_RANKS,
    SLOT,
    START,
    Phase,
    StepShapes,
)


@dataclass(frozen=True, slots=True, eq=False)
class MockOutput:
    """The result of a step; np.asarray waits until its time has come.

    Attributes:
      values: int32[NUM_OUTPUTS, rows] or, with drafts, int32[M, NUM_OUTPUTS, rows], as `glm_jax.shapes` lays a step's output out.
      ready_at: time.monotonic() at which the step ends.
    """

    values: NDArray[np.int32]
    ready_at: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        delay = self.ready_at - time.monotonic()
        if delay > 0:
            time.sleep(delay)
        return np.array(self.values, dtype, copy=copy)


class MockRunner:
    """Runs steps without a model, and like a device: asynchronously, one after the other.

    Args:
      shapes: the steps' shapes.
      vocab_size: tokens are in 0 … vocab_size-1.
      seconds_per_step: how long a step takes, of either phase; steps queue up.
      hit_rate: how often a guessed token turns out to be right, where shapes have drafts.
      tokens: draw tokens from this range only, for instance one without stop tokens.

    Raises:
      ValueError: `tokens` is empty or leaves the vocabulary, or hit_rate is not in [0, 1].
    """

    def __init__(
        self,
        shapes: StepShapes,
        vocab_size: int,
        *,
        seconds_per_step: float = 0.0,
        tokens: range | None = None,
        hit_rate: float = 1.0,
    ) -> None:
        drawn = range(vocab_size) if tokens is None else tokens
        if not drawn or min(drawn) < 0 or max(drawn) >= vocab_size:
            raise ValueError(f"{drawn} must be a part of the vocabulary, 0 … {vocab_size - 1}")
        if not 0 <= hit_rate <= 1:
            raise ValueError(f"hit_rate must be in [0, 1], got {hit_rate}")
        self.shapes = shapes
        self._hit_rate = hit_rate
        self._random = np.random.default_rng(0)
        self._seconds_per_step = seconds_per_step
        self._tokens = np.array(drawn, np.int32)
        # The last entry takes what padding rows write.
        self._last_tokens = np.zeros(shapes.num_slots + 1, np.int32)
        self._lengths = np.zeros(shapes.num_slots + 1, np.int32)
        words = shapes.control_columns - CONTROL_MASK.start
        self._masks = np.zeros((shapes.num_slots + 1, words), np.int32)
        self._ready_at = 0.0

    def control(self, controls: NDArray[np.int32]) -> None:
        """From the next step on: int32[slots, control_columns]; only masks are heeded."""
        self._masks[:-1] = controls[:, CONTROL_MASK]

    def dispatch(self, phase: Phase, batch: NDArray[np.int32]) -> MockOutput:
        """Starts a step on int32[rows, columns(phase)] and returns at once.

        Raises:
          ValueError: the batch does not have a shape that a real device has compiled.
        """
        num_rows, num_columns = batch.shape
        if num_rows != self.shapes.rows(phase, num_rows):
            raise ValueError(f"{num_rows} rows are no {phase} bucket")
        if num_columns != self.shapes.columns(phase):
            raise ValueError(f"{phase} takes {self.shapes.columns(phase)} columns, {num_columns=}")
        output = self._prefill(batch) if phase == "prefill" else self._decode(batch)
        self._ready_at = max(self._ready_at, time.monotonic()) + self._seconds_per_step
        return MockOutput(output, self._ready_at)

    def _prefill(self, batch: NDArray[np.int32]) -> NDArray[np.int32]:
        num_tokens = batch[:, NUM_TOKENS]
        last = batch[:, -self.shapes.prefill_tile :][np.arange(len(batch)), num_tokens - 1]
        lengths = batch[:, START] + num_tokens
        return self._take(batch, last, lengths, batch[:, IS_LAST] != 0)

    def _decode(self, batch: NDArray[np.int32]) -> NDArray[np.int32]:
        slots, planes = batch[:, SLOT], []
        goes_on = np.full(len(batch), True)
        for place in range(self.shapes.tokens_per_step):
            if place:
                is_hit = self._random.random(len(batch)) < self._hit_rate
                goes_on = goes_on & is_hit & (batch[:, NUM_TOKENS] > place)
            plane = self._take(batch, self._last_tokens[slots], self._lengths[slots] + 1, goes_on)
            plane[OUTPUT_TOKENS, ~goes_on] = NO_TOKEN
            planes.append(plane)
        return np.stack(planes) if len(planes) > 1 else planes[0]

    def _take(
        self,
        batch: NDArray[np.int32],
        last: NDArray[np.int32],
        lengths: NDArray[np.int32],
        is_kept: NDArray[np.bool_],
    ) -> NDArray[np.int32]:
        """Samples a token for every row and keeps those of the rows that have one to keep."""
        number = int(batch[:, NUM_LOGPROBS].max())
        output = self._sample(last, lengths, number)
        for row in np.flatnonzero(batch[:, IS_MASKED]):
            bits = np.unpackbits(self._masks[batch[row, SLOT]].view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits)
            output[OUTPUT_TOKENS, row] = allowed[output[OUTPUT_TOKENS, row] % allowed.size]
        slots = np.where(is_kept, batch[:, SLOT], self.shapes.num_slots)
        self._last_tokens[slots] = output[OUTPUT_TOKENS]
        self._lengths[slots] = lengths
        return output

    def prepare_scores(self) -> None:
        """There is nothing to make ready."""

    def score(self, batch: NDArray[np.int32], targets: NDArray[np.int32]) -> MockOutput:
        """Scores that depend on a position's token, its place and the target."""
        tile = self.shapes.prefill_tile
        positions = (batch[:, START, None] + np.arange(1, tile + 1, dtype=np.int32)).reshape(-1)
        output = self._sample(batch[:, -tile:].reshape(-1), positions, MAX_TOP_LOGPROBS)
        output[SCORE_RANKS] = 1 + targets.reshape(-1) % 7
        return MockOutput(output, self._ready_at)

    def _sample(
        self, last: NDArray[np.int32], positions: NDArray[np.int32], num_top: int
    ) -> NDArray[np.int32]:
        """The output of a step that fed `last`, whose samples stand at `positions`.

        Like a device it tells the likeliest tokens only where a row asks for some.
        """
        mixed = last.astype(np.uint32) * np.uint32(2654435761) + positions.astype(np.uint32)
        mixed = (mixed ^ (mixed >> 15)) * np.uint32(2246822519)
        mixed ^= mixed >> 13
        output = np.zeros((NUM_OUTPUTS, last.size), np.int32)
        output[OUTPUT_TOKENS] = self._tokens[mixed % self._tokens.size]
        logprobs = -(mixed % 1024).astype(np.float32) / 256
        output[OUTPUT_LOGPROBS] = logprobs.view(np.int32)
        if num_top:
            # The sampled token is the likeliest; its neighbors follow.
            others = np.arange(num_top, dtype=np.uint32)[:, None]
            output[OUTPUT_TOP_TOKENS][:num_top] = self._tokens[(mixed + others) % self._tokens.size]
            below = logprobs - others.astype(np.float32)
            output[OUTPUT_TOP_LOGPROBS][:num_top] = below.view(np.int32)
        return output
