"""One-step arithmetic: sums, differences and products, worked out digit by digit when thinking.

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
    ask: Callable[[Draw], Exchange] = draw.weighted({_calculate: 7, _story: 2, _compare: 1})
    return ask(draw)


def _calculate(draw: Draw) -> Exchange:
    unseen = draw.held_out and draw.chance(0.3)
    phrasing = draw.choice(_UNSEEN_PHRASINGS if unseen else _PHRASINGS)
    operation = _operation(draw, draw.weighted({"+": 4, "-": 4, "*": 2}), phrasing)
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


def _compare(draw: Draw) -> Exchange:
    while True:
        a, b = draw.integer(0, LARGEST_TERM), draw.integer(0, LARGEST_TERM)
        if a != b and draw.admits("compare", a, b):
            break
    larger = draw.chance(0.5)
    chosen, other = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    word = "larger" if larger else "smaller"
    phrasing = draw.choice(("Which is {}, {} or {}?", "What number is {}: {} or {}?"))
    return answer(
        "comparison",
        draw.casual(phrasing.format(word, a, b)),
        f"Compare {a} and {b}. {max(a, b)} > {min(a, b)}.",
        f"{chosen} is {word} than {other}.",
        Check(equals=f"{chosen} is {word} than {other}."),
    )


def _operation(draw: Draw, sign: str, phrasing: str) -> _Operation:
    """Operands in range that this side of the split may use."""
    while True:
        if sign == "*":
            # A times table is remembered, not worked out: held out is how a product is asked for.
            a, b = draw.integer(0, LARGEST_FACTOR), draw.integer(0, LARGEST_FACTOR)
            if draw.admits(sign, a, b, phrasing):
                return _Operation(a, sign, b)
            continue
        # Small numbers are what people try first, so they come up more than evenly.
        top = draw.choice((12, 20, LARGEST_TERM, LARGEST_TERM))
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
        f"{shown}: {_working(operation)}",
        f"{shown} = {operation.result}",
        Check(number=operation.result),
    )


def _working(operation: _Operation) -> str:
    """The calculation as it is done on paper, from the units up."""
    a, b = operation.a, operation.b
    if operation.sign == "*" or max(a, b) < 10:
        return f"{operation.result}."
    (a_tens, a_units), (b_tens, b_units) = divmod(a, 10), divmod(b, 10)
    if operation.sign == "+":
        units = a_units + b_units
        carry = units // 10
        tens = f"{a_tens} + {b_tens} + {carry} = {a_tens + b_tens + carry}"
        return f"{a_units} + {b_units} = {units}, carry {carry}. {tens}. So {a + b}."
    borrow = int(a_units < b_units)
    units = f"{a_units + 10 * borrow} - {b_units} = {a_units + 10 * borrow - b_units}"
    tens = f"{a_tens} - {b_tens} - {borrow} = {a_tens - b_tens - borrow}"
    return f"{units}, borrow {borrow}. {tens}. So {a - b}."
