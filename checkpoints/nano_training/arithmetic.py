"""Arithmetic: sums, differences and products, worked out in steps that are sums themselves.

Knows the range nano is taught: sums and differences of 0 to 30, products of 0 to 10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from checkpoints.nano_training.conversation import Check, Exchange, answer
from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.world import FIRST_NAMES, THINGS

LARGEST_TERM = 30
LARGEST_FACTOR = 10
# Small numbers are what people try first, so they come up more than evenly; and more so in training,
# for larger ones are worked out through them.
_TOPS = (10, 12, 20, LARGEST_TERM)
_HELD_OUT_TOPS = (12, 20, LARGEST_TERM, LARGEST_TERM)
# Differences are the hardest to learn, products the easiest.
_TRAINED_SIGNS: dict[str, float] = {"+": 4, "-": 5, "*": 1.5}
_HELD_OUT_SIGNS: dict[str, float] = {"+": 4, "-": 4, "*": 2}

_PHRASINGS = (
    "What is {a} {sign} {b}?",
    "What's {a} {sign} {b}?",
    "{a} {sign} {b}",
    "{a} {sign} {b} = ?",
    "{a}{sign}{b}",
    "Calculate {a} {sign} {b}.",
    "How much is {a} {sign} {b}?",
    "Compute {a} {sign} {b}.",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
    "{a} {word} {b}?",
    "Please work out {a} {sign} {b}.",
)
_UNSEEN_PHRASINGS = (
    "Can you calculate {a} {sign} {b}?",
    "What does {a} {word} {b} make?",
    "Tell me what {a} {sign} {b} is.",
)
_MORE_STORIES = (
    "{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
    "{name} has {a} {thing}. Then {name} buys {b} more {thing}. How many are there?",
    "There are {a} {thing} in one box and {b} {thing} in another. How many {thing} are there?",
)
_FEWER_STORIES = (
    "{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
    "There are {a} {thing}. {name} takes {b} of them. How many {thing} are left?",
    "{name} had {a} {thing} and lost {b}. How many {thing} does {name} have now?",
)
_TIMES_STORIES = (
    "There are {a} boxes with {b} {thing} each. How many {thing} are there?",
    "{name} buys {b} {thing} on each of {a} days. How many {thing} is that?",
)
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


@dataclass(frozen=True, slots=True)
class _Operation:
    """Two operands and what stands between them."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    @property
    def skill(self) -> str:
        return {"+": "addition", "-": "subtraction", "*": "multiplication"}[self.sign]

    @property
    def word(self) -> str:
        return {"+": "plus", "-": "minus", "*": "times"}[self.sign]


def ask_arithmetic(draw: Draw) -> Exchange:
    """One question with numbers; held out: pairs of operands (of products: with their phrasing)."""
    ask: Callable[[Draw], Exchange] = draw.weighted({_calculate: 8, _story: 2})
    return ask(draw)


def _calculate(draw: Draw) -> Exchange:
    unseen = draw.held_out and draw.chance(0.3)
    phrasing = draw.choice(_UNSEEN_PHRASINGS if unseen else _PHRASINGS)
    signs = _HELD_OUT_SIGNS if draw.held_out else _TRAINED_SIGNS
    operation = _operation(draw, draw.weighted(signs), phrasing)
    sign = draw.choice(("*", "*", "x", "×")) if operation.sign == "*" else operation.sign
    a, b = _written(draw, operation)
    question = phrasing.format(a=a, b=b, sign=sign, word=operation.word)
    return _exchange(operation, draw.casual(question[:1].upper() + question[1:]))


def _story(draw: Draw) -> Exchange:
    sign, stories = draw.choice(
        (("+", _MORE_STORIES), ("-", _FEWER_STORIES), ("*", _TIMES_STORIES))
    )
    story = draw.choice(stories)
    operation = _operation(draw, sign, story)
    question = story.format(
        a=operation.a,
        b=operation.b,
        name=draw.choice(FIRST_NAMES),
        thing=draw.choice(THINGS),
    )
    return _exchange(operation, question)


def _operation(draw: Draw, sign: str, phrasing: str) -> _Operation:
    """Operands in range that this side of the split may use."""
    while True:
        if sign == "*":
            # A times table is remembered, not worked out: held out is how a product is asked for.
            a, b = draw.integer(0, LARGEST_FACTOR), draw.integer(0, LARGEST_FACTOR)
            if draw.admits(sign, a, b, phrasing):
                return _Operation(a, sign, b)
            continue
        top = draw.choice(_HELD_OUT_TOPS if draw.held_out else _TOPS)
        a, b = draw.integer(0, top), draw.integer(0, top)
        if sign == "-" and a < b:
            a, b = b, a
        if draw.admits(sign, a, b):
            return _Operation(a, sign, b)


def _written(draw: Draw, operation: _Operation) -> tuple[str, str]:
    """The operands as digits, or now and then as words."""
    if max(operation.a, operation.b) <= 20 and draw.chance(0.1):
        return _NUMBER_WORDS[operation.a], _NUMBER_WORDS[operation.b]
    return str(operation.a), str(operation.b)


def _exchange(operation: _Operation, question: str) -> Exchange:
    shown = f"{operation.a} {operation.sign} {operation.b}"
    return answer(
        operation.skill,
        question,
        f"The user wants {shown}.",
        _worked_out(operation, shown),
        Check(number=operation.result),
    )


def _worked_out(operation: _Operation, shown: str) -> str:
    """The answer: units first, then tens; 23 - 9 is "23 - 9: 13 - 9 = 4, 10 + 4 = 14".

    A step reads like the answer to a smaller question, so that each teaches the other.
    """
    a, b, sign = operation.a, operation.b, operation.sign
    a_units, b_units = a % 10, b % 10
    if sign == "-" and a_units < b_units:
        a_units += 10
    step = f"{a_units} {sign} {b_units}"
    if sign == "*" or step == shown:
        return f"{shown} = {operation.result}"
    units = a_units + b_units if sign == "+" else a_units - b_units
    tens = operation.result - units
    last = f", {tens} + {units} = {operation.result}" if tens else ""
    return f"{shown}: {step} = {units}{last}"
