"""Which rows of a prefill step are scored, and what is asked about each of their positions.

Knows neither policy nor devices: it cuts the rows of a packed batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.plan import Plan
from glm_jax.engine.scores import PromptScores
from glm_jax.shapes import SLOT, StepShapes


class ScoreOutput(Protocol):
    """What a dispatched scoring will have computed."""

    def __array__(self) -> NDArray[Any]:
        """int32[NUM_SCORE_OUTPUTS, score_rows * prefill_tile]. Waits for it."""
        ...


class PromptScorer(Protocol):
    """Scores rows whose prefill step was dispatched before."""

    def score(self, batch: NDArray[np.int32], targets: NDArray[np.int32], /) -> ScoreOutput:
        """Starts on int32[score_rows, columns] and int32[score_rows, tile]; returns at once."""
        ...

    def prepare_scores(self) -> None:
        """Makes ready what `score` needs, so that it need not wait for it. Any thread."""
        ...


@dataclass(frozen=True, slots=True)
class Scoring:
    """A scoring in flight, and whose positions from `start` on it is about."""

    scores: PromptScores
    start: int
    output: ScoreOutput

    def collect(self) -> None:
        """Waits for it and keeps what it tells."""
        self.scores.take(self.start, np.asarray(self.output))


def ask(
    scorer: PromptScorer, shapes: StepShapes, plan: Plan, batch: NDArray[np.int32]
) -> list[Scoring]:
    """Has the rows of a dispatched prefill step scored whose sequences want it."""
    tile, most = shapes.prefill_tile, shapes.score_rows
    scorings = []
    for chunk in plan.chunks:
        scores = chunk.sequence.scores
        if scores is None:
            continue
        for first in range(0, chunk.num_rows, most):
            num_rows = min(most, chunk.num_rows - first)
            rows = np.zeros((most, batch.shape[1]), np.int32)
            rows[:, SLOT] = shapes.num_slots
            rows[:num_rows] = batch[chunk.row + first :][:num_rows]
            start = chunk.start + first * tile
            targets = scores.targets(start, most * tile).reshape(most, tile)
            scorings.append(Scoring(scores, start, scorer.score(rows, targets)))
    return scorings
