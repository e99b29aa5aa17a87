"""What the data is made of: exchanges with a check for every answer, joined into conversations.

Knows neither tokens nor the chat template.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: the function's name and its arguments, JSON values by name."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a right answer must satisfy; every condition that is given must hold.

    Attributes:
      equals: the whole visible answer.
      contains: pieces of the visible answer, in any order.
      number: the last number in the visible answer.
      json: the value the visible answer parses to.
      calls: the tool calls, in order; always compared, so an answer without calls must make none.
    """

    equals: str | None = None
    contains: tuple[str, ...] = ()
    number: int | None = None
    json: Any = None
    calls: tuple[Call, ...] = ()

    def passes(self, completion: str, tools: tuple[Tool, ...] = ()) -> bool:
        """Judges a completion: text with its <think> and <tool_call> tags, stop tokens removed."""
        visible, calls = _split(completion, tools)
        return all(
            (
                self.equals is None or visible == self.equals,
                all(piece in visible for piece in self.contains),
                self.number is None or _last_number(visible) == self.number,
                self.json is None or _parse_json(visible) == self.json,
                calls == self.calls,
            )
        )


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user message and all that follows it until the assistant is done.

    Attributes:
      skill: what it teaches; the evaluation reports by it.
      messages: OpenAI messages; assistant ones carry a reasoning_content.
      checks: one per assistant message, in order.
    """

    skill: str
    messages: tuple[Message, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What one training sample renders, or, cut before its last message, one evaluation item.

    Attributes:
      skill: the skill of its last exchange.
      messages: OpenAI messages; the last is the assistant's.
      check: what the last message satisfies.
      tools: OpenAI tool definitions on offer.
      enable_thinking: how the last exchange is answered.
      keep_thinking: whether earlier exchanges keep their reasoning, the template's
        clear_thinking=False.
    """

    skill: str
    messages: tuple[Message, ...]
    check: Check
    tools: tuple[Tool, ...] = ()
    enable_thinking: bool = True
    keep_thinking: bool = False


def answer(skill: str, question: str, thinking: str, content: str, check: Check) -> Exchange:
    """An exchange of one question and one plain answer."""
    return Exchange(skill, (user(question), assistant(thinking, content)), (check,))


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(thinking: str, content: str, calls: tuple[Call, ...] = ()) -> Message:
    """An assistant message with its reasoning; calls become OpenAI tool calls."""
    message: Message = {"role": "assistant", "reasoning_content": thinking, "content": content}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def tool_result(content: str) -> Message:
    """What a tool returned."""
    return {"role": "tool", "content": content}


_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key><arg_value>(.*?)</arg_value>", re.DOTALL)


def _split(completion: str, tools: tuple[Tool, ...]) -> tuple[str, tuple[Call, ...]]:
    """The visible answer and the calls; reasoning is what stands before </think>, if that is there."""
    visible = completion.rpartition("</think>")[2]
    calls = tuple(_call(found.group(1), tools) for found in _CALL.finditer(visible))
    return _CALL.sub("", visible).strip(), calls


def _call(text: str, tools: tuple[Tool, ...]) -> Call:
    name = text.partition("<arg_key>")[0]
    properties = next(
        (
            tool["function"]["parameters"]["properties"]
            for tool in tools
            if tool["function"]["name"] == name
        ),
        {},
    )
    arguments = {
        key: value if properties.get(key, {}).get("type") == "string" else _parse_json(value)
        for key, value in _ARGUMENT.findall(text)
    }
    return Call(name, arguments)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _last_number(text: str) -> int | None:
    numbers = re.findall(r"-?\d+", text)
    return int(numbers[-1]) if numbers else None
