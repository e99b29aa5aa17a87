"""GLM's output grammar: reasoning, content, tool calls, as a stream.

Knows neither tokens nor HTTP: pieces of text and tags in, deltas out.

One state machine reads both reasoning and calls, for the one can end in the other:

    answer    = [reasoning "</think>"] content { call content }
    call      = "<tool_call>" name { "<arg_key>" key "</arg_key>"
                                     "<arg_value>" value "</arg_value>" } "</tool_call>"

Reasoning ends at `</think>`, or at a `<tool_call>` when there are tools. A tag counts only where
the grammar has a place for it and only as a token of its own; anywhere else it is text. What comes
out depends on the pieces' text alone, never on where it was cut.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby
from typing import Protocol

from serving.detokenizer import Piece
from serving.tokenizer import Tag
from serving.tools import Tools


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The beginning of a call: everything but its arguments. Comes once per call."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments, as JSON text."""

    index: int
    text: str


Delta = Content | Reasoning | ToolCall | Arguments


def join(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas, neighbors joined where they continue each other."""
    joined: list[Delta] = []
    for _, neighbors in groupby(deltas, lambda delta: (type(delta), getattr(delta, "index", None))):
        first, *others = neighbors
        if others and not isinstance(first, ToolCall):
            text = "".join([first.text, *(other.text for other in others)])  # type: ignore[union-attr]
            first = replace(first, text=text)
        joined.append(first)
    return joined


class Parser(Protocol):
    """Turns the pieces of one answer into deltas.

    Attributes:
      is_reasoning: whether the next piece belongs to the reasoning, as far as is known.
      num_calls: calls begun so far.
      has_all_calls: no further call may come, so that the answer is complete.
    """

    @property
    def is_reasoning(self) -> bool: ...

    @property
    def num_calls(self) -> int: ...

    @property
    def has_all_calls(self) -> bool: ...

    def feed(self, pieces: Iterable[Piece]) -> list[Delta]: ...

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """What is left when no piece comes any more; is_cut when the length limit ended it."""
        ...


class TextParser:
    """For raw completions: everything is content, tags too."""

    is_reasoning = False
    num_calls = 0
    has_all_calls = False

    def feed(self, pieces: Iterable[Piece]) -> list[Delta]:
        text = "".join(pieces)
        return [Content(text)] if text else []

    def finish(self, *, is_cut: bool) -> list[Delta]:
        return []


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    NAME = auto()  # after <tool_call>
    ARGUMENTS = auto()  # before <arg_key> or </tool_call>
    KEY = auto()  # after <arg_key>
    KEY_END = auto()  # before <arg_value>
    VALUE = auto()  # after <arg_value>


class ChatParser:
    """For conversations: reasoning, content and, if the request has tools, calls.

    Args:
      tools: what the request declares; None when it has no tools, and calls are mere text.
      starts_in_reasoning: whether the prompt ended with `<think>`.
      is_continued: whether it ended with the first half of what comes.
      max_calls: calls after which the answer is complete; None for no limit.
    """

    def __init__(
        self,
        tools: Tools | None,
        *,
        starts_in_reasoning: bool,
        is_continued: bool = False,
        max_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._max_calls = max_calls
        self.num_calls = 0
        self.has_all_calls = False
        self._state = _State.REASONING if starts_in_reasoning else _State.CONTENT
        self._trims = (
            starts_in_reasoning and not is_continued
        )  # whether white space comes before the next text
        self._buffer = ""  # of a name, a key, or a value that is no string
        self._name = ""
        self._key = ""
        self._num_arguments = 0
        self._deltas: list[Delta] = []

    @property
    def is_reasoning(self) -> bool:
        return self._state is _State.REASONING

    def feed(self, pieces: Iterable[Piece]) -> list[Delta]:
        for piece in pieces:
            if self.has_all_calls:
                break
            if not (isinstance(piece, Tag) and self._take_tag(piece)):
                self._take_text(piece)
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self, *, is_cut: bool) -> list[Delta]:
        if self._state is _State.NAME:
            # A name that was cut could be the beginning of another one.
            if is_cut or not self._begin_call():
                self._abandon_call()
        if self._state is _State.VALUE and not is_cut:
            self._end_value()
        if self._state.value >= _State.ARGUMENTS.value and not is_cut:
            self._end_call()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _take_text(self, text: str) -> None:
        match self._state:
            case _State.REASONING | _State.CONTENT:
                self._emit_text(text)
            case _State.NAME | _State.KEY:
                self._buffer += text
            case _State.VALUE if self._is_string():
                self._emit_arguments(json.dumps(text)[1:-1])
            case _State.VALUE:
                self._buffer += text
            case _:
                pass  # white space between tags

    def _take_tag(self, tag: Tag) -> bool:
        """Acts on a tag; False when it has no meaning here and is text."""
        match self._state, tag:
            case _State.REASONING | _State.CONTENT, Tag.THINK:
                self._enter_text(_State.REASONING)
            case _State.REASONING | _State.CONTENT, Tag.END_THINK:
                self._enter_text(_State.CONTENT)
            case _State.REASONING | _State.CONTENT, Tag.CALL if self._tools is not None:
                self._enter(_State.NAME)
            case _State.REASONING | _State.CONTENT, _:
                return False
            case _State.NAME, Tag.KEY | Tag.END_CALL:
                return self._end_name(tag)
            case _State.NAME, _:
                self._abandon_call()
                return self._take_tag(tag)
            case _State.KEY, Tag.END_KEY:
                self._key = self._buffer.strip()
                self._enter(_State.KEY_END)
            case _State.KEY, Tag.VALUE:  # the model forgot </arg_key>
                self._key = self._buffer.strip()
                self._begin_value()
            case _State.KEY_END, Tag.VALUE:
                self._begin_value()
            case _State.VALUE, Tag.END_VALUE:
                self._end_value()
            case _State.VALUE, Tag.END_CALL:  # the model forgot </arg_value>
                self._end_value()
                self._end_call()
            case _State.VALUE, _:
                return False
            case _State.ARGUMENTS | _State.KEY_END, Tag.KEY:
                self._enter(_State.KEY)
            case _, Tag.END_CALL:
                self._end_call()
            case _State.ARGUMENTS | _State.KEY_END, Tag.CALL:  # the model forgot </tool_call>
                self._end_call()
                return self.has_all_calls or self._take_tag(tag)
            case _State.KEY, _:
                return False
            case _:
                pass
        return True

    def _enter(self, state: _State) -> None:
        self._state = state
        self._buffer = ""

    def _enter_text(self, state: _State) -> None:
        self._state = state
        self._trims = True

    def _emit_text(self, text: str) -> None:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        if text:
            is_reasoning = self._state is _State.REASONING
            self._deltas.append(Reasoning(text) if is_reasoning else Content(text))

    def _end_name(self, tag: Tag) -> bool:
        if not self._begin_call():
            self._abandon_call()
            return False
        if tag is Tag.KEY:
            self._enter(_State.KEY)
        else:
            self._end_call()
        return True

    def _begin_call(self) -> bool:
        """Begins the call named in the buffer; False when no such tool was declared."""
        name = self._buffer.strip()
        if self._tools is None or name not in self._tools:
            return False
        self._name = name
        self._num_arguments = 0
        self._deltas.append(ToolCall(self.num_calls, f"call_{secrets.token_hex(12)}", name))
        self.num_calls += 1
        self._enter(_State.ARGUMENTS)
        return True

    def _abandon_call(self) -> None:
        # Nothing of it was sent, so it can still be shown as the text it is.
        text = Tag.CALL + self._buffer
        self._state, self._trims = _State.CONTENT, False
        self._emit_text(text)

    def _is_string(self) -> bool:
        return self._tools is not None and self._tools.is_string(self._name, self._key)

    def _begin_value(self) -> None:
        self._enter(_State.VALUE)
        opening = ", " if self._num_arguments else "{"
        quote = '"' if self._is_string() else ""
        self._num_arguments += 1
        self._emit_arguments(f"{opening}{json.dumps(self._key)}: {quote}")

    def _end_value(self) -> None:
        if self._is_string():
            self._emit_arguments('"')
        elif self._tools is not None:
            self._emit_arguments(self._tools.to_json(self._name, self._key, self._buffer))
        self._enter(_State.ARGUMENTS)

    def _end_call(self) -> None:
        self._emit_arguments("}" if self._num_arguments else "{}")
        self._enter_text(_State.CONTENT)
        self.has_all_calls = self.num_calls == self._max_calls

    def _emit_arguments(self, text: str) -> None:
        self._deltas.append(Arguments(self.num_calls - 1, text))
