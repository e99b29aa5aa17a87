"""What every request passes before its route: request ids, API keys, CORS, and the access log.

Knows no route but which are open to all. It wraps the application, so that it also sees the end of a
stream.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from serving import errors
from serving.errors import ApiError
from serving.reply import Reply
from serving.wire import Wire

access_log = logging.getLogger("serving.access")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Probes, numbers and pages; everything else needs a key where there are keys.
_OPEN = frozenset("/ /docs /healthz /readyz /health /metrics /openapi.json /version /load".split())

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,200}")
# Where a route leaves what it was asked and what it answers, for the access log and traces.
BODY = "glm.body"
REPLY = "glm.reply"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may ask, and what is told of it.

    Attributes:
      api_keys: any of them opens; none: open to all.
      cors_origins: origins whose pages may ask; "*": any.
      is_logged: whether every request becomes a line of the access log.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    is_logged: bool = False


# Told of a visit that is over.
Observe = Callable[["Visit"], None]


class Gate:
    """An ASGI application in front of another one.

    Args:
      observe: told of every visit once it is over.
    """

    def __init__(self, app: Application, access: Access, observe: Observe | None = None) -> None:
        self._app = app
        self._access = access
        self._observe = observe
        self._digests = [_digest(key.encode()) for key in access.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))
        visit = Visit(scope, headers.get(b"x-request-id", b""), self._origin(headers))
        passed_on = visit.sending(send)
        if visit.origin and scope["method"] == "OPTIONS":
            await _answer(passed_on, 204, _PREFLIGHT, b"")
        elif error := self._refusal(scope["path"], headers):
            scope[REFUSED] = error
            await self._app(scope, receive, passed_on)
        else:
            await self._app(scope, receive, passed_on)
        visit.ended = time.monotonic()
        if self._access.is_logged:
            access_log.info("%s", json.dumps(visit.record()))
        if self._observe is not None:
            self._observe(visit)

    def _origin(self, headers: dict[bytes, bytes]) -> bytes | None:
        """The origin to be told that it may ask."""
        origin = headers.get(b"origin")
        allowed = self._access.cors_origins
        if origin is None or not ("*" in allowed or origin.decode("latin-1") in allowed):
            return None
        return origin

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if not self._digests or path in _OPEN:
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            key = headers.get(b"x-api-key", b"")
        if not key:
            return errors.unauthorized(None)
        # Every key is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(_digest(key.strip()), known) for known in self._digests]
        return None if any(matches) else errors.unauthorized("invalid_api_key")


# Where a route finds that its request is refused.
REFUSED = "glm.refused"

_PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (b"access-control-allow-headers", b"*, authorization"),
    (b"access-control-max-age", b"600"),
]


class Visit:
    """One request on its way.

    Attributes:
      id: of the request.
      origin: the origin that is told that it may ask; None: no page does.
      status: of the answer; 0 before there is one.
      started, ended: when it came and when it was over, in seconds of time.monotonic().
    """

    def __init__(self, scope: Scope, asked_id: bytes, origin: bytes | None) -> None:
        is_fit = _REQUEST_ID.fullmatch(asked_id)
        self.id = asked_id.decode() if is_fit else secrets.token_hex(16)
        scope["glm.request_id"] = self.id
        self._scope = scope
        self.origin = origin
        self.started = self.ended = time.monotonic()
        self._clock_offset = time.time() - self.started
        self.status = 0
        self._first_byte: float | None = None
        self._num_bytes = 0

    @property
    def method(self) -> str:
        return self._scope["method"]

    @property
    def path(self) -> str:
        return self._scope["path"]

    @property
    def headers(self) -> dict[str, str]:
        return {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in self._scope["headers"]
        }

    @property
    def body(self) -> Wire | None:
        """What was asked, if it was for an answer."""
        return self._scope.get(BODY)

    @property
    def reply(self) -> Reply | None:
        """What was answered, if anything was."""
        return self._scope.get(REPLY)

    def wall_time(self, moment: float) -> int:
        """Nanoseconds since 1970, of a moment in seconds of time.monotonic()."""
        return round(1e9 * (moment + self._clock_offset))

    def sending(self, send: Send) -> Send:
        """`send` with the headers that every answer has, watched."""

        def watched(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers()]
            elif message["type"] == "http.response.body":
                body = message.get("body", b"")
                if body and self._first_byte is None:
                    self._first_byte = time.monotonic()
                self._num_bytes += len(body)
            return send(message)

        return watched

    def _headers(self) -> Iterable[tuple[bytes, bytes]]:
        yield b"x-request-id", self.id.encode()
        if self._scope["path"].startswith("/v1/messages"):
            yield b"request-id", self.id.encode()
        if self.origin:
            yield b"access-control-allow-origin", self.origin
            yield b"access-control-expose-headers", b"x-request-id, retry-after"
            yield b"vary", b"origin"

    def record(self) -> dict[str, Any]:
        """What the access log tells."""
        client = self._scope.get("client")
        fields: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.id,
            "client": client[0] if client else None,
            "method": self._scope["method"],
            "path": errors.shorten(self._scope["path"], 200),
            "status": self.status,
            "bytes": self._num_bytes,
            "seconds": round(self.ended - self.started, 6),
        }
        if self._first_byte is not None:
            fields["first_byte_seconds"] = round(self._first_byte - self.started, 6)
        if (reply := self.reply) is not None:
            usage = reply.usage
            fields |= {
                "answer": reply.id,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "finish_reasons": reply.finish_reasons,
            }
        return fields


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
