"""The routes beside generation: models, tokens, health, metrics, profiles.

Knows neither models nor engines.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Annotated, Any, Protocol

from pydantic import Field
from quart import Quart, Response, make_response, request

from serving import anthropic, errors, protocol, responses, wire
from serving.anthropic import CountRequest
from serving.errors import ApiError
from serving.formats import to_json
from serving.protocol import ChatRequest
from serving.service import Service
from serving.wire import Wire


class Profiler(Protocol):
    """Records what the device does, from start to stop."""

    def start(self) -> None:
        """Raises RuntimeError when it has started already."""
        ...

    def stop(self) -> str:
        """Where the record is. Raises RuntimeError when it has not started."""
        ...


class TokenizeRequest(Wire):
    """POST /tokenize, of a text; of a conversation it takes what the chat endpoint takes."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Wire):
    """POST /detokenize."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=2**20)]
    model: str | None = None


def add_operations(app: Quart, service: Service, profiler: Profiler | None) -> None:
    """Adds the routes."""
    _add_models(app, service)
    _add_tokens(app, service)
    _add_health(app, service)
    _add_profiles(app, profiler)


def _add_models(app: Quart, service: Service) -> None:
    def model(name: str) -> dict[str, object]:
        return responses.model_object(name, service.created, service.limits.max_seq_len)

    @app.get("/v1/models")
    async def models() -> Response:
        return await json_response(
            {"object": "list", "data": list(map(model, service.model_names))}
        )

    @app.get("/v1/models/<path:name>")
    async def one_model(name: str) -> Response:
        return await json_response(model(service.model_name(name)))


def _add_tokens(app: Quart, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize() -> Response:
        data = await _data()
        fields = wire.json_object(data)
        if "messages" in fields:
            chat = wire.parse(ChatRequest, data, protocol.REFUSED_CHAT)
            service.model_name(chat.model)
            tokens = (await service.prompt(chat)).tokens
        else:
            body = wire.validate(TokenizeRequest, fields)
            service.model_name(body.model)
            special = body.add_special_tokens
            tokens = await asyncio.to_thread(
                service.tokenizer.encode, body.prompt, add_special_tokens=special
            )
        spelled = None
        if fields.get("return_token_strs"):
            spelled = [responses.token_text(service.tokenizer.spelling(token)) for token in tokens]
        return await json_response(
            {
                "count": len(tokens),
                "max_model_len": service.limits.max_seq_len,
                "tokens": list(tokens),
                "token_strs": spelled,
            }
        )

    @app.post("/detokenize")
    async def detokenize() -> Response:
        body = wire.parse(DetokenizeRequest, await _data(), {})
        service.model_name(body.model)
        if any(token >= service.tokenizer.size for token in body.tokens):
            most = service.tokenizer.size - 1
            message = f"Invalid 'tokens': token ids must be in 0 to {most}."
            raise errors.invalid("tokens", message)
        return await json_response({"prompt": service.tokenizer.decode(body.tokens)})

    @app.post("/v1/messages/count_tokens")
    async def count_tokens() -> Response:
        body = wire.parse(CountRequest, await _data(), anthropic.REFUSED)
        service.model_name(body.model)
        return await json_response(
            {"input_tokens": len((await service.prompt(body.chat())).tokens)}
        )


def _add_health(app: Quart, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        return await json_response({"status": "ok"})

    @app.get("/readyz")
    @app.get("/health")  # as other servers of models call it
    async def readyz() -> Response:
        state = service.bridge.state
        return await json_response({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        response = await make_response(service.metrics.exposition())
        response.headers["content-type"] = "text/plain; version=0.0.4; charset=utf-8"
        assert isinstance(response, Response)
        return response

    @app.get("/version")
    async def version_() -> Response:
        return await json_response({"version": version("glm-jax")})

    @app.get("/load")
    async def load() -> Response:
        stats = service.bridge.stats()
        fields: dict[str, Any] = {"server_load": 0, "running": 0, "waiting": 0}
        if stats is not None:
            fields["running"], fields["waiting"] = stats.num_running, stats.num_waiting
            fields["server_load"] = stats.num_running + stats.num_waiting
        return await json_response(fields)


def _add_profiles(app: Quart, profiler: Profiler | None) -> None:
    def active() -> Profiler:
        if profiler is None:
            message = "Profiles need a directory: start the server with --profile-dir."
            raise ApiError(400, message, code="profiling_off")
        return profiler

    @app.post("/start_profile")
    async def start_profile() -> Response:
        try:
            await asyncio.to_thread(active().start)
        except RuntimeError as error:
            raise ApiError(409, f"{error}.", code="profile_active") from error
        return await json_response({"status": "started"})

    @app.post("/stop_profile")
    async def stop_profile() -> Response:
        try:
            where = await asyncio.to_thread(active().stop)
        except RuntimeError as error:
            raise ApiError(409, f"{error}.", code="profile_inactive") from error
        return await json_response({"status": "stopped", "directory": where})


async def _data() -> bytes:
    return await request.get_data(cache=False, as_text=False, parse_form_data=False)


async def json_response(
    value: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A response with a JSON value."""
    response = await make_response(to_json(value), status, headers or {})
    assert isinstance(response, Response)
    response.headers["content-type"] = "application/json"
    return response
