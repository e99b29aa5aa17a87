"""One answer as it is made: the engine's tokens through detokenizer, stop strings and parser.

Knows neither HTTP nor JSON.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from glm_jax.engine.request import PromptLogprob, TokenEvent
from serving import errors
from serving.bridge import News, Stream, TokenRun
from serving.detokenizer import Detokenizer, Piece, StopStrings
from serving.metrics import Metrics, Times
from serving.parsers import Delta, Parser, join

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class Usage:
    """Tokens of a request, and of its answer so far.

    Attributes:
      prompt_tokens: of the prompt.
      completion_tokens: generated, the one that ended the answer included.
      reasoning_tokens: of these, those of the reasoning.
      cached_tokens: of the prompt, those found in the cache.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token of an answer's text, and how likely it was.

    Attributes:
      token: the token id.
      logprob: its log-probability; None where there is none, as for a prompt's first token.
      top: the likeliest tokens there and their log-probabilities.
      is_reasoning: whether it belongs to the reasoning.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    is_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Finish:
    """How an answer ended.

    Attributes:
      reason: OpenAI's finish reason.
      stop: the stop string that ended it, or the stop token that the request itself named.
    """

    reason: FinishReason
    stop: str | int | None = None


class Part(NamedTuple):
    """What a step added to an answer; nothing at all when there was nothing for a while.

    Attributes:
      deltas: what can be shown now.
      tokens: what was sampled, when log-probabilities are wanted.
      finish: None while more is to come.
    """

    deltas: list[Delta]
    tokens: list[Sampled]
    finish: Finish | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the tokens of an answer are to be read.

    Attributes:
      detokenizer, stops, parser: what they pass through, in this order.
      includes_stop: whether the text of a token that ended the answer belongs to it.
      own_stops: stop tokens that the request named, beside the model's.
      keeps_tokens: whether parts tell their tokens.
      leaves_out_all: whether nothing of the answer is wanted, but its prompt's sake.
      echoed: the prompt's tokens, if parts tell them like the answer's.
    """

    detokenizer: Detokenizer
    stops: StopStrings
    parser: Parser
    includes_stop: bool
    own_stops: frozenset[int] = frozenset()
    keeps_tokens: bool = False
    leaves_out_all: bool = False
    echoed: tuple[int, ...] = ()

    @property
    def reads_runs(self) -> bool:
        """Whether tokens may be read several at a time: nothing looks at where one ends."""
        return not (self.stops.has_any or self.leaves_out_all)


class Answer:
    """Take its parts once, inside a `with`.

    Leaving the `with` early cancels the request.

    Attributes:
      usage: counts, final when the iteration has ended.
      finish: None until then.
      logprob: of all that was sampled so far, together.
      prompt_logprobs: of the prompt's tokens but the first, once there is a part, if they are wanted.

    Raises, while iterating:
      ApiError: 500, the engine failed; 503, it did not begin in time.
    """

    def __init__(
        self,
        stream: Stream,
        reading: Reading,
        usage: Usage,
        *,
        endpoint: str,
        arrived: float,
        metrics: Metrics,
    ) -> None:
        self.usage = usage
        self.finish: Finish | None = None
        self.logprob = 0.0
        self.prompt_logprobs: tuple[PromptLogprob, ...] = ()
        self._untold: list[Sampled] = []  # of an echo
        self._stream = stream
        self._reading = reading
        self._endpoint = endpoint
        self._times = Times(arrived=arrived)
        self._metrics = metrics

    @property
    def times(self) -> Times:
        """When its parts began."""
        return self._times

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, exception: BaseException | None, __: object) -> None:
        self._stream.close()
        left = "error" if isinstance(exception, Exception) else "cancelled"
        status = self.finish.reason if self.finish else left
        number = self.usage.completion_tokens
        self._metrics.finished(self._endpoint, status, self._times, number)
        logger.debug("%s: %s, %s", self._stream.request_id, status, self.usage)

    def nudge(self) -> None:
        """Makes the iteration yield now, with nothing if nothing has come."""
        self._stream.wake()

    async def parts(self, index: int = 0) -> AsyncGenerator[tuple[int, Part]]:
        """The parts as they come, each beside `index`; the last one has `finish`."""
        stream = self._stream
        while self.finish is None:
            news = stream.take()
            if not news:
                if stream.is_finished:
                    break
                await stream.wait()
                news = stream.take()
            self._observe(news)
            yield index, self._part(news)

    def _part(self, news: list[News]) -> Part:
        """What these news add."""
        tokens, self._untold = self._untold, []
        if len(news) == 1 and isinstance(run := news[0], TokenRun):  # as nearly always
            return Part(self._take_columns(run, tokens), tokens, self.finish)
        deltas: list[Delta] = []
        events: list[TokenEvent] = []
        for item in news:
            if isinstance(item, TokenEvent):
                events.append(item)
                continue
            if events:
                deltas += self._take_events(events, tokens)
                events = []
            if self.finish is None:
                deltas += self._take_columns(item, tokens)
        if events and self.finish is None:
            deltas += self._take_events(events, tokens)
        return Part(join(deltas) if len(deltas) > 1 else deltas, tokens, self.finish)

    def _take_columns(self, run: TokenRun, tokens: list[Sampled]) -> list[Delta]:
        """The deltas of a run: all at once where nothing need be known of any token but its text."""
        reading = self._reading
        if reading.reads_runs and not reading.keeps_tokens:
            meanings = map(reading.detokenizer.meanings.__getitem__, run.tokens)
            try:
                data = b"".join(meanings)  # type: ignore[arg-type]
            except TypeError:  # a tag is among them
                pass
            else:
                self._count(run.logprobs, is_reasoning=reading.parser.is_reasoning)
                return reading.parser.feed(reading.detokenizer.push_bytes(data))
        return self._take_events(run.events(self._stream.request_id), tokens)

    def _take_events(self, events: list[TokenEvent], tokens: list[Sampled]) -> list[Delta]:
        """The deltas of these events; tokens of mere text that follow each other are read as one."""
        deltas: list[Delta] = []
        run: list[TokenEvent] = []
        data: list[bytes] = []
        meanings, reads_runs = self._reading.detokenizer.meanings, self._reading.reads_runs
        for event in events:
            if event.finish_reason is None and reads_runs:
                meaning = meanings[event.token]  # type: ignore[index]
                if isinstance(meaning, bytes):
                    run.append(event)
                    data.append(meaning)
                    continue
            if run:
                deltas += self._take_run(run, data, tokens)
                run, data = [], []
            deltas += self._take(event, tokens)
            if self.finish is not None:
                break
        if run:
            deltas += self._take_run(run, data, tokens)
        return deltas

    def _observe(self, news: list[News]) -> None:
        number = 0
        for item in news:
            if isinstance(item, TokenRun):
                number += len(item.tokens)
            elif item.token is not None:  # only the last one can be
                number += 1
        if not number:
            return
        now, times = time.monotonic(), self._times
        if times.last is None:
            first, began = news[0], None
            if isinstance(first, TokenEvent):
                began = first.began
                self._look_at_prompt(first.prompt_logprobs)
            self._times = Times(arrived=times.arrived, began=began, first=now, last=now)
            self._metrics.first_token(self._times)
        else:
            self._metrics.next_tokens(number, now - times.last)
            times.last = now
        self._metrics.tokens(number)

    def _look_at_prompt(self, told: tuple[PromptLogprob, ...]) -> None:
        self.prompt_logprobs = told
        if echoed := self._reading.echoed:
            rest = [Sampled(each.token, each.logprob, each.top) for each in told]
            self._untold = [Sampled(echoed[0], None), *rest]

    def _take_run(
        self, run: list[TokenEvent], data: list[bytes], tokens: list[Sampled]
    ) -> list[Delta]:
        """The deltas of tokens that are nothing but these bytes, none of them the last."""
        reading = self._reading
        # Text alone never ends reasoning, so that what holds for one token holds for all.
        is_reasoning = reading.parser.is_reasoning
        self._count_events(run, is_reasoning)
        if reading.keeps_tokens:
            tokens += [_sampled(event, is_reasoning) for event in run]
        return reading.parser.feed(reading.detokenizer.push_bytes(b"".join(data)))

    def _count_events(self, events: list[TokenEvent], is_reasoning: bool) -> None:
        usage = self.usage
        if usage.prompt_tokens:
            usage.cached_tokens = max(usage.cached_tokens, events[0].num_cached_tokens)
        self._count([event.logprob for event in events], is_reasoning=is_reasoning)

    def _count(self, logprobs: Sequence[float], *, is_reasoning: bool) -> None:
        """Counts tokens, one for each log-probability."""
        self.usage.completion_tokens += len(logprobs)
        if is_reasoning:
            self.usage.reasoning_tokens += len(logprobs)
        self.logprob += sum(logprobs)

    def _take(self, event: TokenEvent, tokens: list[Sampled]) -> list[Delta]:
        """The deltas of one token; sets finish if it is the last."""
        if event.finish_reason == "timeout":
            raise errors.queue_timeout()
        if event.token is None:
            cause = event.error or "the server ended the request"
            raise errors.internal(f"The engine failed: {cause}.")
        reading, ended = self._reading, event.finish_reason
        if reading.leaves_out_all:
            self.finish = Finish("length")
            return []
        is_reasoning = reading.parser.is_reasoning
        self._count_events([event], is_reasoning)
        pieces: list[Piece] = []
        if ended != "stop" or reading.includes_stop:
            pieces = reading.detokenizer.push(event.token)
            if reading.keeps_tokens:
                tokens.append(_sampled(event, is_reasoning))
        if ended is not None:
            pieces = [*pieces, *reading.detokenizer.finish()]
        pieces = reading.stops.push(pieces)
        matched = reading.stops.matched
        if ended is not None and matched is None:
            pieces = [*pieces, *reading.stops.finish()]
        deltas = reading.parser.feed(pieces)
        is_stopped = matched is not None or reading.parser.has_all_calls
        if ended is not None or is_stopped:
            is_cut = ended == "length" and not is_stopped
            deltas += reading.parser.finish(is_cut=is_cut)
            reason: FinishReason = "tool_calls" if reading.parser.num_calls else "stop"
            own = event.token if ended == "stop" and event.token in reading.own_stops else None
            self.finish = Finish(
                "length" if is_cut else reason, own if matched is None else matched
            )
        return deltas


def _sampled(event: TokenEvent, is_reasoning: bool) -> Sampled:
    assert event.token is not None
    return Sampled(event.token, event.logprob, event.top_logprobs, is_reasoning)
