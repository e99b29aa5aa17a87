"""A conversation as clients write it: messages, tools, and what was called.

Knows no endpoint: every API's requests come down to these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError, from_json

from serving import errors
from serving.wire import Wire


class TextPart(Wire):
    """A part of a message's content; other kinds of parts are no text and are refused."""

    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is not None and not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be a string or a list of text parts")
    for part in value or []:
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            kind = errors.shorten(part["type"], 40)
            raise PydanticCustomError(
                "unsupported_parameter", "this model takes text only, not {kind}", {"kind": kind}
            )
    return value or []


Text = Annotated[list[TextPart], BeforeValidator(_parts)]


def _mapping(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        mapping = from_json(value) if value.strip() else {}
    except ValueError:
        mapping = None
    if not isinstance(mapping, dict):
        raise PydanticCustomError("invalid_value", "must be the JSON of an object")
    return mapping


class CalledFunction(Wire):
    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_mapping)] = {}


class PastCall(Wire):
    """A call that an earlier answer of the assistant made."""

    function: CalledFunction


class Message(Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = []
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[PastCall] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class Function(Wire):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    """A function the model may call.

    Attributes:
      declaration: the object as it came; the template shows it to the model word for word.
    """

    type: Literal["function"]
    function: Function
    declaration: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _keep_declaration(cls, value: Any) -> Any:
        return {**value, "declaration": value} if isinstance(value, dict) else value


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class ToolChoice(Wire):
    """The tools that may be called, or must be."""

    type: Literal["function", "allowed_tools"] = "function"
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _check_type(self) -> ToolChoice:
        if (self.function if self.type == "function" else self.allowed_tools) is None:
            raise PydanticCustomError("invalid_value", "must name a tool")
        return self

    @property
    def names(self) -> list[str]:
        if self.allowed_tools is not None:
            return [tool.function.name for tool in self.allowed_tools.tools]
        assert self.function is not None
        return [self.function.name]

    @property
    def is_required(self) -> bool:
        return self.allowed_tools is None or self.allowed_tools.mode == "required"
