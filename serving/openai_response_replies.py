"""OpenAI's responses: answers, and streams of their events.

Knows neither requests nor the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from serving.answer import Finish, Part, Sampled, Usage
from serving.errors import ApiError
from serving.formats import Format, named_event
from serving.parsers import Arguments, Content, Delta, Reasoning, ToolCall
from serving.reply import Choice
from serving.responses import Head, chat_logprobs

Event = dict[str, Any]

# Kind of item -> the type of its one part, and what its events are called.
_TEXTS = {
    "message": ("output_text", "response.output_text"),
    "reasoning": ("reasoning_text", "response.reasoning_text"),
}


class ResponsesFormat(Format):
    """/v1/responses.

    Args:
      head: id, time and model of the answer.
      echoed: the fields of the request that every response object repeats.
      spell: a token as it is written.
      has_logprobs: whether they are told.
    """

    def __init__(
        self, head: Head, echoed: dict[str, Any], spell: Callable[[int], bytes], has_logprobs: bool
    ) -> None:
        self._head = head
        self._echoed = echoed
        self._spell = spell
        self._has_logprobs = has_logprobs
        self._number = -1  # of the event last sent
        self._output: list[dict[str, Any]] = []
        self._is_open = False  # the last item of the output
        self._logprobs: list[dict[str, Any]] = []  # of the part that is open
        self._finish: Finish | None = None

    def first_events(self, usage: Usage) -> bytes:
        response = self._response("in_progress", None)
        return self._encoded(
            {"type": f"response.{name}", "response": response}
            for name in ("created", "in_progress")
        )

    def part_events(self, index: int, part: Part, usage: Usage) -> bytes:
        return self._encoded(self._take(part))

    def last_events(self, usage: Usage) -> bytes:
        events = self._close()
        response = self._finished(usage)
        events.append({"type": f"response.{response['status']}", "response": response})
        return self._encoded(events)

    def error_events(self, error: ApiError) -> bytes:
        fields = error.body()["error"]
        return self._encoded([{**fields, "type": "error"}])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        [choice] = choices
        self._take(Part(choice.deltas, choice.tokens, choice.finish))
        self._close()
        return self._finished(usage)

    def _encoded(self, events: Iterable[Event]) -> bytes:
        encoded = []
        for event in events:
            self._number += 1
            encoded.append(named_event({**event, "sequence_number": self._number}))
        return b"".join(encoded)

    def _take(self, part: Part) -> list[Event]:
        self._finish = part.finish or self._finish
        events: list[Event] = []
        for delta in part.deltas:
            events += self._grow(delta)
        if self._has_logprobs and part.tokens:
            self._tell(part.tokens, events)
        return events

    def _grow(self, delta: Delta) -> list[Event]:
        match delta:
            case Content(text):
                return self._grow_text("message", text)
            case Reasoning(text):
                return self._grow_text("reasoning", text)
            case ToolCall(_, id, name):
                item = {"type": "function_call", "call_id": id, "name": name, "arguments": ""}
                return [*self._close(), *self._begin("fc", item)]
            case Arguments(_, text):
                self._output[-1]["arguments"] += text
                return [self._event("response.function_call_arguments.delta", delta=text)]

    def _grow_text(self, kind: str, text: str) -> list[Event]:
        part_type, name = _TEXTS[kind]
        events: list[Event] = []
        if not self._is_open or self._output[-1]["type"] != kind:
            part: dict[str, Any] = {"type": part_type, "text": ""}
            item: dict[str, Any] = {"type": kind, "content": []}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
                item["role"] = "assistant"
            else:
                item["summary"] = []
            events += self._close()
            events += self._begin("msg" if kind == "message" else "rs", item)
            added = self._event("response.content_part.added", content_index=0, part=dict(part))
            events.append(added)
            self._output[-1]["content"].append(part)
        self._output[-1]["content"][0]["text"] += text
        fields = {"logprobs": []} if kind == "message" else {}
        events.append(self._event(f"{name}.delta", content_index=0, delta=text, **fields))
        return events

    def _tell(self, tokens: Sequence[Sampled], events: list[Event]) -> None:
        """Adds log-probabilities to the text that they are of, as far as it is content."""
        if not self._is_open or self._output[-1]["type"] != "message":
            return
        told = chat_logprobs(self._spell, [s for s in tokens if not s.is_reasoning])
        self._output[-1]["content"][0]["logprobs"] += told
        if events and events[-1]["type"] == "response.output_text.delta":
            events[-1]["logprobs"] = told

    def _begin(self, prefix: str, item: dict[str, Any]) -> list[Event]:
        id = f"{prefix}_{self._head.id.removeprefix('resp_')}_{len(self._output)}"
        self._output.append({"id": id, "status": "in_progress", **item})
        self._is_open = True
        # What comes later must not show in the event, which may be written later too.
        added = {**self._output[-1]}
        if "content" in added:
            added["content"] = []
        return [self._event("response.output_item.added", item=added)]

    def _close(self) -> list[Event]:
        """The end of the item that is open."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._output[-1]
        events = []
        if item["type"] in _TEXTS:
            part, name = item["content"][0], _TEXTS[item["type"]][1]
            fields = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            done = self._event(f"{name}.done", content_index=0, text=part["text"], **fields)
            events += [done, self._event("response.content_part.done", content_index=0, part=part)]
        else:
            name = "response.function_call_arguments.done"
            events.append(self._event(name, arguments=item["arguments"], name=item["name"]))
        is_cut = self._finish is not None and self._finish.reason == "length"
        item["status"] = "incomplete" if is_cut else "completed"
        return [*events, self._event("response.output_item.done", item=dict(item))]

    def _event(self, type: str, **fields: Any) -> Event:
        index = len(self._output) - 1
        event = {"type": type, "output_index": index, **fields}
        if "item" not in fields:
            event["item_id"] = self._output[index]["id"]
        return event

    def _finished(self, usage: Usage) -> dict[str, Any]:
        assert self._finish is not None
        is_cut = self._finish.reason == "length"
        return self._response("incomplete" if is_cut else "completed", usage)

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        cause = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": cause,
            "model": self._head.model,
            "output": list(self._output),
            "previous_response_id": None,
            "store": False,
            "background": False,
            "truncation": "disabled",
            "usage": None if usage is None else usage_fields(usage),
            **self._echoed,
        }


def usage_fields(usage: Usage) -> dict[str, Any]:
    """The usage object of responses."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
