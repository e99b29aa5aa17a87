"""What every endpoint's way to write an answer has in common: whole, or as server-sent events.

Knows no endpoint.

All that is sent is ASCII: some clients split lines at characters such as U+2028, which JSON may hold
as they are.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from serving.answer import Part, Usage
from serving.errors import ApiError
from serving.parsers import Arguments, Content, Delta, Reasoning, ToolCall
from serving.reply import Choice

dumps = json.JSONEncoder(separators=(",", ":")).encode


class Format(ABC):
    """How one endpoint writes one reply. A stream is its first, its parts' and its last events.

    Attributes:
      keep_alive: an event that says nothing.
    """

    keep_alive: bytes = b": keep-alive\n\n"

    @abstractmethod
    def first_events(self, usage: Usage) -> bytes:
        """What a stream begins with, before any token."""

    @abstractmethod
    def part_events(self, index: int, part: Part, usage: Usage) -> bytes:
        """What a step added to the answer of this index; usage is all answers' so far."""

    @abstractmethod
    def last_events(self, usage: Usage) -> bytes:
        """What a stream ends with."""

    @abstractmethod
    def error_events(self, error: ApiError) -> bytes:
        """What a stream that failed midway ends with."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The whole reply as one object."""


def to_json(value: Any) -> bytes:
    """JSON, in ASCII like all that is sent."""
    return dumps(value).encode("ascii")


def event(value: Any) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + to_json(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """A server-sent event that goes by its type."""
    return f"event: {value['type']}\n".encode("ascii") + event(value)


def content_of(deltas: Iterable[Delta]) -> str:
    """The text of the answer."""
    return "".join(delta.text for delta in deltas if isinstance(delta, Content))


def reasoning_of(deltas: Iterable[Delta]) -> str:
    """The text of the reasoning."""
    return "".join(delta.text for delta in deltas if isinstance(delta, Reasoning))


def calls_of(deltas: Iterable[Delta]) -> list[tuple[ToolCall, str]]:
    """The calls, each with the JSON of its arguments."""
    deltas = list(deltas)
    return [
        (
            call,
            "".join(d.text for d in deltas if isinstance(d, Arguments) and d.index == call.index),
        )
        for call in deltas
        if isinstance(call, ToolCall)
    ]
