"""Conversations as tokens: the bundled chat template, and which tokens are learned.

Knows the template only as a file; what a conversation says is not its business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from checkpoints.nano_training.conversation import Conversation

NANO_DIRECTORY = Path(__file__).parent.parent / "nano"

_ASSISTANT, _USER, _OBSERVATION = "<|assistant|>", "<|user|>", "<|observation|>"


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation as the training sees it.

    Attributes:
      tokens: the rendered conversation, closed by the token that ends its last turn.
      learned: for each token, whether the model is to predict it.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]


@cache
def _template() -> Template:
    # As transformers renders chat templates.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    return environment.from_string(
        (NANO_DIRECTORY / "chat_template.jinja").read_text(encoding="utf-8")
    )


def _to_json(value: Any, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii)


def render_prompt(conversation: Conversation) -> str:
    """The conversation without its last message: the text the model continues with that message."""
    return _template().render(
        messages=conversation.messages[:-1],
        tools=conversation.tools,
        enable_thinking=conversation.enable_thinking,
        clear_thinking=not conversation.keep_thinking,
        add_generation_prompt=True,
    )


def render(conversation: Conversation) -> str:
    """The whole conversation, closed by <|observation|> after tool calls and <|user|> otherwise."""
    messages = conversation.messages
    text = _template().render(
        messages=messages,
        tools=conversation.tools,
        clear_thinking=not conversation.keep_thinking,
    )
    return text + (_OBSERVATION if messages[-1].get("tool_calls") else _USER)


def to_sample(conversation: Conversation, tokenizer: Tokenizer) -> Sample:
    """Tokens and mask; learned is what the assistant says after its <think> or </think> prefix."""
    tokens = tokenizer.encode(render(conversation), add_special_tokens=False).ids
    assistant = tokenizer.token_to_id(_ASSISTANT)
    ends = {tokenizer.token_to_id(_USER), tokenizer.token_to_id(_OBSERVATION)}
    learned: list[bool] = []
    speaking = False
    previous = -1
    for token in tokens:
        learned.append(speaking and previous != assistant)
        if token == assistant:
            speaking = True
        elif token in ends:
            speaking = False
        previous = token
    return Sample(tuple(tokens), tuple(learned))
