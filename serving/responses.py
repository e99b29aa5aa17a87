"""The answers of the OpenAI wire format: whole ones, and streams of events.

Knows neither requests nor the engine.

A stream repeats the same bytes around every piece of text, so they are made once per answer, and
per delta only the text is encoded. It is encoded in ASCII: some clients split lines at characters
such as U+2028, which JSON may hold as they are.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from serving.answer import FinishReason, Usage
from serving.errors import ApiError
from serving.parsers import Arguments, Content, Delta, Reasoning, ToolCall

DONE = b"data: [DONE]\n\n"

_dumps = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Head:
    """What all objects of one answer begin with.

    Attributes:
      id: of the answer.
      created: seconds since 1970.
      model: the name the client knows it by.
    """

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class Format(ABC):
    """How one endpoint writes an answer.

    Args:
      head: the beginning of every object.
      includes_usage: whether a stream ends with the usage; every event then has the field.
    """

    _chunk_kind: str
    _delta_field: str  # what stands between a choice's index and its piece of the answer

    def __init__(self, head: Head, *, includes_usage: bool) -> None:
        self._head = head
        self._includes_usage = includes_usage
        fields = _dumps(head.fields(self._chunk_kind))[:-1]
        self._open = f'data: {fields},"choices":[{{"index":0,{self._delta_field}'
        usage = ',"usage":null' if includes_usage else ""
        self._close = f',"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'

    @abstractmethod
    def first_event(self) -> bytes:
        """What a stream begins with, before any token."""

    @abstractmethod
    def _piece(self, delta: Delta) -> str:
        """JSON of a delta, from `_delta_field` on."""

    @abstractmethod
    def _nothing(self) -> str:
        """JSON of no delta, for the event with the finish reason."""

    @abstractmethod
    def whole(self, deltas: Sequence[Delta], reason: FinishReason, usage: Usage) -> dict[str, Any]:
        """The whole answer as one object."""

    def events(self, deltas: Iterable[Delta]) -> bytes:
        """One event per delta."""
        return "".join(
            [f"{self._open}{self._piece(delta)}{self._close}" for delta in deltas]
        ).encode("ascii")

    def last_events(self, reason: FinishReason, usage: Usage) -> bytes:
        """The finish reason, the usage if it was asked for, and the end of the stream."""
        close = self._close.replace('"finish_reason":null', f'"finish_reason":"{reason}"', 1)
        events = f"{self._open}{self._nothing()}{close}".encode("ascii")
        if self._includes_usage:
            fields = self._head.fields(self._chunk_kind)
            events += event({**fields, "choices": [], "usage": usage_fields(usage)})
        return events + DONE

    def _whole(self, kind: str, choice: dict[str, Any], usage: Usage) -> dict[str, Any]:
        choice = {"index": 0, **choice}
        return {**self._head.fields(kind), "choices": [choice], "usage": usage_fields(usage)}


class CompletionFormat(Format):
    """/v1/completions."""

    _chunk_kind = "text_completion"
    _delta_field = '"text":'

    def first_event(self) -> bytes:
        return b""

    def _piece(self, delta: Delta) -> str:
        assert isinstance(delta, Content), delta
        return encode_basestring_ascii(delta.text)

    def _nothing(self) -> str:
        return '""'

    def whole(self, deltas: Sequence[Delta], reason: FinishReason, usage: Usage) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas if isinstance(delta, Content))
        choice = {"text": text, "logprobs": None, "finish_reason": reason}
        return self._whole("text_completion", choice, usage)


class ChatFormat(Format):
    """/v1/chat/completions. Reasoning goes by both of its names."""

    _chunk_kind = "chat.completion.chunk"
    _delta_field = '"delta":'

    def first_event(self) -> bytes:
        piece = '{"role":"assistant","content":""}'
        return f"{self._open}{piece}{self._close}".encode("ascii")

    def _piece(self, delta: Delta) -> str:
        match delta:
            case Content(text):
                return f'{{"content":{encode_basestring_ascii(text)}}}'
            case Reasoning(text):
                json_text = encode_basestring_ascii(text)
                return f'{{"reasoning_content":{json_text},"reasoning":{json_text}}}'
            case ToolCall(index, id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": id, "type": "function", "function": function}
                return _dumps({"tool_calls": [call]})
            case Arguments(index, text):
                call = {"index": index, "function": {"arguments": text}}
                return _dumps({"tool_calls": [call]})

    def _nothing(self) -> str:
        return "{}"

    def whole(self, deltas: Sequence[Delta], reason: FinishReason, usage: Usage) -> dict[str, Any]:
        content = "".join(delta.text for delta in deltas if isinstance(delta, Content))
        reasoning = "".join(delta.text for delta in deltas if isinstance(delta, Reasoning))
        calls = [_whole_call(delta, deltas) for delta in deltas if isinstance(delta, ToolCall)]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if calls else ""),
            "refusal": None,
            "reasoning_content": reasoning or None,
            "reasoning": reasoning or None,
        }
        if calls:
            message["tool_calls"] = calls
        choice = {"message": message, "logprobs": None, "finish_reason": reason}
        return self._whole("chat.completion", choice, usage)


def _whole_call(call: ToolCall, deltas: Sequence[Delta]) -> dict[str, Any]:
    arguments = "".join(
        delta.text for delta in deltas if isinstance(delta, Arguments) and delta.index == call.index
    )
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def to_json(value: Any) -> bytes:
    """JSON, in ASCII like all that is sent."""
    return _dumps(value).encode("ascii")


def event(value: Any) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + to_json(value) + b"\n\n"


def error_events(error: ApiError) -> bytes:
    """The end of a stream that failed midway."""
    return event(error.body()) + DONE


def usage_fields(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def model_object(name: str, created: int, max_seq_len: int) -> dict[str, Any]:
    """OpenAI's model object, with the context length that vLLM's clients look for."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "glm-jax",
        "max_model_len": max_seq_len,
    }
