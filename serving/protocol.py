"""The requests of the OpenAI wire format, parsed strictly.

Knows neither models nor engines.

Every field that OpenAI's client, or the usual extensions of vLLM and SGLang, can send falls into
one of three kinds. Honored: it is in a model below. Refused: it is in `REFUSED`, because ignoring
it would change the answer. Harmless: it, and anything unknown, is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from glm_jax.shapes import MAX_LOGIT_BIASES, MAX_TOP_LOGPROBS
from serving import errors, wire
from serving.conversation import Message, Tool, ToolChoice
from serving.output_rules import RuledRequest
from serving.wire import Refused, Wire

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 256
MAX_CHOICES = 64
MAX_PROMPTS = 64

_REFUSED: Refused = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "length_penalty": (1,),
    "logprob_token_ids": (),
    "max_new_tokens": (),
    "min_new_tokens": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_regex": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
REFUSED_COMPLETION = _REFUSED | {"suffix": ("",)}
REFUSED_CHAT = _REFUSED | {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": (),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def _stop_strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


def _token_biases(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise PydanticCustomError("invalid_value", "must map token ids to numbers") from None


_TOKEN_IDS: dict[str, Any] = {"propertyNames": {"pattern": "^[0-9]{1,9}$"}}


_ONE_STOP = {"type": "string", "minLength": 1, "maxLength": 1000}
_STOPS = {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": _ONE_STOP}
_STOP: dict[str, Any] = {"anyOf": [_ONE_STOP, _STOPS, {"type": "null"}]}


class StreamOptions(Wire):
    """What a stream carries beside the answer.

    Attributes:
      include_usage: the usage of the whole request, at its end.
      continuous_usage_stats: with it, the usage so far in every event.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(RuledRequest):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions = StreamOptions()
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
        WithJsonSchema(_STOP),
    ] = []
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_token_biases),
        Field(max_length=MAX_LOGIT_BIASES, json_schema_extra=_TOKEN_IDS),
    ] = {}
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # the lower goes first
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = None

    @field_validator("stream_options", "logit_bias", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _check_what_is_told_of_the_prompt(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            message = "Invalid 'prompt_logprobs': they come with whole answers, not streamed ones."
            raise errors.invalid("prompt_logprobs", message)
        return self

    @property
    def num_choices(self) -> int:
        """Answers to give, per prompt."""
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """Answers to make, per prompt; the best of them are given."""
        return self.num_choices

    @property
    def num_top_logprobs(self) -> int | None:
        """Likeliest tokens to tell beside each token; None: no log-probabilities at all."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.prompt_logprobs

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the completion's tokens, and its value."""
        return "max_tokens", self.max_tokens


_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_SEVERAL = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
_PROMPT: dict[str, Any] = {
    "anyOf": [_TEXT, _TOKENS, {**_SEVERAL, "items": _TEXT}, {**_SEVERAL, "items": _TOKENS}]
}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], WithJsonSchema(_PROMPT)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool = True
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        """A string, token ids, or a list of either, as a list."""
        if isinstance(value, str) or (isinstance(value, list) and not value):
            return [value]
        if isinstance(value, list) and type(value[0]) is int:
            value = [value]
        if not isinstance(value, list) or not all(map(_is_prompt, value)):
            message = "must be a string, a list of token ids, or a list of either"
            raise PydanticCustomError("invalid_type", message)
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError(
                "invalid_value", "must hold at most {most} prompts", {"most": MAX_PROMPTS}
            )
        return value

    @model_validator(mode="after")
    def _check_fields_that_go_together(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            message = "Invalid 'max_tokens': without echo there must be a token at least."
            raise errors.invalid("max_tokens", message)
        if self.best_of is not None and self.best_of < self.num_choices:
            raise errors.invalid("best_of", "Invalid 'best_of': it must be at least n.")
        if self.stream and self.num_candidates > self.num_choices:
            message = "Invalid 'best_of': the best answers are known at the end, so not streamed."
            raise errors.invalid("best_of", message)
        return self

    @property
    def num_candidates(self) -> int:
        return self.best_of or self.num_choices

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes_logprobs(self) -> bool:
        """Whether the prompt's tokens are told like the answer's."""
        return self.echo and self.logprobs is not None

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(token) is int for token in value)
    return isinstance(value, str)


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
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    thinking: Thinking = Thinking()
    chat_template_kwargs: TemplateOptions = TemplateOptions()

    @field_validator("thinking", "chat_template_kwargs", mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _check_fields_that_go_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise errors.invalid(
                "top_logprobs", "Invalid 'top_logprobs': set logprobs to true too."
            )
        self._check_tool_choice()
        if self.continue_final_message:
            if self.add_generation_prompt:
                message = "Invalid 'add_generation_prompt': a message is continued, not begun."
                raise errors.invalid("add_generation_prompt", message)
            if self.messages[-1].role != "assistant":
                message = "Invalid 'continue_final_message': the last message is no assistant's."
                raise errors.invalid("continue_final_message", message)
        return self

    def _check_tool_choice(self) -> None:
        names = {tool.function.name for tool in self.tools or []}
        if isinstance(self.tool_choice, ToolChoice):
            for name in self.tool_choice.names:
                if name not in names:
                    message = f"Invalid 'tool_choice': no tool is named '{name}'."
                    raise errors.invalid("tool_choice", message)
        elif self.tool_choice == "required" and not names:
            raise errors.invalid("tool_choice", "Invalid 'tool_choice': there are no tools.")

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

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
        names = self.tool_choice.names if isinstance(self.tool_choice, ToolChoice) else None
        return [
            tool.declaration
            for tool in self.tools or []
            if names is None or tool.function.name in names
        ]

    @property
    def required_tools(self) -> list[str]:
        """The tools of which the model must call some; none where it may do without."""
        choice = self.tool_choice
        if choice == "required" or (isinstance(choice, ToolChoice) and choice.is_required):
            return [tool["function"]["name"] for tool in self.offered_tools]
        return []

    @property
    def has_strict_tools(self) -> bool:
        """Whether arguments are to fit their schemas, whatever the model would write."""
        offered = {tool["function"]["name"] for tool in self.offered_tools}
        return any(t.function.strict for t in self.tools or [] if t.function.name in offered)

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
    return wire.parse(kind, body, REFUSED_CHAT if kind is ChatRequest else REFUSED_COMPLETION)
