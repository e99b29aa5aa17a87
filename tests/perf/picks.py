"""Which experts tokens pick, the same for every library that is timed: loads decide what is read."""

from itertools import count

import numpy as np


def expected_in_use(tokens: int, experts: int, per_token: int, num_local: int) -> float:
    """How many of this device's experts some token picks, if all are equally likely."""
    return num_local * (1 - (1 - per_token / experts) ** tokens)


def picks_of(
    tokens: int, experts: int, per_token: int, num_local: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random picks with as many of the first num_local experts in use as is to be expected.

    Returns:
      int32[tokens, per_token], each token's experts; float32 of the same shape, their weights.
    """
    expected = expected_in_use(tokens, experts, per_token, num_local)
    for attempt in count():
        rng = np.random.default_rng((seed, attempt))
        scores = rng.random((tokens, experts), np.float32)
        picks = np.argsort(-scores, axis=1)[:, :per_token].astype(np.int32)
        if abs(in_use(picks, num_local) - expected) <= 0.5 or attempt == 100:
            return picks, np.take_along_axis(scores, picks, 1) / per_token
    raise AssertionError("count() does not end")


def in_use(picks: np.ndarray, num_local: int) -> int:
    """How many of the first num_local experts some token picks."""
    return len(np.unique(picks[picks < num_local]))
