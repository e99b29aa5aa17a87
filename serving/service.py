"""From a request's body to an answer under way: all that the endpoints do, without HTTP.

Knows neither routes nor statuses but those of the errors it raises.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from glm_jax.engine.request import (
    EngineDeadError,
    EngineDrainingError,
    QueueFullError,
    Request,
)
from serving import errors, openai_responses
from serving.admission import GenerationDefaults, Limits, admit, prompt_too_long
from serving.answer import Answer, Reading, Usage
from serving.anthropic import MessagesRequest
from serving.anthropic_replies import MessagesFormat
from serving.bridge import Bridge, EngineStartingError, Stream
from serving.chat import ChatTemplate, Prompt
from serving.detokenizer import Detokenizer, StopStrings
from serving.formats import Format
from serving.grammars import Grammars
from serving.metrics import Metrics
from serving.openai_response_replies import ResponsesFormat
from serving.openai_responses import ResponsesRequest
from serving.parsers import ChatParser, Parser, TextParser
from serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from serving.reply import Reply
from serving.responses import ChatFormat, CompletionFormat, Head, Wanted
from serving.tokenizer import ModelTokenizer
from serving.tools import Tools

# Longer texts are tokenized beside the event loop, so that they do not hold up the streams.
_LONG_TEXT = 20_000


@dataclass(frozen=True, slots=True)
class Opening:
    """What an answer begins from.

    Attributes:
      tokens: the prompt.
      make_parser: how the answer is taken apart.
      grammar: what it is held to after its reasoning.
      starts_in_reasoning, reasoning_budget: whether it begins so, and for how many tokens at most.
    """

    tokens: tuple[int, ...]
    make_parser: Callable[[], Parser]
    grammar: str | None = None
    starts_in_reasoning: bool = False
    reasoning_budget: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A model that answers.

    Attributes:
      bridge: to the engine.
      tokenizer, template, grammars: the model's.
      model_names: what clients may call the model; the first is its own name.
      limits, defaults: for requests.
      metrics: told of every request that is taken.
      created: when the model was made available, in seconds since 1970.
    """

    bridge: Bridge
    tokenizer: ModelTokenizer
    template: ChatTemplate
    grammars: Grammars
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
    ) -> tuple[Reply, Format]:
        """Begins raw completions.

        Raises:
          ApiError: the request cannot be taken.
        """
        head = self._head("cmpl-", body)
        prompts = [await self._encode(prompt, body) for prompt in body.prompt]
        await self._prepare(body)
        grammar = await self._grammar(body, None)
        openings = [Opening(tuple(tokens), TextParser, grammar) for tokens in prompts]
        reply = self._open(head.id, body, openings, endpoint, arrived)
        echoes = []
        if body.echo:
            texts = [
                prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
                for prompt in body.prompt
            ]
            echoes = [text for text in texts for _ in range(body.num_choices)]
        num_choices = len(prompts) * body.num_choices
        spell = self.tokenizer.spelling
        return reply, CompletionFormat(head, _wanted(body), spell, num_choices, echoes)

    async def chat(
        self, body: ChatRequest, *, endpoint: str, arrived: float
    ) -> tuple[Reply, Format]:
        """Begins the next message of a conversation.

        Raises:
          ApiError: the request cannot be taken.
        """
        head = self._head("chatcmpl-", body)
        reply = await self._converse(head.id, body, endpoint, arrived)
        spell = self.tokenizer.spelling
        return reply, ChatFormat(head, _wanted(body), spell, body.num_choices)

    async def messages(
        self, body: MessagesRequest, *, endpoint: str, arrived: float
    ) -> tuple[Reply, Format]:
        """Begins the next message of a conversation, in Anthropic's form.

        Raises:
          ApiError: the request cannot be taken.
        """
        chat = body.conversation(self.limits.max_new_tokens)
        head = self._head("msg_", chat)
        reply = await self._converse(head.id, chat, endpoint, arrived)
        return reply, MessagesFormat(head.id, head.model)

    async def respond(
        self, body: ResponsesRequest, *, endpoint: str, arrived: float
    ) -> tuple[Reply, Format]:
        """Begins a response.

        Raises:
          ApiError: the request cannot be taken.
        """
        try:
            chat = body.chat()
            head = self._head("resp_", chat)
            reply = await self._converse(head.id, chat, endpoint, arrived)
        except errors.ApiError as error:
            raise error.renamed(openai_responses.NAMES) from None
        spell = self.tokenizer.spelling
        return reply, ResponsesFormat(head, body.echoed(), spell, body.wants_logprobs)

    async def prompt(self, body: ChatRequest) -> Prompt:
        """The prompt of a conversation.

        Raises:
          ApiError: 400, it is too long, or the template refuses it.
        """
        length = sum(len(message.text) for message in body.messages)
        self._check_length(length, "messages")
        if length > _LONG_TEXT:
            return await asyncio.to_thread(self.template.encode, body)
        return self.template.encode(body)

    async def _converse(self, id: str, body: ChatRequest, endpoint: str, arrived: float) -> Reply:
        prompt = await self.prompt(body)
        tools = Tools(body.offered_tools) if body.offered_tools else None
        parser = partial(
            ChatParser,
            tools,
            starts_in_reasoning=prompt.starts_in_reasoning,
            is_continued=prompt.is_continued,
            max_calls=1 if body.parallel_tool_calls is False else None,
        )
        opening = Opening(
            prompt.tokens,
            parser,
            await self._grammar(body, tools),
            starts_in_reasoning=prompt.starts_in_reasoning,
            reasoning_budget=body.thinking_token_budget,
        )
        await self._prepare(body)
        return self._open(id, body, [opening], endpoint, arrived)

    async def _grammar(self, body: GenerationRequest, tools: Tools | None) -> str | None:
        is_chat = isinstance(body, ChatRequest)
        if body.rule is None and not (is_chat and (body.required_tools or body.has_strict_tools)):
            return None
        return await asyncio.to_thread(self.grammars.of, body, tools)

    async def _encode(self, prompt: str | list[int], body: CompletionRequest) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        self._check_length(len(prompt), "prompt")
        encode = partial(self.tokenizer.encode, add_special_tokens=body.add_special_tokens)
        return (
            await asyncio.to_thread(encode, prompt) if len(prompt) > _LONG_TEXT else encode(prompt)
        )

    async def _prepare(self, body: GenerationRequest) -> None:
        if body.num_prompt_logprobs is not None:
            await self.bridge.prepare_scores()

    def _head(self, prefix: str, body: GenerationRequest) -> Head:
        name = self.model_name(body.model)
        return Head(f"{prefix}{secrets.token_hex(16)}", int(time.time()), name)

    def _check_length(self, num_chars: int, param: str) -> None:
        """Refuses what cannot fit without the work of tokenizing it."""
        num_tokens = num_chars // self.tokenizer.longest_token
        if num_tokens > self.limits.longest_prompt:
            raise prompt_too_long(param, f"at least {num_tokens}", self.limits)

    def _open(
        self,
        id: str,
        body: GenerationRequest,
        openings: Sequence[Opening],
        endpoint: str,
        arrived: float,
    ) -> Reply:
        """Submits a request to the engine for every candidate of every prompt, or none."""
        requests = [
            admit(
                body,
                opening.tokens,
                id=f"{id}-{number}-{candidate}",
                limits=self.limits,
                defaults=self.defaults,
                vocab_size=self.tokenizer.size,
                candidate=candidate,
                constraint=self.grammars.constraint(
                    opening.grammar,
                    starts_in_reasoning=opening.starts_in_reasoning,
                    budget=opening.reasoning_budget,
                ),
            )
            for number, opening in enumerate(openings)
            for candidate in range(body.num_candidates)
        ]
        for _ in openings:
            self.metrics.asked(body.num_candidates)
        answers = []
        with ExitStack() as undo:
            for index, request in enumerate(requests):
                candidate = index % body.num_candidates
                stream = undo.enter_context(self._submit(request))
                self.metrics.accepted(len(request.prompt), request.sampling.max_new_tokens)
                answers.append(
                    Answer(
                        stream,
                        self._reading(body, openings[index // body.num_candidates]),
                        Usage(0 if candidate else len(request.prompt)),
                        endpoint=endpoint,
                        arrived=arrived,
                        metrics=self.metrics,
                    )
                )
            undo.pop_all()
        return Reply(id, answers, num_candidates=body.num_candidates, num_choices=body.num_choices)

    def _reading(self, body: GenerationRequest, opening: Opening) -> Reading:
        includes_stop = body.include_stop_str_in_output
        echoes = isinstance(body, CompletionRequest) and body.echoes_logprobs
        return Reading(
            detokenizer=Detokenizer(self.tokenizer),
            stops=StopStrings(body.stop, include=includes_stop),
            parser=opening.make_parser(),
            includes_stop=includes_stop,
            own_stops=frozenset(body.stop_token_ids or ()),
            keeps_tokens=body.num_top_logprobs is not None,
            leaves_out_all=body.token_limit[1] == 0,
            echoed=opening.tokens if echoes else (),
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


def _wanted(body: GenerationRequest) -> Wanted:
    options = body.stream_options
    return Wanted(
        usage=options.include_usage,
        continuous_usage=options.include_usage and options.continuous_usage_stats,
        logprobs=body.num_top_logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )
