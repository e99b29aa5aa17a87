"""The requests of the OpenAI wire format, parsed strictly.

Knows neither models nor engines.

Every field that OpenAI's client, or the usual extensions of vLLM and SGLang, can send falls into
one of three kinds. Honored: it is in a model below. Refused: it is in `REFUSED`, because ignoring
it would change the answer. Harmless: it, and anything unknown, is ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from serving import errors

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 256

# Field -> the values that ask for nothing. Any other value is refused.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "ebnf": (),
    "frequency_penalty": (0,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprob_token_ids": (),
    "max_new_tokens": (),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "regex": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_regex": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
REFUSED_COMPLETION = _REFUSED | {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "suffix": ("",),
}
REFUSED_CHAT = _REFUSED | {
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": (),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "thinking_token_budget": (),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class Wire(BaseModel):
    """A JSON object: no type is converted into another, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def _stop_strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


class StreamOptions(Wire):
    """What a stream carries beside the answer."""

    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_continuous_usage(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("continuous_usage_stats"):
            raise PydanticCustomError(
                "unsupported_parameter", "continuous_usage_stats is not supported yet"
            )
        return value


class GenerationRequest(Wire):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]],
        BeforeValidator(_stop_strings),
        Field(max_length=MAX_STOP_STRINGS),
    ] = []
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the completion's tokens, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[int]
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and value and not isinstance(value[0], int):
            if len(value) > 1:
                raise PydanticCustomError(
                    "unsupported_parameter", "several prompts in one request are not supported yet"
                )
            value = value[0]
        is_tokens = isinstance(value, list) and all(type(token) is int for token in value)
        if not is_tokens and not isinstance(value, str):
            raise PydanticCustomError("invalid_type", "must be a string or a list of token ids")
        return value


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


class TemplateOptions(Wire):
    """The switches of GLM's chat template."""

    enable_thinking: bool | None = None
    clear_thinking: bool | None = None


class Thinking(Wire):
    """Z.ai's own way to say the same."""

    type: Literal["enabled", "disabled"] | None = None
    clear_thinking: bool | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    thinking: Thinking = Thinking()
    chat_template_kwargs: TemplateOptions = TemplateOptions()

    @field_validator("thinking", "chat_template_kwargs", mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return {} if value is None else value

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().token_limit

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools the model may use; none with tool_choice "none"."""
        if self.tool_choice == "none":
            return []
        return [tool.declaration for tool in self.tools or []]

    @property
    def enable_thinking(self) -> bool | None:
        """Whether the model is to reason; None leaves it to the template."""
        if self.chat_template_kwargs.enable_thinking is not None:
            return self.chat_template_kwargs.enable_thinking
        if self.thinking.type is not None:
            return self.thinking.type == "enabled"
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    @property
    def clear_thinking(self) -> bool | None:
        """Whether reasoning of earlier turns is dropped; None leaves it to the template."""
        if self.chat_template_kwargs.clear_thinking is not None:
            return self.chat_template_kwargs.clear_thinking
        return self.thinking.clear_thinking


def parse[Body: GenerationRequest](kind: type[Body], body: bytes) -> Body:
    """A request from the bytes of its body.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise errors.ApiError(400, f"The body is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise errors.ApiError(400, "The body must be a JSON object.", code="invalid_type")
    _refuse_unsupported(fields, REFUSED_CHAT if kind is ChatRequest else REFUSED_COMPLETION)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _api_error(error.errors(include_url=False)[0]) from None


def _refuse_unsupported(fields: dict[str, Any], refused: dict[str, tuple[Any, ...]]) -> None:
    for name in fields.keys() & refused.keys():
        value, harmless = fields[name], refused[name]
        if value is not None and value not in harmless:
            advice = f" or set it to {json.dumps(harmless[0])}" if harmless else ""
            raise errors.unsupported(name, f"'{name}' is not supported yet: leave it out{advice}.")


def _api_error(detail: ErrorDetails) -> errors.ApiError:
    param = _path(detail["loc"]) or None
    kind = detail["type"]
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
        return errors.invalid(param, message, "missing_required_parameter")
    if kind in ("invalid_type", "unsupported_parameter"):
        code = kind
    else:
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    what = detail["msg"].removeprefix("Input ")
    value = detail["input"]
    if isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**256):
        what += f", not {errors.shorten(json.dumps(value, ensure_ascii=False), 100)}"
    return errors.invalid(param, f"Invalid '{param}': {what}.", code)


def _path(where: tuple[int | str, ...]) -> str:
    """`messages[0].content` of ("messages", 0, "content")."""
    # The branches of a union are parts of pydantic's path, not of the client's.
    where = tuple(part for part in where if part not in ("str", "list[int]"))
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return path.removeprefix(".")
