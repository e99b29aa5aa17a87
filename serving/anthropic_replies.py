"""Anthropic's messages: answers, streams of events, and errors.

Knows neither requests nor the engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serving.answer import Finish, Part, Usage
from serving.errors import ApiError
from serving.formats import Format, named_event
from serving.parsers import Arguments, Content, Delta, Reasoning, ToolCall
from serving.reply import Choice

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessagesFormat(Format):
    """/v1/messages.

    Args:
      id, model: of the answer.
    """

    keep_alive = named_event({"type": "ping"})

    def __init__(self, id: str, model: str) -> None:
        self._id = id
        self._model = model
        self._index = -1  # of the block that is open
        self._open: str | None = None  # its type
        self._finish: Finish | None = None

    def first_events(self, usage: Usage) -> bytes:
        return named_event(
            {"type": "message_start", "message": self._message([], None, usage)}
        ) + named_event({"type": "ping"})

    def part_events(self, index: int, part: Part, usage: Usage) -> bytes:
        self._finish = part.finish or self._finish
        return b"".join(map(self._delta_events, part.deltas))

    def last_events(self, usage: Usage) -> bytes:
        assert self._finish is not None
        reason, sequence = _stop_reason(self._finish)
        return (
            self._close()
            + named_event(
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": reason, "stop_sequence": sequence},
                    "usage": usage_fields(usage),
                }
            )
            + named_event({"type": "message_stop"})
        )

    def error_events(self, error: ApiError) -> bytes:
        return named_event(error_body(error, self._id))

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        [choice] = choices
        return self._message(self._blocks(choice.deltas), choice.finish, usage)

    def _message(
        self, content: list[dict[str, Any]], finish: Finish | None, usage: Usage
    ) -> dict[str, Any]:
        reason, sequence = _stop_reason(finish) if finish else (None, None)
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage_fields(usage),
        }

    def _blocks(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """The content of a whole message: neighbors of a kind are one block."""
        blocks: list[dict[str, Any]] = []
        arguments: list[str] = []
        for delta in deltas:
            kind = blocks[-1]["type"] if blocks else None
            match delta:
                case Content(text) if kind == "text":
                    blocks[-1]["text"] += text
                case Content(text):
                    blocks.append({"type": "text", "text": text})
                case Reasoning(text) if kind == "thinking":
                    blocks[-1]["thinking"] += text
                case Reasoning(text):
                    blocks.append({"type": "thinking", "thinking": text, "signature": self._id})
                case ToolCall(_, id, name):
                    blocks.append({"type": "tool_use", "id": id, "name": name, "input": {}})
                    arguments.append("")
                case Arguments(index, text):
                    arguments[index] += text
        calls = (block for block in blocks if block["type"] == "tool_use")
        for block, text in zip(calls, arguments, strict=True):
            block["input"] = _input(text)
        return blocks

    def _delta_events(self, delta: Delta) -> bytes:
        match delta:
            case Content(text):
                begun = self._enter("text", {"type": "text", "text": ""})
                return begun + self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                block = {"type": "thinking", "thinking": "", "signature": ""}
                begun = self._enter("thinking", block)
                return begun + self._delta({"type": "thinking_delta", "thinking": text})
            case ToolCall(_, id, name):
                block = {"type": "tool_use", "id": id, "name": name, "input": {}}
                return self._close() + self._enter("tool_use", block)
            case Arguments(_, text):
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def _enter(self, kind: str, block: dict[str, Any]) -> bytes:
        if self._open == kind:
            return b""
        closed = self._close()
        self._open = kind
        self._index += 1
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return closed + named_event(start)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named_event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        closing = b""
        if self._open == "thinking":  # which must be signed, though nobody checks here
            closing = self._delta({"type": "signature_delta", "signature": self._id})
        self._open = None
        return closing + named_event({"type": "content_block_stop", "index": self._index})


def _input(arguments: str) -> dict[str, Any]:
    try:
        return json.loads(arguments)
    except ValueError:  # cut by the length limit
        return {}


def _stop_reason(finish: Finish) -> tuple[str, str | None]:
    if isinstance(finish.stop, str):
        return "stop_sequence", finish.stop
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return reasons[finish.reason], None


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Anthropic's usage object, in which what came from the cache is counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
    }


def error_body(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """Anthropic's error body."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else None)
    return {
        "type": "error",
        "error": {"type": kind or "invalid_request_error", "message": error.message},
        "request_id": request_id,
    }
