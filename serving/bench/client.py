"""One request as a client sees it: when it was sent, when each piece came, how it ended.

Knows neither why requests are sent nor what is made of the times. Token counts are the server's,
from `usage`; they are never guessed, so an answer without them counts as an error.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from pydantic_core import from_json

from serving.bench.events import EventDecoder

# Below the keep-alive of the usual servers (uvicorn: 5 s), so that no request meets a closing one.
_KEEP_ALIVE_SECONDS = 4.0
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom to ask, and how patiently.

    Attributes:
      url: of the server, without the endpoint.
      path: of the endpoint.
      model: the model's name.
      api_key: sent as bearer token; "" sends none.
      timeout: seconds a whole request may take.
      stall_timeout: seconds without a byte after which a request is given up.
    """

    url: str
    path: str
    model: str
    api_key: str = ""
    timeout: float = 600.0
    stall_timeout: float = 60.0

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Sample:
    """One request, in seconds of time.perf_counter().

    Attributes:
      sent_at: just before it was sent.
      held_seconds: how long the client kept it back because of its own limit on concurrency.
      piece_times: when each event with a piece of the answer came.
      last_at: when the last event with a choice came.
      ended_at: when all was over.
      prompt_tokens, completion_tokens: as the server's usage says.
      error: kind of what went wrong; None when the answer is complete.
      detail: what exactly, for people.
    """

    sent_at: float = 0.0
    held_seconds: float = 0.0
    piece_times: list[float] = field(default_factory=list)
    last_at: float = 0.0
    ended_at: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    detail: str = ""


class _AnswerError(Exception):
    """The answer is not what was asked for."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail[:300]


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a limit on connections, which are kept between requests."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(
        total=target.timeout, sock_connect=target.stall_timeout, sock_read=target.stall_timeout
    )
    async with aiohttp.ClientSession(
        target.url.rstrip("/"), connector=connector, timeout=timeout, headers=target.headers
    ) as session:
        yield session


async def ask(session: aiohttp.ClientSession, target: Target, fields: dict[str, Any]) -> Sample:
    """Sends one streamed request and reads all of its answer; whatever happens is in the sample."""
    body = {
        "model": target.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    data = json.dumps(body).encode()
    sample = Sample()
    sample.sent_at = time.perf_counter()
    try:
        await _exchange(session, target.path, data, sample)
    except asyncio.CancelledError:
        sample.error, sample.detail = "unfinished", "the run ended before the answer did"
    except _AnswerError as error:
        sample.error, sample.detail = error.kind, error.detail
    except aiohttp.SocketTimeoutError:
        sample.error, sample.detail = "stalled", f"no byte for {target.stall_timeout:g} s"
    except TimeoutError:
        sample.error, sample.detail = "timeout", f"not complete within {target.timeout:g} s"
    except aiohttp.ClientConnectorError as error:
        sample.error, sample.detail = "refused", str(error)
    except (aiohttp.ClientError, OSError) as error:
        sample.error, sample.detail = "disconnected", f"{type(error).__name__}: {error}"
    sample.ended_at = time.perf_counter()
    return sample


async def _exchange(session: aiohttp.ClientSession, path: str, data: bytes, sample: Sample) -> None:
    headers = {"content-type": "application/json"}
    async with session.post(path, data=data, headers=headers) as response:
        if response.status != 200:
            text = (await response.read())[:1000].decode(errors="replace")
            raise _AnswerError(f"http {response.status}", text)
        decoder = EventDecoder()
        has_usage = is_done = False
        while received := await response.content.readany():
            now = time.perf_counter()
            for payload in decoder.feed(received):
                if payload == _DONE:
                    is_done = True
                else:
                    has_usage |= _take(sample, payload, now)
    if not is_done:
        raise _AnswerError("disconnected", "the stream ended before [DONE]")
    if not has_usage:
        raise _AnswerError("no usage", "the stream did not tell its tokens")
    if not sample.piece_times:
        raise _AnswerError("empty", f"{sample.completion_tokens} tokens, and not one event of text")


def _take(sample: Sample, payload: bytes, now: float) -> bool:
    """Takes one event in; whether it told the usage."""
    try:
        event = from_json(payload, cache_strings="keys")
    except ValueError:
        raise _AnswerError("malformed", f"no JSON: {payload[:200]!r}") from None
    if not isinstance(event, dict):
        raise _AnswerError("malformed", f"no object: {payload[:200]!r}")
    if event.get("error"):
        raise _AnswerError("error event", str(event["error"]))
    if choices := event.get("choices"):
        sample.last_at = now
        if _has_piece(choices[0]):
            sample.piece_times.append(now)
    usage = event.get("usage")
    if not usage:
        return False
    try:
        sample.prompt_tokens = int(usage["prompt_tokens"])
        sample.completion_tokens = int(usage["completion_tokens"])
    except (KeyError, TypeError, ValueError):
        raise _AnswerError("no usage", f"usage is {usage}") from None
    return True


def _has_piece(choice: dict[str, Any]) -> bool:
    # A chat stream opens with a role and no text, before any token: that is no first token.
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    return bool(
        delta
        and (
            delta.get("content")
            or delta.get("reasoning_content")
            or delta.get("reasoning")
            or delta.get("tool_calls")
        )
    )
