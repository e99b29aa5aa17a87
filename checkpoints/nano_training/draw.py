"""A seeded source of choices that keeps training and held-out combinations apart.

Knows nothing of what is being chosen.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

_HELD_OUT_ONE_IN = 10


def is_held_out(*key: object) -> bool:
    """Whether a combination belongs to the evaluation; the same in every process and for every seed."""
    return zlib.crc32(repr(key).encode()) % _HELD_OUT_ONE_IN == 0


class Draw:
    """Choices for one conversation, a pure function of the name it was made with.

    Attributes:
      held_out: whether this conversation belongs to the evaluation.
    """

    def __init__(self, name: str, *, held_out: bool) -> None:
        self.held_out = held_out
        self._random = random.Random(name)

    def choice[T](self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[self._random.randrange(len(options))]

    def weighted[T](self, options: dict[T, float]) -> T:
        """One of the keys, as likely as its weight says."""
        return self._random.choices(list(options), list(options.values()))[0]

    def sample[T](self, options: Sequence[T], count: int) -> list[T]:
        """That many different options in random order."""
        return self._random.sample(options, count)

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return self._random.randint(low, high)

    def chance(self, probability: float) -> bool:
        """True that often."""
        return self._random.random() < probability

    def admits(self, *key: object) -> bool:
        """Whether this side of the split may use the combination."""
        return is_held_out(*key) == self.held_out

    def phrasing(self, seen: Sequence[str], unseen: Sequence[str]) -> str:
        """A way to say it: training uses the seen ones only, the evaluation the unseen ones only."""
        return self.choice(unseen if self.held_out else seen)

    def casual(self, question: str) -> str:
        """The question as a person might type it: sometimes polite, in lower case, or unpunctuated."""
        kind = self._random.random()
        if kind < 0.06:
            return question.lower()
        if kind < 0.12:
            return question.rstrip("?.!")
        if kind < 0.17:
            return question.lower().rstrip("?.!")
        if kind < 0.22:
            return (
                self.choice(("Hi! ", "Hello, ", "Hey. ", "Please answer: ", "Question: "))
                + question
            )
        if kind < 0.26:
            return question + self.choice((" Please.", " Thanks!", " Be brief."))
        return question
