"""One answer as it is made: the engine's tokens through detokenizer, stop strings and parser.

Knows neither HTTP nor JSON.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Self

from glm_jax.engine.request import TokenEvent
from serving import errors
from serving.bridge import Stream
from serving.detokenizer import Detokenizer, Piece, StopStrings
from serving.metrics import Metrics
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
    """

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the tokens of an answer are to be read.

    Attributes:
      detokenizer, stops, parser: what they pass through, in this order.
      includes_stop: whether the text of a token that ended the answer belongs to it.
    """

    detokenizer: Detokenizer
    stops: StopStrings
    parser: Parser
    includes_stop: bool


class Answer:
    """Iterate it once, inside a `with`: lists of deltas come, and then `finish_reason` is set.

    Leaving the `with` early cancels the request.

    Attributes:
      id: the request's.
      usage: counts, final when the iteration has ended.
      finish_reason: None until then.

    Raises, while iterating:
      ApiError: 500, the engine failed.
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
        self.id = stream.request_id
        self.usage = usage
        self.finish_reason: FinishReason | None = None
        self._stream = stream
        self._reading = reading
        self._endpoint = endpoint
        self._arrived = arrived  # time.monotonic()
        self._last_token = arrived
        self._metrics = metrics

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, exception: BaseException | None, __: object) -> None:
        self._stream.close()
        left = "error" if isinstance(exception, Exception) else "cancelled"
        seconds = time.monotonic() - self._arrived
        status = self.finish_reason or left
        self._metrics.finished(self._endpoint, status, seconds)
        logger.debug("%s: %s after %.3f s, %s", self.id, status, seconds, self.usage)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        async for events in self._stream:
            self._observe(events)
            deltas: list[Delta] = []
            for event in events:
                deltas += self._take(event)
                if self.finish_reason is not None:
                    break
            if deltas:
                yield join(deltas) if len(deltas) > 1 else deltas
            if self.finish_reason is not None:
                break

    def _observe(self, events: list[TokenEvent]) -> None:
        number = sum(event.token is not None for event in events)
        if not number:
            return
        now = time.monotonic()
        since, self._last_token = now - self._last_token, now
        if self.usage.completion_tokens:
            self._metrics.next_tokens(number, since)
        else:
            self._metrics.first_token(since)
        self._metrics.tokens(number)

    def _take(self, event: TokenEvent) -> list[Delta]:
        """The deltas of one token; sets finish_reason if it is the last."""
        if event.token is None:
            cause = event.error or "the server ended the request"
            raise errors.internal(f"The engine failed: {cause}.")
        reading, ended = self._reading, event.finish_reason
        self.usage.completion_tokens += 1
        self.usage.reasoning_tokens += reading.parser.is_reasoning
        pieces: list[Piece] = []
        if ended != "stop" or reading.includes_stop:
            pieces = reading.detokenizer.push(event.token)
        if ended is not None:
            pieces = [*pieces, *reading.detokenizer.finish()]
        pieces = reading.stops.push(pieces)
        is_stopped = reading.stops.has_matched
        if ended is not None and not is_stopped:
            pieces = [*pieces, *reading.stops.finish()]
        deltas = reading.parser.feed(pieces)
        is_stopped = is_stopped or reading.parser.has_all_calls
        if ended is not None or is_stopped:
            is_cut = ended == "length" and not is_stopped
            deltas += reading.parser.finish(is_cut=is_cut)
            self.finish_reason = (
                "length" if is_cut else "tool_calls" if reading.parser.num_calls else "stop"
            )
        return deltas
