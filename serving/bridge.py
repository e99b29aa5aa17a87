"""Requests into the engine thread, token events out of it.

Knows neither text nor HTTP.

Two threads: the event loop's, where nearly everything here runs, and the engine's. Into the engine
go `submit` and `cancel`; out of it comes a turn per step with what it brought to all requests. The
engine's thread only puts it down; the loop sorts it into the streams. A stream that is left early,
for whatever reason, cancels its request.

Readers are woken all at once, and then the loop rests for some times as long as they took. Turns
that end meanwhile lie there until the next waking, and a reader then has all their tokens at one
go. With steps as long as a model's that never happens; but when they come faster than readers can
follow, reading costs a fixed share of the time and the text of an event grows instead. Turns of the
same requests are then sorted together: their columns become a run of tokens for each stream.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self

from glm_jax.engine.request import EngineDeadError, EngineStats, Request, TokenEvent, Turn

logger = logging.getLogger(__name__)

Deliver = Callable[[Turn], None]

# Rest between two wakings, as a multiple of the processor time that the readers took.
_REST = 1.0


class Engine(Protocol):
    """What the bridge needs of an engine. Any thread may call all but run."""

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def stop(self) -> None: ...

    def prepare_scores(self) -> None: ...

    def stats(self) -> EngineStats: ...

    def run_turns(self, deliver: Deliver) -> None: ...


class EngineStartingError(Exception):
    """The engine is not there yet; try again later."""


class CannotStartError(Exception):
    """The engine cannot start with what it was given; the message is for the user."""


class Bridge:
    """Runs one engine in a thread of its own.

    Attributes:
      ended: resolved when the engine's thread has ended: with None after `stop`, with the cause
        otherwise.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._streams: dict[str, Stream] = {}
        self._is_stopping = False
        self._turns: deque[Turn] = deque()  # the engine's thread appends
        self._is_told = False  # that there are turns, or will see them without being told
        self._is_waking = False  # or about to
        self._rests_until = 0.0  # time.monotonic()
        self.ended: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )

    @property
    def num_streams(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    @property
    def state(self) -> str:
        """One of "starting", "ready", "draining", "dead"."""
        if self.ended.done() and self.ended.result() is not None:
            return "dead"
        if self._is_stopping:
            return "draining"
        return "starting" if self._engine is None else "ready"

    def start(self, build: Callable[[], Engine]) -> None:
        """Starts the thread, which first builds the engine, however long that takes."""
        loop = asyncio.get_running_loop()
        # A daemon: what blocks in the device must not keep a process alive that wants to end.
        threading.Thread(target=self._run, args=(loop, build), name="engine", daemon=True).start()

    def stop(self) -> None:
        """Lets what runs finish and takes nothing new; `ended` resolves when that is done."""
        self._is_stopping = True
        if self._engine is not None:
            self._engine.stop()
        elif not self.ended.done():
            self.ended.set_result(None)

    def stats(self) -> EngineStats | None:
        """The engine's numbers; None before it is there."""
        return None if self._engine is None else self._engine.stats()

    async def prepare_scores(self) -> None:
        """Makes ready what requests with num_prompt_logprobs need; the first one may wait long for it.

        Others are served meanwhile.
        """
        if self._engine is not None:
            await asyncio.to_thread(self._engine.prepare_scores)

    def open(self, request: Request) -> Stream:
        """Submits a request.

        Raises:
          EngineStartingError: the engine is not there yet.
          QueueFullError, EngineDrainingError, EngineDeadError, ValueError: the engine's refusals.
        """
        if self._engine is None:
            raise EngineStartingError("the engine is starting")
        if self.ended.done():
            raise EngineDeadError(f"the engine has ended: {self.ended.result()}")
        self._engine.submit(request)
        stream = self._streams[request.id] = Stream(request.id, self._close)
        return stream

    def _close(self, stream: Stream) -> None:
        del self._streams[stream.request_id]
        if not stream.is_finished and self._engine is not None:
            self._engine.cancel(stream.request_id)

    def _put_down(self, loop: asyncio.AbstractEventLoop, turn: Turn) -> None:
        """On the engine's thread: the loop will come for it, or is told to."""
        self._turns.append(turn)
        if not self._is_told:
            self._is_told = True
            _call_soon(loop, self._wake_after_rest)

    def _wake_after_rest(self) -> None:
        if self._is_waking:
            return
        self._is_waking = True
        rest = self._rests_until - time.monotonic()
        if rest > 0:
            asyncio.get_running_loop().call_later(rest, self._wake)
        else:
            self._wake()

    def _wake(self) -> None:
        """Lets the readers of all streams with news take their turns."""
        started = time.thread_time()
        self._sort()
        for stream in self._streams.values():
            if stream.has_news:
                stream.wake()
        # Behind them in the loop's queue.
        asyncio.get_running_loop().call_soon(self._rest, started)

    def _rest(self, started: float) -> None:
        self._rests_until = time.monotonic() + _REST * (time.thread_time() - started)
        self._is_waking = self._is_told = False
        # Looked at last: who puts a turn down after this look finds that the loop is not told.
        if self._turns:
            self._is_told = True
            self._wake_after_rest()

    def _sort(self) -> None:
        """What was put down goes to its streams. One that was left early gets nothing."""
        find, turns = self._streams.get, self._turns
        alike: list[Turn] = []  # turns that follow each other, of the same requests
        while turns:
            turn = turns.popleft()
            if alike and turn.ids is not alike[0].ids:
                self._push_columns(alike)
                alike = []
            for event in turn.events:
                stream = find(event.request_id)
                if stream is not None:
                    stream.push(event)
            if turn.ids:
                alike.append(turn)
        if alike:
            self._push_columns(alike)

    def _push_columns(self, turns: list[Turn]) -> None:
        find = self._streams.get
        tokens = zip(*[turn.tokens for turn in turns], strict=True)
        logprobs = zip(*[turn.logprobs for turn in turns], strict=True)
        runs = map(TokenRun, tokens, logprobs)
        for request_id, run in zip(turns[0].ids, runs, strict=True):
            stream = find(request_id)
            if stream is not None:
                stream.push_run(run)

    def _run(self, loop: asyncio.AbstractEventLoop, build: Callable[[], Engine]) -> None:
        """The body of the engine's thread."""
        cause: BaseException | None = None
        try:
            engine = build()
        except CannotStartError as error:
            logger.critical("the engine cannot start: %s", error)
            _call_soon(loop, self._end, error)
            return
        except BaseException as error:
            logger.critical("the engine cannot start", exc_info=error)
            _call_soon(loop, self._end, error)
            return
        try:
            loop.call_soon_threadsafe(self._ready, engine)
            engine.run_turns(lambda turn: self._put_down(loop, turn))
        except BaseException as error:
            logger.critical("the engine died", exc_info=error)
            cause = error
        _call_soon(loop, self._end, cause)

    def _ready(self, engine: Engine) -> None:
        self._engine = engine
        if self._is_stopping:
            engine.stop()

    def _end(self, cause: BaseException | None) -> None:
        if cause is None and not self._is_stopping:
            cause = EngineDeadError("the engine ended of its own accord")
        if not self.ended.done():
            self.ended.set_result(cause)
        self._sort()
        # The engine ends its requests itself, unless it died of delivering.
        message = f"{type(cause).__name__}: {cause}" if cause else "the engine has ended"
        for stream in list(self._streams.values()):
            if not stream.is_finished:
                stream.push(
                    TokenEvent(stream.request_id, None, finish_reason="error", error=message)
                )
            stream.wake()


class TokenRun(NamedTuple):
    """Tokens of a request that follow each other, none of them its first or last.

    Attributes:
      tokens: token ids, one or more.
      logprobs: as many log-probabilities.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]

    def events(self, request_id: str) -> list[TokenEvent]:
        """The same as an event each."""
        return [
            TokenEvent(request_id, *pair) for pair in zip(self.tokens, self.logprobs, strict=True)
        ]


News = TokenEvent | TokenRun


class Stream:
    """What one request brings, as it comes; for one reader, who closes it.

    The reader takes all news since the last look at one go, and so catches up at once when it falls
    behind. What has the finish reason is the last.

    Attributes:
      is_finished: whether the last news have come, taken or not.
    """

    def __init__(self, request_id: str, close: Callable[[Stream], None]) -> None:
        self.request_id = request_id
        self.is_finished = False
        self._on_close = close
        self._is_closed = False
        self._news: list[News] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def has_news(self) -> bool:
        """Whether there is something that the reader has not taken."""
        return bool(self._news)

    def push(self, event: TokenEvent) -> None:
        """Adds an event; `wake` tells the reader."""
        self._news.append(event)
        if event.finish_reason is not None:
            self.is_finished = True

    def push_run(self, run: TokenRun) -> None:
        """Adds tokens; `wake` tells the reader."""
        self._news.append(run)

    def wake(self) -> None:
        """Makes the reader look, though nothing may have come."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Forgets the request, and cancels it if it has not finished; any number of times."""
        if not self._is_closed:
            self._is_closed = True
            self._on_close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> list[News]:
        """The news since the last look; often none."""
        news, self._news = self._news, []
        return news

    def wait(self) -> asyncio.Future[None]:
        """Done at the next `wake`; to be awaited where there is nothing to take, and more to come."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *values: object) -> None:
    try:
        loop.call_soon_threadsafe(call, *values)
    except RuntimeError:
        if not loop.is_closed():  # closed: the process is ending, and nobody listens
            raise
