"""Answers outside of any server: tokens read into text, and text into messages.

Knows neither engine nor wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from glm_jax.engine.request import FinishReason, PromptLogprob, TokenEvent
from serving.detokenizer import Detokenizer, Piece, StopStrings
from serving.parsers import Arguments, ChatParser, Content, Reasoning, ToolCall
from serving.tokenizer import ModelTokenizer


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token of a stream.

    Attributes:
      token: the token id.
      text: what it adds to the text; empty where a character or a stop string is not decided yet.
      logprob: its log-probability.
      top_logprobs: the likeliest tokens and their log-probabilities, if they were asked for.
      finish_reason: None while more is to come.
    """

    token: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Completion:
    """An answer, complete.

    Attributes:
      prompt: its token ids.
      tokens, logprobs: of the completion, the token that ended it included.
      text: without that token, tags as they are.
      finish_reason: "stop" or "length".
      num_cached_tokens: prompt tokens that were found in the cache.
      prompt_logprobs: of the prompt's tokens but the first, if they were asked for.
    """

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] = ()


@dataclass(slots=True)
class Called:
    """A call that the model made: the tool's name, and its arguments as JSON text."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message(Completion):
    """An answer of a conversation, taken apart.

    Attributes:
      content: what the model says.
      reasoning: what it thought before.
      calls: the tools it calls.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[Called] = field(default_factory=list)


class Reader:
    """Reads the events of one answer.

    Args:
      tokenizer: the model's.
      stop: strings that end the answer, and are left out of it.

    Attributes:
      pieces: all text and tags so far.
      num_cached_tokens: prompt tokens that were found in the cache.
      prompt_logprobs: of the prompt's tokens but the first, if they were asked for.
    """

    def __init__(self, tokenizer: ModelTokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stop)
        self.pieces: list[Piece] = []
        self.num_cached_tokens = 0
        self.prompt_logprobs: tuple[PromptLogprob, ...] = ()

    def read(self, event: TokenEvent) -> Token:
        """The token of an event.

        Raises:
          RuntimeError: the request ended without one.
        """
        if event.token is None:
            raise RuntimeError(event.error or f"the request ended: {event.finish_reason}")
        reason = event.finish_reason
        pieces = [] if reason == "stop" else self._detokenizer.push(event.token)
        if reason is not None:
            pieces = [*pieces, *self._detokenizer.finish()]
        pieces = self._stops.push(pieces)
        if self._stops.matched is not None:
            reason = "stop"
        elif reason is not None:
            pieces = [*pieces, *self._stops.finish()]
        self.pieces += pieces
        self.num_cached_tokens = event.num_cached_tokens
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs
        return Token(event.token, "".join(pieces), event.logprob, event.top_logprobs, reason)


def take_apart(message: Message, pieces: Iterable[Piece], parser: ChatParser) -> None:
    """Fills in what a message says, thinks and calls."""
    deltas = parser.feed(pieces) + parser.finish(is_cut=message.finish_reason == "length")
    for delta in deltas:
        match delta:
            case Content(text):
                message.content += text
            case Reasoning(text):
                message.reasoning += text
            case ToolCall(name=name):
                message.calls.append(Called(name))
            case Arguments(index, text):
                message.calls[index].arguments += text
