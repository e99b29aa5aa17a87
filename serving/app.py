"""The routes.

Knows neither models nor engines: a service answers, this module speaks HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from quart import Quart, Response, make_response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from serving import errors, formats, protocol, responses
from serving.errors import ApiError
from serving.formats import Format
from serving.protocol import ChatRequest, CompletionRequest
from serving.reply import Reply
from serving.service import Service

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20

_UNEXPECTED = "The server failed on this request; its log says why."

_SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # asks proxies not to collect events
}


def create_app(service: Service) -> Quart:
    """The ASGI application of one service."""
    app = Quart("serving")
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    _add_generation(app, service)
    _add_models(app, service)
    _add_health(app, service)
    _add_errors(app)
    return app


def _add_generation(app: Quart, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions() -> Response:
        return await _generate(service, CompletionRequest, service.complete)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return await _generate(service, ChatRequest, service.chat)


async def _generate[Body: protocol.GenerationRequest](
    service: Service,
    kind: type[Body],
    begin: Callable[..., Awaitable[tuple[Reply, Format]]],
) -> Response:
    arrived = time.monotonic()
    try:
        data = await request.get_data(cache=False, as_text=False, parse_form_data=False)
        body = protocol.parse(kind, data)
        reply, format = await begin(body, endpoint=request.path, arrived=arrived)
    except Exception:
        service.metrics.rejected(request.path)
        raise
    if body.stream:
        return await _stream(reply, format)
    with reply:
        choices = await reply.choices()
    return await _json(format.whole(choices, reply.usage))


async def _stream(reply: Reply, format: Format) -> Response:
    events = _events(reply, format)
    # Starts the generator: one that never ran could not clean up after itself if the client is
    # gone before the first event.
    await anext(events)
    response = await make_response(events, 200, _SSE_HEADERS)
    assert isinstance(response, Response)
    response.timeout = None  # Quart would cut the stream after a minute
    return response


async def _events(reply: Reply, format: Format) -> AsyncGenerator[bytes]:
    try:
        with reply:
            yield b""
            if first := format.first_events():
                yield first
            async with aclosing(reply.parts()) as parts:
                async for index, part in parts:
                    if events := format.part_events(index, part, reply.usage):
                        yield events
            yield format.last_events(reply.usage)
    except ApiError as error:
        yield format.error_events(error)
    except Exception as error:
        logger.error("stream %s failed", reply.id, exc_info=error)
        yield format.error_events(errors.internal(_UNEXPECTED))


def _add_models(app: Quart, service: Service) -> None:
    def model(name: str) -> dict[str, object]:
        return responses.model_object(name, service.created, service.limits.max_seq_len)

    @app.get("/v1/models")
    async def models() -> Response:
        return await _json({"object": "list", "data": list(map(model, service.model_names))})

    @app.get("/v1/models/<path:name>")
    async def one_model(name: str) -> Response:
        return await _json(model(service.model_name(name)))


def _add_health(app: Quart, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        return await _json({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        state = service.bridge.state
        return await _json({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        response = await make_response(service.metrics.exposition())
        response.headers["content-type"] = "text/plain; version=0.0.4; charset=utf-8"
        assert isinstance(response, Response)
        return response


def _add_errors(app: Quart) -> None:
    @app.errorhandler(ApiError)
    async def api_error(error: ApiError) -> Response:
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return await _json(error.body(), error.status, headers)

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        where = f"{request.method} {errors.shorten(request.path, 200)}"
        if isinstance(error, NotFound):
            found = ApiError(404, f"Unknown request URL: {where}.", code="unknown_url")
        elif isinstance(error, MethodNotAllowed):
            methods = ", ".join(sorted(set(error.valid_methods or ()) - {"OPTIONS", "HEAD"}))
            message = f"{where} is not allowed; use {methods}."
            found = ApiError(405, message, code="method_not_allowed")
        else:
            found = ApiError(error.code or 500, error.description or error.name)
        return await _json(found.body(), found.status)

    @app.errorhandler(Exception)
    async def unexpected(error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.path, exc_info=error)
        return await _json(errors.internal(_UNEXPECTED).body(), 500)


async def _json(
    value: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    response = await make_response(formats.to_json(value), status, headers or {})
    assert isinstance(response, Response)
    response.headers["content-type"] = "application/json"
    return response
