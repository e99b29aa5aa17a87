"""Drills of copying: random tokens said twice, learned the second time.

Knows nothing of what tokens mean. Finding the earlier place and going on from there is what names
and arguments of tools need, and what a model this small otherwise learns late.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from checkpoints.nano_training.rendering import Sample


def drills(seed: int, count: int, num_tokens: int) -> Iterator[Sample]:
    """Samples of at most 64 tokens, drawn evenly from the first num_tokens of the vocabulary."""
    random = np.random.default_rng((seed, num_tokens))
    for _ in range(count):
        size = int(random.integers(3, 25))
        first = random.integers(0, num_tokens, size).tolist()
        between = random.integers(0, num_tokens, int(random.integers(0, 16))).tolist()
        start = int(random.integers(0, size - 2))
        again = first[start:]
        learned = len(first) + len(between) + 1
        tokens = (*first, *between, *again)
        yield Sample(tokens, tuple(place >= learned for place in range(len(tokens))))
