"""OpenAI's responses: requests, as the conversations they are.

Knows neither models nor engines. Nothing is stored: what refers to an earlier response is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from glm_jax.shapes import MAX_TOP_LOGPROBS
from serving import errors, wire
from serving.protocol import ChatRequest
from serving.wire import Refused, Wire

REFUSED: Refused = {
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "truncation": ("disabled", "auto"),
}
# What fields of a conversation are called here.
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}
_LOGPROBS = "message.output_text.logprobs"
_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _refuse_unknown(value: Any, known: tuple[str, ...], default: str | None, what: str) -> None:
    for item in value if isinstance(value, list) else ():
        kind = item.get("type", default) if isinstance(item, dict) else None
        if isinstance(kind, str) and kind not in known:
            raise PydanticCustomError(
                "unsupported_parameter",
                "this server takes no {what} of type {kind}",
                {"what": what, "kind": errors.shorten(kind, 40)},
            )


def _known_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    _refuse_unknown(value, _PARTS, None, "parts")
    return value or []


class Part(Wire):
    type: str
    text: str = ""
    refusal: str = ""


Parts = Annotated[list[Part], BeforeValidator(_known_parts)]


class MessageItem(Wire):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class CallItem(Wire):
    type: Literal["function_call"]
    name: str
    arguments: str
    call_id: str


class CallOutputItem(Wire):
    type: Literal["function_call_output"]
    call_id: str
    output: Parts


class ReasoningItem(Wire):
    type: Literal["reasoning"]
    summary: Parts = []
    content: Parts = []


Item = Annotated[
    MessageItem | CallItem | CallOutputItem | ReasoningItem, Field(discriminator="type")
]


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    _refuse_unknown(value, _ITEMS, "message", "items")
    if not isinstance(value, list):
        return value
    return [
        {"type": "message", **item} if isinstance(item, dict) and "role" in item else item
        for item in value
    ]


class FunctionTool(Wire):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def declaration(self) -> dict[str, Any]:
        fields = self.model_dump(exclude={"type"}, exclude_none=True)
        return {"type": "function", "function": fields}


def _tools(value: Any) -> Any:
    _refuse_unknown(value, ("function",), None, "tools")
    return value or []


class NamedTool(Wire):
    type: Literal["function"]
    name: str


class ToolChoice(Wire):
    type: Literal["function", "allowed_tools"]
    name: str = ""
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool] = []

    def choice(self) -> dict[str, Any]:
        if self.type == "function":
            return {"type": "function", "function": {"name": self.name}}
        tools = [{"type": "function", "function": {"name": tool.name}} for tool in self.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": tools}}


class TextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise PydanticCustomError("invalid_value", "must hold a schema")
        return self

    def response_format(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_}}


class TextOptions(Wire):
    format: TextFormat = TextFormat(type="text")


class ReasoningOptions(Wire):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(Wire):
    """POST /v1/responses."""

    model: str | None = None
    input: Annotated[list[Item], BeforeValidator(_items), Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    tools: Annotated[list[FunctionTool], BeforeValidator(_tools)] = []
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ()) or self.top_logprobs is not None

    def chat(self) -> ChatRequest:
        """The same as a conversation.

        Raises:
          ApiError: 400, it holds what no conversation may.
        """
        choice = self.tool_choice
        return wire.validate(
            ChatRequest,
            {
                "model": self.model,
                "messages": self._messages(),
                "stream": self.stream,
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "logprobs": self.wants_logprobs,
                "top_logprobs": self.top_logprobs,
                "tools": [tool.declaration() for tool in self.tools],
                "tool_choice": choice.choice() if isinstance(choice, ToolChoice) else choice,
                "parallel_tool_calls": self.parallel_tool_calls,
                "response_format": self.text.format.response_format() if self.text else None,
                "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            },
        )

    def echoed(self) -> dict[str, Any]:
        """What a response object repeats of its request."""
        format = self.text.format if self.text else TextFormat(type="text")
        choice = self.tool_choice
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "reasoning": {
                "effort": self.reasoning.effort if self.reasoning else None,
                "summary": None,
            },
            "temperature": self.temperature,
            "text": {"format": format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice.model_dump()
            if isinstance(choice, ToolChoice)
            else choice or "auto",
            "tools": [tool.model_dump() for tool in self.tools],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
        }

    def _messages(self) -> list[dict[str, Any]]:
        """The conversation, in which one turn of the assistant is one message again."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        turn: dict[str, Any] | None = None  # of the assistant, while it goes on
        for item in self.input:
            is_own = isinstance(item, CallItem | ReasoningItem) or (
                isinstance(item, MessageItem) and item.role == "assistant"
            )
            if is_own and turn is None:
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            if not is_own:
                turn = None
            match item:
                case MessageItem() if turn is not None:
                    turn["content"] += _text(item.content)
                case MessageItem():
                    messages.append({"role": item.role, "content": _text(item.content)})
                case CallOutputItem():
                    messages.append({"role": "tool", "content": _text(item.output)})
                case ReasoningItem() if turn is not None:
                    thoughts = _text(item.content or item.summary)
                    turn["reasoning_content"] = turn.get("reasoning_content", "") + thoughts
                case CallItem() if turn is not None:
                    function = {"name": item.name, "arguments": item.arguments}
                    turn.setdefault("tool_calls", []).append({"function": function})
                case _:
                    pass
        return messages


def _text(parts: list[Part]) -> str:
    return "".join(part.text or part.refusal for part in parts)
