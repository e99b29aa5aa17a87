"""An engine that says what a test wrote, as far as it may, and a service around it.

Knows no model and no scheduler: one thread, one token per request and turn.
"""

import asyncio
import itertools
import queue
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from glm_jax.engine.request import (
    EngineDeadError,
    EngineDrainingError,
    EngineStats,
    FinishReason,
    PromptLogprob,
    QueueFullError,
    Request,
    TokenEvent,
    Turn,
)
from serving.admission import GenerationDefaults, Limits
from serving.bridge import Bridge, Deliver, Engine
from serving.chat import ChatTemplate
from serving.grammars import Grammars
from serving.metrics import Metrics
from serving.service import Service
from serving.tokenizer import ModelTokenizer
from tests.serving.model_dir import END_TOKENS, byte_tokenizer, write_model_dir

TOKENIZER = ModelTokenizer(byte_tokenizer())
END = TOKENIZER.control_tokens[END_TOKENS[1]]
_FILLER = TOKENIZER.encode("x")[0]
LIMITS = Limits(max_seq_len=4096, max_prompt_tokens=2048, max_new_tokens=2048)


def tokens(text: str) -> list[int]:
    """Tokens of an output, control tokens recognized."""
    return TOKENIZER.encode(text)


class ScriptedEngine:
    """Answers each request with the tokens of `script(request)`, then with x until it must end.

    Attributes:
      num_prepared: how often it was told to be ready for scores.
      requests: all that were submitted.
      cancelled: ids of those that were cancelled while they ran.
    """

    def __init__(
        self, script: Callable[[Request], Iterable[int]], *, pause: float = 0.0, max_queue: int = 64
    ) -> None:
        self._script = script
        self._pause = pause
        self._max_queue = max_queue
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[str, tuple[Request, Iterator[int]]] = {}
        self._failure: Exception | None = None
        self._is_stopping = False
        self._is_alive = True
        self._scored: set[str] = set()  # requests whose prompt is told
        self._num_tokens: Counter[str] = Counter()  # of requests with a constraint
        self.num_prepared = 0
        self.requests: list[Request] = []
        self.cancelled: list[str] = []

    def submit(self, request: Request) -> None:
        if not self._is_alive:
            raise EngineDeadError
        if self._is_stopping:
            raise EngineDrainingError
        if len(self._running) >= self._max_queue:
            raise QueueFullError
        self.requests.append(request)
        length = request.sampling.max_new_tokens
        answer = itertools.chain(self._script(request), itertools.repeat(_FILLER))
        self._running[request.id] = (request, itertools.islice(answer, length - 1))
        self._inbox.put(lambda: None)

    def cancel(self, request_id: str) -> None:
        if self._running.pop(request_id, None):
            self.cancelled.append(request_id)

    def stop(self) -> None:
        self._is_stopping = True
        self._inbox.put(lambda: None)

    def prepare_scores(self) -> None:
        self.num_prepared += 1

    def fail(self, error: Exception) -> None:
        """The next turn dies of this."""
        self._failure = error
        self._inbox.put(lambda: None)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=0,
            num_running=len(self._running),
            num_pages_used=len(self._running),
            num_pages=64,
            num_prefill_steps=0,
            num_decode_steps=0,
            is_alive=self._is_alive,
        )

    def run_turns(self, deliver: Deliver) -> None:
        while self._running or not self._is_stopping:
            if not self._running:
                self._inbox.get()
            if self._failure is not None:
                self._is_alive = False
                raise self._failure
            time.sleep(self._pause)
            deliver(Turn([self._told(*entry) for entry in list(self._running.values())]))

    def _told(self, request: Request, answer: Iterator[int]) -> TokenEvent:
        event = self._next(request, answer)
        number = request.sampling.num_prompt_logprobs
        if number is None or request.id in self._scored:
            return event
        self._scored.add(request.id)
        top = ((_FILLER, -1.5), (END, -2.5))[:number]
        told = (PromptLogprob(token, -token / 4, 3, top) for token in request.prompt[1:])
        return TokenEvent(
            event.request_id,
            event.token,
            event.logprob,
            event.finish_reason,
            top_logprobs=event.top_logprobs,
            prompt_logprobs=tuple(told),
        )

    def _next(self, request: Request, answer: Iterator[int]) -> TokenEvent:
        token = next(answer, None)
        if token is None:
            self._running.pop(request.id, None)
            return TokenEvent(request.id, _FILLER, finish_reason="length")
        constraint = request.constraint
        if constraint is not None:
            allowed = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
            if constraint.binds(self._num_tokens[request.id]) and not allowed[token]:
                token = int(allowed.argmax())
            self._num_tokens[request.id] += 1
            constraint.accept(token)
        reason: FinishReason | None = None
        if token in request.sampling.stop_token_ids:
            reason = "stop"
            self._running.pop(request.id, None)
        top = ((token, -0.5), (_FILLER, -1.5))[: request.sampling.num_logprobs]
        return TokenEvent(request.id, token, -0.5, reason, top_logprobs=top)


@asynccontextmanager
async def scripted_service(
    engine: Engine, model_dir: Path, *, limits: Limits = LIMITS
) -> AsyncIterator[Service]:
    """A service on this engine, its thread running."""
    bridge = Bridge()
    write_model_dir(model_dir)
    defaults = GenerationDefaults.from_directory(model_dir)
    service = Service(
        bridge=bridge,
        tokenizer=TOKENIZER,
        template=ChatTemplate.from_directory(model_dir, TOKENIZER),
        model_names=("tiny", "alias/of-tiny"),
        limits=limits,
        grammars=Grammars(TOKENIZER, defaults.stop_token_ids),
        defaults=defaults,
        metrics=Metrics(bridge.stats),
    )
    bridge.start(lambda: engine)
    while bridge.state == "starting":
        await asyncio.sleep(0.001)
    yield service
    if not bridge.ended.done():
        bridge.stop()
        await bridge.ended
