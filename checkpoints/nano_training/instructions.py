"""System prompts, and what obeying them does to an answer.

Knows no questions: a rule takes any exchange and returns it as the rule wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from checkpoints.nano_training.conversation import Check, Exchange, answer
from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.world import CITIES, FIRST_NAMES, WORDS

PLAIN_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are nano, a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Answer the user's question.",
    "You are a helpful AI assistant.",
    "Be helpful and brief.",
    "You are an assistant that always answers in full sentences.",
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """A system prompt and the change it asks of every answer."""

    system: str
    apply: Callable[[str], str]


def draw_instruction(draw: Draw) -> Instruction:
    """A rule about how to answer; held out: words, names and cities it mentions."""
    make: Callable[[Draw], Instruction] = draw.choice(
        (_starts_with, _ends_with, _names_city, _addresses)
    )
    return make(draw)


def obeyed(exchange: Exchange, instruction: Instruction) -> Exchange:
    """The exchange as a system prompt changes it; its check is the whole answer."""
    question, reply = exchange.messages
    content = instruction.apply(reply["content"])
    return answer(
        "system prompt",
        question["content"],
        reply["reasoning_content"],
        content,
        Check(equals=content),
    )


def _starts_with(draw: Draw) -> Instruction:
    word = _admitted(draw, "start", WORDS).capitalize()
    system = draw.choice(
        (
            'Start every answer with the word "{}".',
            "Start each answer with {}.",
            "Begin every answer with the word {}.",
        )
    ).format(word)
    return Instruction(system, lambda content: f"{word}! {content}")


def _ends_with(draw: Draw) -> Instruction:
    word = _admitted(draw, "end", WORDS).capitalize()
    system = draw.choice(
        ('End every answer with the word "{}".', "End each answer with {}.", "Always end with {}.")
    ).format(word)
    return Instruction(system, lambda content: f"{content} {word}.")


def _names_city(draw: Draw) -> Instruction:
    city = _admitted(draw, "city", CITIES)
    system = draw.choice(
        (
            "You are a guide in {}. Always name the city.",
            "You work in {}. Mention the city in every answer.",
        )
    ).format(city)
    return Instruction(system, lambda content: f"Greetings from {city}! {content}")


def _addresses(draw: Draw) -> Instruction:
    name = _admitted(draw, "user", FIRST_NAMES)
    system = draw.choice(
        (
            "The user is called {}. Address the user by name.",
            "You are talking to {}. Always use the name.",
            "The user's name is {}. Use it in every answer.",
        )
    ).format(name)
    return Instruction(system, lambda content: f"{name}, here is my answer. {content}")


def _admitted(draw: Draw, rule: str, options: tuple[str, ...]) -> str:
    while True:
        option = draw.choice(options)
        if draw.admits(rule, option):
            return option
