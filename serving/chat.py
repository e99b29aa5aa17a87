"""Messages and tools into prompt tokens, by the model's own template.

Knows neither HTTP nor sampling.

What a client says must never act as a control token, or a user could write a system turn. The
template, though, yields one string for both. So every control token in the client's words is
marked before rendering: a character that the request does not contain is put into its middle. What
still reads as a control token after rendering is the template's. The rest is encoded by a
tokenizer that knows no control tokens, with the marks taken out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving import errors
from serving.conversation import Message
from serving.protocol import ChatRequest
from serving.tokenizer import ModelTokenizer, Tag

# Characters without a meaning, by agreement; at most the first few are ever tried.
_MARKS = range(0xE000, 0xF900)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, ready for the model.

    Attributes:
      tokens: the token ids.
      starts_in_reasoning: whether `<think>` is open at its end, so that the answer begins as
        reasoning.
      is_continued: whether the answer goes on with a text that the prompt ends with.
    """

    tokens: tuple[int, ...]
    starts_in_reasoning: bool
    is_continued: bool = False


class ChatTemplate:
    """Renders conversations with a Jinja template, as the model was trained to read them.

    Args:
      source: the template's text.
      tokenizer: the model's.

    Raises:
      ValueError: the template has a syntax error.
    """

    def __init__(self, source: str, tokenizer: ModelTokenizer) -> None:
        # The settings the template was written for, which are those of Hugging Face.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat_template.jinja, line {error.lineno}: {error}") from error
        self._tokenizer = tokenizer

    @classmethod
    def from_directory(cls, model_dir: Path, tokenizer: ModelTokenizer) -> ChatTemplate:
        """Reads `chat_template.jinja` of a model directory.

        Raises:
          ValueError: the file is missing or no template.
        """
        path = model_dir / "chat_template.jinja"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; a chat needs the model's template")
        return cls(path.read_text(encoding="utf-8"), tokenizer)

    def render(self, request: ChatRequest) -> str:
        """The prompt's text, with the client's words as they are: to be read, not to be encoded.

        Raises:
          ApiError: 400, the template refuses the conversation.
        """
        text, mark = self._render_marked(request)
        return text.replace(mark, "")

    def encode(self, request: ChatRequest) -> Prompt:
        """The prompt's tokens.

        Raises:
          ApiError: 400, the template refuses the conversation.
        """
        text, mark = self._render_marked(request)
        parts = self._tokenizer.control_pattern.split(text)  # texts at even, control at odd places
        texts = self._tokenizer.encode_text(part.replace(mark, "") for part in parts[::2])
        tokens = [*texts[0]]
        for control, ids in zip(parts[1::2], texts[1:], strict=True):
            tokens.append(self._tokenizer.control_tokens[control])
            tokens += ids
        think, end_think = (
            self._tokenizer.control_tokens[tag] for tag in (Tag.THINK, Tag.END_THINK)
        )
        last = next((token for token in reversed(tokens) if token in (think, end_think)), None)
        is_continued = bool(request.continue_final_message)
        is_open = last == think if is_continued else tokens[-1:] == [think]
        return Prompt(tuple(tokens), is_open, is_continued)

    def _render_marked(self, request: ChatRequest) -> tuple[str, str]:
        """The prompt's text with marks, and the mark."""
        messages = list(map(_template_message, request.messages))
        tools = request.offered_tools
        mark = _unused_character(json.dumps([messages, tools], ensure_ascii=False))
        switches = {
            "enable_thinking": request.enable_thinking,
            "clear_thinking": request.clear_thinking,
        }
        try:
            text = self._template.render(
                messages=self._marked(messages, mark),
                tools=self._marked(tools, mark),
                add_generation_prompt=_begins_a_message(request),
                **{name: value for name, value in switches.items() if value is not None},
            )
        except jinja2.TemplateError as error:
            message = f"The model's chat template refuses the messages: {error}."
            raise errors.invalid("messages", message) from error
        if request.continue_final_message:
            text = _reopened(text, self._marked(messages[-1], mark))
        return text, mark

    def _marked(self, value: Any, mark: str) -> Any:
        """The same JSON value with a mark inside every control token."""
        if isinstance(value, str):
            return self._mark_text(value, mark)
        if isinstance(value, list):
            return [self._marked(item, mark) for item in value]
        if isinstance(value, dict):
            return {self._marked(k, mark): self._marked(v, mark) for k, v in value.items()}
        return value

    def _mark_text(self, text: str, mark: str) -> str:
        pattern = self._tokenizer.control_pattern
        while pattern.search(text):  # again, in case two control tokens overlapped
            text = pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        return text


def _begins_a_message(request: ChatRequest) -> bool:
    if request.continue_final_message:
        return False
    return request.add_generation_prompt is not False


def _reopened(text: str, message: dict[str, Any]) -> str:
    """A conversation whose last message, which the template has closed, is to be gone on with."""
    content: str = message["content"]
    if not content.strip() and message.get("reasoning_content"):
        return text.removesuffix(Tag.END_THINK)
    # The template strips what it shows; the white space at the end is the client's.
    return text.rstrip() + content[len(content.rstrip()) :]


def _template_message(message: Message) -> dict[str, Any]:
    """A message as the template wants it: strings for content, mappings for arguments."""
    text = message.text
    if message.role != "assistant":
        return {"role": "system" if message.role == "developer" else message.role, "content": text}
    reasoning = message.reasoning_content
    if reasoning is None:
        reasoning = message.reasoning
    if reasoning is None and Tag.END_THINK in text:
        # A client that keeps whole outputs: the template would take them apart, were they not
        # marked by then.
        parts = text.split(Tag.END_THINK)
        reasoning = parts[0].rstrip("\n").split(Tag.THINK)[-1].lstrip("\n")
        text = parts[-1].lstrip("\n")
    rendered: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning is not None:
        rendered["reasoning_content"] = reasoning
    calls = [call.function for call in message.tool_calls or []]
    if calls:
        rendered["tool_calls"] = [
            {"name": call.name, "arguments": dict(call.arguments)} for call in calls
        ]
    return rendered


def _unused_character(text: str) -> str:
    used = set(text)
    candidates: Iterator[str] = (chr(code) for code in _MARKS if chr(code) not in used)
    mark = next(candidates, None)
    if mark is None:
        message = "The messages contain every private-use character; leave one of them out."
        raise errors.invalid("messages", message)
    return mark


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
