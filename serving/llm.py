"""The model without a server: `LLM(model_dir).generate(prompts)`, for notebooks and scripts.

Knows no HTTP. It runs the same engine in a thread of its own, with the same template, tokenizer
and parser, and shows what happens inside the model besides.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Constraint, Request, SamplingParams, TokenEvent
from glm_jax.forward import forward_function
from glm_jax.mtp import PREFIX
from serving.admission import GenerationDefaults
from serving.chat import ChatTemplate
from serving.chat import Prompt as ChatPrompt
from serving.grammars import Grammars
from serving.model_engine import engine_of, load_model
from serving.output_rules import RuledRequest
from serving.parsers import ChatParser
from serving.protocol import ChatRequest
from serving.server import Address
from serving.tokenizer import ModelTokenizer
from serving.tools import Tools
from serving.transcript import Completion, Message, Reader, Token, take_apart
from serving.wiring import Options

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Conversation = Sequence[dict[str, Any]]

_INTEGERS = int | np.integer
# Forward passes are compiled per length: lengths are rounded up to a multiple of this.
_LENGTH_STEP = 64
# Of a chat request, what is honored here; the rest is SamplingParams' to say, and is refused.
_FIELDS = RuledRequest.model_fields.keys() | set(
    "add_generation_prompt chat_template_kwargs continue_final_message parallel_tool_calls "
    "reasoning_effort thinking thinking_token_budget tool_choice tools".split()
)


@dataclass(frozen=True, slots=True)
class Insight:
    """What happened inside the model while it read some tokens, as NumPy arrays.

    Attributes:
      tokens: int32[T].
      logits: float32[T, V], the scores of every next token.
      hidden: float32[L, T, D], the residual stream after each layer.
      experts: int32[Lm, T, k], the routed experts of each expert layer, by falling score.
      weights: float32[Lm, T, k], what their outputs were multiplied with.
      scores: float32[Lm, T, E], the router's score of every expert.
      attention: float32[L, N, T, T], the share of each head at position t that position s gets.
    """

    tokens: NDArray[np.int32]
    logits: NDArray[np.float32]
    hidden: NDArray[np.float32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
    scores: NDArray[np.float32]
    attention: NDArray[np.float32]


class LLM:
    """A model to ask from Python. Loading takes the weights; steps compile at the first answer.

    Use it in a `with`, or call `close`, to end the engine's thread.

    Args:
      model_dir: a checkpoint as published, with tokenizer and template.
      max_concurrency: answers that are made at the same time; further ones wait.
      max_seq_len: tokens of prompt and completion together.
      max_batch_tokens: prompt tokens of one prefill step.
      num_devices: of the mesh; on a CPU as many of them as exist.
      load_format: "auto", or "dummy" for random weights.
      kv_cache_dtype: "auto", "bf16" or "fp8_e4m3".
      speculative_tokens: tokens that the MTP layer guesses in each decode step, 0 … 3; they change
        how fast answers come, not the answers.

    Attributes:
      tokenizer, template, defaults: the model's.
      model: its config, mesh and weights.

    Raises:
      ValueError: a file of the directory is at fault.
      CannotStartError: checkpoint, devices and limits do not fit together; here, or when the engine
        is first needed.
    """

    def __init__(
        self,
        model_dir: Path | str,
        *,
        max_concurrency: int = 8,
        max_seq_len: int = 2048,
        max_batch_tokens: int = 8192,
        num_devices: int = 1,
        load_format: str = "auto",
        kv_cache_dtype: str = "auto",
        speculative_tokens: int = 0,
    ) -> None:
        directory = Path(model_dir)
        self._options = Options(
            model_dir=directory,
            engine=None,
            address=Address(host="", port=0),
            max_concurrency=max_concurrency,
            max_batch_tokens=max_batch_tokens,
            max_seq_len=max_seq_len,
            max_new_tokens=max_seq_len,
            max_prompt_tokens=max_seq_len,
            num_gpus=num_devices,
            queue_size=2**31,
            load_format=load_format,
            kv_cache_dtype=kv_cache_dtype,
            speculative_tokens=speculative_tokens,
            served_model_names=(),
        )
        self.tokenizer = ModelTokenizer.from_directory(directory)
        self.template = ChatTemplate.from_directory(directory, self.tokenizer)
        self.defaults = GenerationDefaults.from_directory(directory)
        self.model = load_model(self._options, self.tokenizer)
        self._ids = itertools.count()
        self._queues: dict[str, SimpleQueue[TokenEvent]] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine's thread once what it has begun is finished."""
        if self._thread is not None:
            self.engine.stop()
            self._thread.join()

    @cached_property
    def engine(self) -> Engine:
        """The engine, compiled and started when it is first needed."""
        engine = engine_of(self.model, self._options)
        self._thread = threading.Thread(
            target=self._run, args=(engine,), name="engine", daemon=True
        )
        self._thread.start()
        return engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> list[Completion]:
        """Completes prompts, together; the answers come in the order of the prompts.

        Args:
          prompts: texts or token ids; one alone is a list of one.
          sampling: how; None: as the model's directory says, for as long as fits.
          stop: strings that end a completion, and are left out of its text.
          ignore_eos: whether the model's own stop tokens are tokens like others.

        Raises:
          ValueError: a prompt is empty, leaves the vocabulary, or can never fit.
          RuntimeError: the engine died.
        """
        completions = [Completion(self._tokens(prompt)) for prompt in _several(prompts, _INTEGERS)]
        self._complete(completions, sampling, stop, ignore_eos=ignore_eos)
        return completions

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        **fields: Any,
    ) -> list[Message]:
        """Answers conversations, together.

        Args:
          conversations: lists of messages as OpenAI writes them; one alone is a list of one.
          sampling, stop: as of generate.
          fields: what else a chat request may say of thinking, tools and the answer's form:
            reasoning_effort, tools, tool_choice, response_format and the like.

        Raises:
          ValueError: a message or a field is none, or a conversation can never fit.
          ApiError: fields exclude each other, or no answer can have the form asked for.
          RuntimeError: the engine died.
        """
        bodies = [_chat(each, fields) for each in _several(conversations, dict)]
        prompts = list(map(self.template.encode, bodies))
        messages = [Message(prompt.tokens) for prompt in prompts]
        tools = [Tools(body.offered_tools) if body.offered_tools else None for body in bodies]
        asked = list(zip(bodies, tools, prompts, strict=True))
        constraints = [
            self._grammars.constraint(
                self._grammars.of(body, offered),
                starts_in_reasoning=prompt.starts_in_reasoning,
                budget=body.thinking_token_budget,
            )
            for body, offered, prompt in asked
        ]
        readers = self._complete(messages, sampling, stop, constraints=constraints)
        for (body, offered, prompt), message, reader in zip(asked, messages, readers, strict=True):
            parser = ChatParser(
                offered,
                starts_in_reasoning=prompt.starts_in_reasoning,
                is_continued=prompt.is_continued,
                max_calls=1 if body.parallel_tool_calls is False else None,
            )
            take_apart(message, reader.pieces, parser)
        return messages

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """One completion, token by token; leaving the iteration early cancels it.

        A conversation streams as `stream(render(messages).tokens)`. Arguments and errors are those
        of generate.
        """
        tokens = self._tokens(prompt)
        reader = Reader(self.tokenizer, stop)
        with closing(self._submit(tokens, self._sampling(tokens, sampling, ignore_eos))) as events:
            yield from _read(events, reader)

    def render(self, messages: Conversation, **fields: Any) -> ChatPrompt:
        """The prompt of a conversation, by the model's template; arguments are those of chat."""
        return self.template.encode(_chat(messages, fields))

    def forward(self, prompt: Prompt) -> Insight:
        """Reads a prompt once, without the cache, and shows what happened in every layer."""
        tokens = np.array(self._tokens(prompt), np.int32)
        length = tokens.size
        # What comes after a token has no say in it, so padding at the end is cut off again.
        padded = np.zeros((1, -(-length // _LENGTH_STEP) * _LENGTH_STEP), np.int32)
        padded[0, :length] = tokens
        decoder = {path: w for path, w in self.model.weights.items() if not path.startswith(PREFIX)}
        seen = jax.tree.map(np.asarray, self._forward(decoder, padded))
        return Insight(
            tokens=tokens,
            logits=seen.logits[0, :length],
            hidden=seen.trace.hidden[:, 0, :length].astype(np.float32),
            experts=seen.trace.routing.experts[:, :length],
            weights=seen.trace.routing.weights[:, :length],
            scores=seen.trace.routing.scores[:, :length],
            attention=seen.attention[:, 0, :, :length, :length],
        )

    @cached_property
    def _forward(self) -> jax.stages.Wrapped:
        model = self.model
        return forward_function(model.config, model.mesh, model.dtype, with_attention=True)

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else map(int, prompt)
        tokens, size = tuple(tokens), self.model.config.vocab_size
        if not tokens:
            raise ValueError("a prompt must have at least one token")
        if not all(0 <= token < size for token in tokens):
            raise ValueError(f"token ids must be in 0 to {size - 1}")
        return tokens

    def _sampling(
        self, prompt: Sequence[int], sampling: SamplingParams | None, ignore_eos: bool
    ) -> SamplingParams:
        defaults = self.defaults
        if sampling is None:
            sampling = SamplingParams(
                max_new_tokens=max(1, self._options.max_seq_len - len(prompt)),
                temperature=defaults.temperature,
                top_p=defaults.top_p,
                top_k=defaults.top_k,
            )
        if ignore_eos:
            return sampling
        return replace(sampling, stop_token_ids=sampling.stop_token_ids | defaults.stop_token_ids)

    def _complete(
        self,
        completions: Sequence[Completion],
        sampling: SamplingParams | None,
        stop: Sequence[str],
        *,
        ignore_eos: bool = False,
        constraints: Sequence[Constraint | None] = (),
    ) -> list[Reader]:
        """Fills completions in; all are submitted before the first is read."""
        readers = [Reader(self.tokenizer, stop) for _ in completions]
        with ExitStack() as undo:
            streams = [
                undo.enter_context(closing(self._submit(each.prompt, wanted, constraint)))
                for each, constraint in zip_longest(completions, constraints)
                for wanted in [self._sampling(each.prompt, sampling, ignore_eos)]
            ]
            for completion, reader, events in zip(completions, readers, streams, strict=True):
                for token in _read(events, reader):
                    completion.tokens.append(token.token)
                    completion.logprobs.append(token.logprob)
                    completion.text += token.text
                    completion.finish_reason = token.finish_reason
                completion.num_cached_tokens = reader.num_cached_tokens
                completion.prompt_logprobs = reader.prompt_logprobs
        return readers

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.defaults.stop_token_ids)

    def _submit(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        constraint: Constraint | None = None,
    ) -> _Events:
        id = str(next(self._ids))
        self._queues[id] = SimpleQueue()
        try:
            self.engine.submit(
                Request(id=id, prompt=prompt, sampling=sampling, constraint=constraint)
            )
        except BaseException:
            del self._queues[id]
            raise
        return _Events(self, id, self._queues[id])

    def _leave(self, id: str) -> None:
        self.engine.cancel(id)
        self._queues.pop(id, None)

    def _run(self, engine: Engine) -> None:
        try:
            engine.run(self._deliver)
        except Exception as error:  # whoever waits is told in the last events
            logger.critical("the engine died", exc_info=error)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            queue = self._queues.get(event.request_id)
            if queue is not None:  # else it was left early
                queue.put(event)


class _Events:
    """The events of one request as they come; closing it cancels what is not finished."""

    def __init__(self, llm: LLM, id: str, queue: SimpleQueue[TokenEvent]) -> None:
        self._llm, self._id, self._queue = llm, id, queue

    def get(self) -> TokenEvent:
        return self._queue.get()

    def close(self) -> None:
        self._llm._leave(self._id)


def _read(events: _Events, reader: Reader) -> Iterator[Token]:
    while True:
        token = reader.read(events.get())
        yield token
        if token.finish_reason is not None:
            return


def _chat(messages: Conversation, fields: Mapping[str, Any]) -> ChatRequest:
    if unknown := sorted(fields.keys() - _FIELDS):
        raise ValueError(f"{unknown[0]} is nothing to say of a chat here: {sorted(_FIELDS)} are")
    return ChatRequest.model_validate({"messages": list(messages), **fields})


def _several(asked: Any, one: Any) -> Sequence[Any]:
    """A list of what was asked for; one alone is a text, or begins with such an element."""
    is_one = isinstance(asked, str) or (len(asked) > 0 and isinstance(asked[0], one))
    return [asked] if is_one else asked
