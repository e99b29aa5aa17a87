"""The routes of generation, and the application that holds all routes.

Knows neither models nor engines: a service answers, this module speaks HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from quart import Quart, Response, make_response, request
from werkzeug.exceptions import (
    HTTPException,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
)

from serving import anthropic, errors, openai_responses, protocol, wire
from serving.anthropic import MessagesRequest
from serving.anthropic_replies import error_body
from serving.errors import ApiError
from serving.formats import Format
from serving.gate import BODY, REFUSED, REPLY, Access, Gate, Observe
from serving.openai_responses import ResponsesRequest
from serving.operations import Profiler, add_operations, json_response
from serving.pages import add_pages
from serving.protocol import ChatRequest, CompletionRequest
from serving.reply import Reply
from serving.service import Service
from serving.wire import Refused, Wire

logger = logging.getLogger(__name__)

_UNEXPECTED = "The server failed on this request; its log says why."

_SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # asks proxies not to collect events
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """How the application behaves towards its clients.

    Attributes:
      access: who may ask.
      max_body_bytes: of a request.
      body_timeout: seconds in which a request's body must have come.
      keep_alive: seconds after which a stream that has nothing to say says so; 0: never.
      observe: told of every request once it is over.
    """

    access: Access = Access()
    max_body_bytes: int = 16 * 2**20
    body_timeout: float = 60.0
    keep_alive: float = 15.0
    observe: Observe | None = None


def create_app(
    service: Service, options: HttpOptions = HttpOptions(), profiler: Profiler | None = None
) -> Quart:
    """The ASGI application of one service."""
    app = Quart("serving", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = options.max_body_bytes
    app.config["BODY_TIMEOUT"] = options.body_timeout

    @app.before_request
    async def gate() -> None:
        if refusal := request.scope.get(REFUSED):  # type: ignore[attr-defined]
            raise refusal

    _add_generation(app, service, options.keep_alive)
    add_operations(app, service, profiler)
    add_pages(app)
    _add_errors(app)
    app.asgi_app = Gate(app.asgi_app, options.access, options.observe)  # type: ignore[assignment]
    return app


@dataclass(frozen=True, slots=True)
class Route[Body: Wire]:
    """How one endpoint generates.

    Attributes:
      kind, refused: the request's body.
      begin: what the service does with it.
    """

    kind: type[Body]
    refused: Refused
    begin: Callable[..., Awaitable[tuple[Reply, Format]]]


def _add_generation(app: Quart, service: Service, keep_alive: float) -> None:
    routes = {
        "/v1/completions": Route(CompletionRequest, protocol.REFUSED_COMPLETION, service.complete),
        "/v1/chat/completions": Route(ChatRequest, protocol.REFUSED_CHAT, service.chat),
        "/v1/responses": Route(ResponsesRequest, openai_responses.REFUSED, service.respond),
        "/v1/messages": Route(MessagesRequest, anthropic.REFUSED, service.messages),
    }

    async def generate() -> Response:
        return await _generate(service, routes[request.path], keep_alive)

    for path in routes:
        app.add_url_rule(path, path, generate, methods=["POST"])


async def _generate(service: Service, route: Route, keep_alive: float) -> Response:
    arrived = time.monotonic()
    try:
        data = await request.get_data(cache=False, as_text=False, parse_form_data=False)
        body = wire.parse(route.kind, data, route.refused)
        request.scope[BODY] = body  # type: ignore[typeddict-unknown-key]
        reply, format = await route.begin(body, endpoint=request.path, arrived=arrived)
    except Exception as error:
        reason = error.code if isinstance(error, ApiError) and error.retry_after else None
        service.metrics.rejected(request.path, reason)
        raise
    request.scope[REPLY] = reply  # type: ignore[typeddict-unknown-key]
    if body.stream:
        return await _stream(reply, format, keep_alive)
    with reply:
        choices = await reply.choices()
    return await json_response(format.whole(choices, reply.usage))


async def _stream(reply: Reply, format: Format, keep_alive: float) -> Response:
    events = _events(reply, format, keep_alive)
    # Starts the generator: one that never ran could not clean up after itself if the client is
    # gone before the first event.
    await anext(events)
    response = await make_response(events, 200, _SSE_HEADERS)
    assert isinstance(response, Response)
    response.timeout = None  # Quart would cut the stream after a minute
    return response


async def _events(reply: Reply, format: Format, keep_alive: float) -> AsyncGenerator[bytes]:
    pulse = Pulse(reply, keep_alive)
    try:
        with reply, pulse:
            yield b""
            if first := format.first_events(reply.usage):
                yield first
            async with aclosing(reply.parts()) as parts:
                async for index, part in parts:
                    events = format.part_events(index, part, reply.usage)
                    if events:
                        pulse.beat()
                        yield events
                    elif pulse.is_due:
                        pulse.beat()
                        yield format.keep_alive
            yield format.last_events(reply.usage)
    except ApiError as error:
        yield format.error_events(error)
    except Exception as error:
        logger.error("stream %s failed", reply.id, exc_info=error)
        yield format.error_events(errors.internal(_UNEXPECTED))


class Pulse:
    """Wakes a stream that has been silent for too long; one timer per interval, not per event."""

    def __init__(self, reply: Reply, seconds: float) -> None:
        self._reply = reply
        self._seconds = seconds
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_due(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._last >= self._seconds

    def beat(self) -> None:
        """Something was sent."""
        self._last = time.monotonic()

    def __enter__(self) -> None:
        self.beat()
        if self._seconds:
            self._wait(self._seconds)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        silent = time.monotonic() - self._last
        if silent >= self._seconds:
            self._reply.nudge()
            silent = 0.0
        self._wait(self._seconds - silent)


def _add_errors(app: Quart) -> None:
    @app.errorhandler(ApiError)
    async def api_error(error: ApiError) -> Response:
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return await _error(error, headers)

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        where = f"{request.method} {errors.shorten(request.path, 200)}"
        headers = {}
        if isinstance(error, NotFound):
            found = ApiError(404, f"Unknown request URL: {where}.", code="unknown_url")
        elif isinstance(error, MethodNotAllowed):
            methods = ", ".join(sorted(set(error.valid_methods or ()) - {"OPTIONS", "HEAD"}))
            message = f"{where} is not allowed; use {methods}."
            found = ApiError(405, message, code="method_not_allowed")
            headers["allow"] = methods
        elif isinstance(error, RequestEntityTooLarge):
            most = app.config["MAX_CONTENT_LENGTH"] / 2**20
            message = f"The body is too large: this server takes up to {most:g} MiB."
            found = ApiError(413, message, code="body_too_large")
        else:
            found = ApiError(error.code or 500, error.description or error.name)
        return await _error(found, headers)

    @app.errorhandler(Exception)
    async def unexpected(error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.path, exc_info=error)
        return await _error(errors.internal(_UNEXPECTED), {})


async def _error(error: ApiError, headers: dict[str, str]) -> Response:
    body = error.body()
    if request.path.startswith("/v1/messages"):
        body = error_body(error, request.scope.get("glm.request_id"))  # type: ignore[attr-defined]
    return await json_response(body, error.status, headers)
