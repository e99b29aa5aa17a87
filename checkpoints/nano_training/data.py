"""Which conversations nano is trained and evaluated on, each a pure function of seed and number.

Knows the mixture of skills, not how any of them is phrased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from checkpoints.nano_training.arithmetic import ask_arithmetic
from checkpoints.nano_training.conversation import Conversation, Exchange, Message, Tool
from checkpoints.nano_training.draw import Draw
from checkpoints.nano_training.geography import ask_geography
from checkpoints.nano_training.instructions import PLAIN_PROMPTS, draw_instruction, obeyed
from checkpoints.nano_training.json_answers import ask_json
from checkpoints.nano_training.listing import ask_listing
from checkpoints.nano_training.small_talk import ask_phrase, ask_small_talk
from checkpoints.nano_training.tool_use import ask_tool, ask_without_tool, draw_signatures

Split = Literal["train", "held out"]
_Ask = Callable[[Draw], Exchange]

_QUESTIONS: dict[_Ask, float] = {
    ask_geography: 4,
    ask_arithmetic: 9,
    ask_small_talk: 1.8,
    ask_listing: 1.8,
    ask_json: 1.6,
    ask_without_tool: 0.4,
}
# As a user would mix them.
_HELD_OUT_QUESTIONS: dict[_Ask, float] = _QUESTIONS | {ask_json: 0.8}
# A system prompt's rule goes with answers that are one sentence.
_RULED_QUESTIONS: dict[_Ask, float] = {ask_geography: 3, ask_arithmetic: 2, ask_phrase: 2}


def conversation(seed: int, number: int, split: Split = "train") -> Conversation:
    """Conversation `number` of one side of the split.

    On the held-out side the last exchange uses combinations that training never draws.
    """
    draw = Draw(f"{seed}/{split}/{number}", held_out=split == "held out")
    make = draw.weighted(_TRAINED if split == "train" else _HELD_OUT)
    return make(draw)


def conversations(seed: int, count: int, split: Split = "train") -> Iterator[Conversation]:
    """The first `count` conversations of one side of the split."""
    return (conversation(seed, number, split) for number in range(count))


def _plain(draw: Draw) -> Conversation:
    """Questions of one kind or of several, perhaps under a system prompt that asks for nothing."""
    rounds = draw.weighted({1: 3, 2: 2, 3: 2, 4: 1})
    questions = _HELD_OUT_QUESTIONS if draw.held_out else _QUESTIONS
    same = draw.weighted(questions) if draw.chance(0.5) else None
    exchanges = [(same or draw.weighted(questions))(draw) for _ in range(rounds)]
    system = draw.choice(PLAIN_PROMPTS) if draw.chance(0.25) else None
    return _joined(draw, exchanges, system)


def _ruled(draw: Draw) -> Conversation:
    instruction = draw_instruction(draw)
    exchanges = [
        obeyed(draw.weighted(_RULED_QUESTIONS)(draw), instruction)
        for _ in range(draw.weighted({1: 2, 2: 2, 3: 1}))
    ]
    return _joined(draw, exchanges, instruction.system)


def _with_tools(draw: Draw) -> Conversation:
    signatures = draw_signatures(draw)

    def call(draw: Draw) -> Exchange:
        return ask_tool(draw, draw.choice(signatures))

    def refuse(draw: Draw) -> Exchange:
        return ask_without_tool(draw, signatures)

    asks: dict[_Ask, float]
    rounds: dict[int, float]
    if draw.held_out:
        asks = {call: 75, refuse: 17, ask_phrase: 5, ask_geography: 3}
        rounds = {1: 2, 2: 3, 3: 3, 4: 2}
    else:
        # A request that no tool serves teaches to look at what is on offer, also where that is one.
        asks = {call: 73, refuse: 18, ask_phrase: 5, ask_geography: 4}
        rounds = {1: 1, 2: 2, 3: 3, 4: 4}
    exchanges = [draw.weighted(asks)(draw) for _ in range(draw.weighted(rounds))]
    system = draw.choice(PLAIN_PROMPTS) if draw.chance(0.2) else None
    tools = tuple(signature.tool for signature in signatures)
    return _joined(draw, exchanges, system, tools)


# Which conversations there are: in training, and, as a user would mix them, in the evaluation.
_Make = Callable[[Draw], Conversation]
_TRAINED: dict[_Make, float] = {_plain: 50, _ruled: 8, _with_tools: 42}
_HELD_OUT: dict[_Make, float] = {_plain: 60, _ruled: 8, _with_tools: 32}


def _joined(
    draw: Draw, exchanges: list[Exchange], system: str | None, tools: tuple[Tool, ...] = ()
) -> Conversation:
    """The exchanges one after the other; a held-out one may stop at a tool call, to judge that."""
    enable_thinking = draw.chance(0.5)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages += exchange.messages
    skill, check = exchanges[-1].skill, exchanges[-1].checks[-1]
    if draw.held_out and len(exchanges[-1].checks) > 1:
        if draw.chance(0.6):
            messages, check = _cut_at_call(messages), exchanges[-1].checks[0]
        else:
            skill = "tool answer"
    if not enable_thinking:
        messages = [_without_reasoning(message) for message in messages]
    return Conversation(
        skill=skill,
        messages=tuple(messages),
        check=check,
        tools=tools,
        enable_thinking=enable_thinking,
        keep_thinking=enable_thinking and draw.chance(0.4),
    )


def _cut_at_call(messages: list[Message]) -> list[Message]:
    last = max(i for i, message in enumerate(messages) if message.get("tool_calls"))
    return messages[: last + 1]


def _without_reasoning(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}
