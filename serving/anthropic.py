"""Anthropic's messages: requests, as the conversations they are.

Knows neither models nor engines.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from serving import errors, wire
from serving.output_rules import JsonSchema
from serving.protocol import MAX_STOP_STRINGS, ChatRequest
from serving.wire import Refused, Wire

REFUSED: Refused = {
    "container": (),
    "mcp_servers": ([],),
    "prefill": (),
    "context_management": ({},),
}

# Coding agents write what changes with every request into the system prompt; left there, it would
# keep every prefix from being found in the cache.
_VOLATILE = re.compile(
    r"^x-anthropic-billing-header:[^\n]*\n?|<total_tokens>[^<]*</total_tokens>", re.MULTILINE
)


def _known_blocks(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    for block in value if isinstance(value, list) else ():
        if isinstance(block, dict) and isinstance(block.get("type"), str):
            if block["type"] not in _BLOCKS:
                kind = errors.shorten(block["type"], 40)
                message = "this model takes text and tools only, not {kind}"
                raise PydanticCustomError("unsupported_parameter", message, {"kind": kind})
    return value


_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


class TextBlock(Wire):
    type: Literal["text"]
    text: str


class ThinkingBlock(Wire):
    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class ToolUse(Wire):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResult(Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[list[TextBlock], BeforeValidator(_known_blocks)] = []


Block = Annotated[TextBlock | ThinkingBlock | ToolUse | ToolResult, Field(discriminator="type")]


class MessageParam(Wire):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(_known_blocks)]

    def messages(self) -> list[dict[str, Any]]:
        """The messages of a conversation that it stands for."""
        if self.role == "assistant":
            return [self._assistant()]
        messages: list[dict[str, Any]] = []
        for block in self.content:
            match block:
                case ToolResult():
                    text = "".join(part.text for part in block.content)
                    messages.append({"role": "tool", "content": text})
                case TextBlock() if messages and messages[-1]["role"] == self.role:
                    messages[-1]["content"] += block.text
                case TextBlock():
                    messages.append({"role": self.role, "content": block.text})
                case _:
                    pass  # a user neither thinks nor calls
        return messages or [{"role": self.role, "content": ""}]

    def _assistant(self) -> dict[str, Any]:
        thoughts = "".join(b.thinking for b in self.content if isinstance(b, ThinkingBlock))
        text = "".join(b.text for b in self.content if isinstance(b, TextBlock))
        calls = [
            {"function": {"name": b.name, "arguments": b.input}}
            for b in self.content
            if isinstance(b, ToolUse)
        ]
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thoughts:
            message["reasoning_content"] = thoughts
        return {**message, "tool_calls": calls} if calls else message


class ToolParam(Wire):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    type: Literal["custom"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_tool(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "custom":
            message = "this server runs no tools of its own, such as {kind}"
            raise PydanticCustomError(
                "unsupported_parameter", message, {"kind": errors.shorten(kind, 40)}
            )
        return value

    def declaration(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": {**function, "parameters": self.input_schema}}


class ToolChoiceParam(Wire):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def choice(self) -> str | dict[str, Any]:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name or ""}}
        return {"any": "required"}.get(self.type, self.type)


class ThinkingParam(Wire):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class OutputFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    format: OutputFormat | None = None


class CountRequest(Wire):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1)]
    system: Annotated[list[TextBlock], BeforeValidator(_known_blocks)] = []
    tools: list[ToolParam] = []
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None

    def chat(self, **fields: Any) -> ChatRequest:
        """The same as a conversation, with these fields besides.

        Raises:
          ApiError: 400, it holds what no conversation may.
        """
        system = _VOLATILE.sub("", "\n".join(block.text for block in self.system)).strip()
        messages = [{"role": "system", "content": system}] if system else []
        for message in self.messages:
            messages += message.messages()
        thinks = self.thinking is not None and self.thinking.type != "disabled"
        fields |= {
            "model": self.model,
            "messages": messages,
            "chat_template_kwargs": {"enable_thinking": thinks},
            "continue_final_message": messages[-1]["role"] == "assistant",
            "tools": [tool.declaration() for tool in self.tools],
        }
        if self.thinking is not None and thinks:
            fields["thinking_token_budget"] = self.thinking.budget_tokens
        if self.tool_choice is not None:
            fields["tool_choice"] = self.tool_choice.choice()
            if self.tool_choice.disable_parallel_tool_use:
                fields["parallel_tool_calls"] = False
        if self.output_config is not None and self.output_config.format is not None:
            schema = JsonSchema.model_validate({"schema": self.output_config.format.schema_})
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": schema.model_dump(by_alias=True),
            }
        return wire.validate(ChatRequest, fields)


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_sequences: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]],
        Field(max_length=MAX_STOP_STRINGS),
    ] = []

    def conversation(self, max_new_tokens: int) -> ChatRequest:
        """The same as a conversation. Clients of this API ask for more tokens than they want; what
        they get is what this server completes at most."""
        return self.chat(
            max_tokens=self.max_tokens if self.max_tokens <= max_new_tokens else None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
        )
