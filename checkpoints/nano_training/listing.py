"""Listing and counting.

Knows one canonical order for every list, so that an answer can be checked to the letter.
"""

from __future__ import annotations

from collections.abc import Callable

from checkpoints.nano_training.conversation import Check, Exchange, answer
from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.world import CATEGORIES, THINGS, WORDS

_NUMBER_WORDS = "zero one two three four five six seven eight".split()
_LIST_PHRASINGS = (
    "Name {n} {category}.",
    "List {n} {category}.",
    "Give me {n} {category}.",
    "Tell me {n} {category}.",
    "Can you name {n} {category}?",
    "Write down {n} {category}.",
)
_UNSEEN_LIST_PHRASINGS = ("Please list {n} {category}.", "Can you give me {n} {category}?")


def ask_listing(draw: Draw) -> Exchange:
    """One question answered by a list or by a count."""
    ask: Callable[[Draw], Exchange] = draw.weighted(
        {_name_some: 3, _count: 3, _how_many: 2, _steps: 1}
    )
    return ask(draw)


def _name_some(draw: Draw) -> Exchange:
    category = draw.choice(list(CATEGORIES))
    n = draw.integer(2, min(6, len(CATEGORIES[category])))
    bullets = draw.chance(0.3)
    # A list is remembered, not worked out: held out is how it is asked for.
    phrasing = draw.phrasing(_LIST_PHRASINGS, _UNSEEN_LIST_PHRASINGS)
    number = draw.choice((_NUMBER_WORDS[n], str(n)))
    items = CATEGORIES[category][:n]
    if bullets:
        content = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
        suffix = draw.choice((" Number them.", " As a numbered list."))
    else:
        content, suffix = ", ".join(items), ""
    return answer(
        "listing",
        draw.casual(phrasing.format(n=number, category=category)) + suffix,
        f"The user wants {n} {category}.",
        content,
        Check(equals=content),
    )


def _count(draw: Draw) -> Exchange:
    while True:
        low = draw.choice((1, 1, draw.integer(0, 30)))
        high = low + draw.integer(2, 15)
        down = draw.chance(0.3)
        if draw.admits("count", low, high, down):
            break
    start, end = (high, low) if down else (low, high)
    numbers = range(start, end - 1, -1) if down else range(start, end + 1)
    if down:
        phrasing = draw.choice(("Count down from {} to {}.", "Count backwards from {} to {}."))
    elif low == 1 and draw.chance(0.4):
        phrasing = draw.choice(("Count to {1}.", "Can you count to {1}?", "Count up to {1}."))
    else:
        phrasing = draw.choice(("Count from {} to {}.", "List the numbers from {} to {}."))
    content = ", ".join(map(str, numbers))
    return answer(
        "counting",
        draw.casual(phrasing.format(start, end)),
        f"Start at {start}, end at {end}.",
        content,
        Check(equals=content),
    )


def _how_many(draw: Draw) -> Exchange:
    while True:
        items = draw.sample(draw.choice((THINGS, WORDS)), draw.integer(2, 7))
        if draw.admits("how many", *items):
            break
    listed = draw.choice((", ", " ")).join(items)
    phrasing = draw.choice(
        ("How many words are here: {}", "How many items are in this list: {}?", "Count these: {}")
    )
    return answer(
        "counting",
        phrasing.format(listed),
        "The user wants a count.",
        ", ".join(f"{item} {i}" for i, item in enumerate(items, 1)) + f". There are {len(items)}.",
        Check(number=len(items)),
    )


def _steps(draw: Draw) -> Exchange:
    """Even, odd or multiples."""
    while True:
        kind = draw.choice(("even numbers", "odd numbers", "multiples of 5", "multiples of 10"))
        n = draw.integer(3, 8)
        phrasing = draw.choice(("List the first {} {}.", "What are the first {} {}?"))
        if draw.admits(phrasing, kind, n):
            break
    start, step = {
        "even numbers": (2, 2),
        "odd numbers": (1, 2),
        "multiples of 5": (5, 5),
        "multiples of 10": (10, 10),
    }[kind]
    content = ", ".join(str(start + i * step) for i in range(n))
    return answer(
        "counting",
        draw.casual(phrasing.format(n, kind)),
        f"Start at {start}, step {step}, {n} numbers.",
        content,
        Check(equals=content),
    )
