"""From a request's body to an answer under way: all that the endpoints do, without HTTP.

Knows neither routes nor statuses but those of the errors it raises.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from glm_jax.engine.request import (
    EngineDeadError,
    EngineDrainingError,
    QueueFullError,
    Request,
)
from serving import errors
from serving.admission import GenerationDefaults, Limits, admit, prompt_too_long
from serving.answer import Answer, Reading, Usage
from serving.bridge import Bridge, EngineStartingError, Stream
from serving.chat import ChatTemplate, Prompt
from serving.detokenizer import Detokenizer, StopStrings
from serving.metrics import Metrics
from serving.parsers import ChatParser, Parser, TextParser
from serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from serving.responses import ChatFormat, CompletionFormat, Format, Head
from serving.tokenizer import ModelTokenizer
from serving.tools import Tools

# Longer texts are tokenized beside the event loop, so that they do not hold up the streams.
_LONG_TEXT = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A model that answers.

    Attributes:
      bridge: to the engine.
      tokenizer, template: the model's.
      model_names: what clients may call the model; the first is its own name.
      limits, defaults: for requests.
      metrics: told of every request that is taken.
      created: when the model was made available, in seconds since 1970.
    """

    bridge: Bridge
    tokenizer: ModelTokenizer
    template: ChatTemplate
    model_names: tuple[str, ...]
    limits: Limits
    defaults: GenerationDefaults
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    def model_name(self, asked: str | None) -> str:
        """The name to answer under; the model's own when none is asked for.

        Raises:
          ApiError: 404, no model goes by that name.
        """
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            raise errors.model_not_found(asked, self.model_names[0])
        return asked

    async def complete(
        self, body: CompletionRequest, *, endpoint: str, arrived: float
    ) -> tuple[Answer, Format]:
        """Begins a raw completion.

        Raises:
          ApiError: the request cannot be taken.
        """
        head = self._head("cmpl", body)
        tokens: Sequence[int]
        if isinstance(body.prompt, str):
            self._check_length(len(body.prompt), "prompt")
            encode = self.tokenizer.encode
            add = body.add_special_tokens
            if len(body.prompt) > _LONG_TEXT:
                tokens = await asyncio.to_thread(encode, body.prompt, add_special_tokens=add)
            else:
                tokens = encode(body.prompt, add_special_tokens=add)
        else:
            tokens = body.prompt
        answer = self._open(head.id, body, tokens, TextParser(), endpoint, arrived)
        return answer, CompletionFormat(head, includes_usage=body.includes_usage)

    async def chat(
        self, body: ChatRequest, *, endpoint: str, arrived: float
    ) -> tuple[Answer, Format]:
        """Begins the next message of a conversation.

        Raises:
          ApiError: the request cannot be taken.
        """
        head = self._head("chatcmpl", body)
        length = sum(len(message.text) for message in body.messages)
        self._check_length(length, "messages")
        prompt: Prompt
        if length > _LONG_TEXT:
            prompt = await asyncio.to_thread(self.template.encode, body)
        else:
            prompt = self.template.encode(body)
        tools = body.offered_tools
        parser = ChatParser(
            Tools(tools) if tools else None,
            starts_in_reasoning=prompt.starts_in_reasoning,
            max_calls=1 if body.parallel_tool_calls is False else None,
        )
        answer = self._open(head.id, body, prompt.tokens, parser, endpoint, arrived)
        return answer, ChatFormat(head, includes_usage=body.includes_usage)

    def _head(self, prefix: str, body: GenerationRequest) -> Head:
        name = self.model_name(body.model)
        return Head(f"{prefix}-{secrets.token_hex(16)}", int(time.time()), name)

    def _check_length(self, num_chars: int, param: str) -> None:
        """Refuses what cannot fit without the work of tokenizing it."""
        num_tokens = num_chars // self.tokenizer.longest_token
        if num_tokens > self.limits.longest_prompt:
            raise prompt_too_long(param, f"at least {num_tokens}", self.limits)

    def _open(
        self,
        id: str,
        body: GenerationRequest,
        tokens: Sequence[int],
        parser: Parser,
        endpoint: str,
        arrived: float,
    ) -> Answer:
        request = admit(
            body,
            tokens,
            id=id,
            limits=self.limits,
            defaults=self.defaults,
            vocab_size=self.tokenizer.size,
        )
        includes_stop = body.include_stop_str_in_output
        reading = Reading(
            detokenizer=Detokenizer(self.tokenizer),
            stops=StopStrings(body.stop, include=includes_stop),
            parser=parser,
            includes_stop=includes_stop,
        )
        stream = self._submit(request)
        self.metrics.accepted(len(request.prompt))
        return Answer(
            stream,
            reading,
            Usage(len(request.prompt)),
            endpoint=endpoint,
            arrived=arrived,
            metrics=self.metrics,
        )

    def _submit(self, request: Request) -> Stream:
        try:
            return self.bridge.open(request)
        except QueueFullError:
            raise errors.queue_full() from None
        except EngineStartingError:
            message = "The model is still loading; try again in a moment."
            raise errors.unavailable(message, "server_starting") from None
        except EngineDrainingError:
            message = "The server is shutting down; ask another one."
            raise errors.unavailable(message, "server_shutting_down") from None
        except EngineDeadError:
            message = "The engine has failed, and the server is about to restart."
            raise errors.unavailable(message, "engine_dead", retry_after=30) from None
