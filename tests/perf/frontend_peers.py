"""What the front end is measured against: servers that stream as many events and do little else.

Knows nothing of ours. `frontend.py` runs it, the FastAPI one in an environment that has it:

    python tests/perf/frontend_peers.py bare PORT      # Quart on Granian, every event ready-made
    python tests/perf/frontend_peers.py fastapi PORT   # FastAPI on uvicorn, every event dumped
"""
# pyright: reportMissingImports=false

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

WORDS = [" the", " a", " of", "ing", " and", " cat", "ly", " sat"]


def chunk(text: str | None, usage: dict[str, int] | None = None) -> dict[str, Any]:
    """The fields that our own stream has."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    return {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "object": "text_completion",
        "created": 1795534000,
        "model": "peer",
        "choices": [] if text is None else [choice],
        "usage": usage,
    }


def event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


READY_MADE = [event(chunk(word)) for word in WORDS]


def ending(body: dict[str, Any]) -> bytes:
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    return event(chunk(None, usage)) + b"data: [DONE]\n\n"


async def ready_made(body: dict[str, Any]) -> AsyncIterator[bytes]:
    for index in range(body["max_tokens"]):
        yield READY_MADE[index % len(READY_MADE)]
    yield ending(body)


async def dumped(body: dict[str, Any]) -> AsyncIterator[bytes]:
    for index in range(body["max_tokens"]):
        yield event(chunk(WORDS[index % len(WORDS)]))
    yield ending(body)


def bare(port: int) -> None:
    import uvloop
    from granian.constants import Interfaces
    from granian.log import LogLevels
    from granian.server.embed import Server
    from quart import Quart, Response, make_response, request

    app = Quart("bare")

    @app.post("/v1/completions")
    async def completions() -> Response:
        stream = ready_made(json.loads(await request.get_data()))
        response = await make_response(stream, 200, {"content-type": "text/event-stream"})
        assert isinstance(response, Response)
        response.timeout = None
        return response

    @app.get("/readyz")
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "peer"}]}

    async def serve() -> None:
        server = Server(
            app,
            address="127.0.0.1",
            port=port,
            interface=Interfaces.ASGI,
            websockets=False,
            backlog=2048,
            backpressure=8192,
            log_level=LogLevels.error,
        )
        await server.serve()

    uvloop.run(serve())


def fastapi(port: int) -> None:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        return StreamingResponse(dumped(await request.json()), media_type="text/event-stream")

    @app.get("/readyz")
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "peer"}]}

    config = uvicorn.Config(
        app, port=port, loop="uvloop", http="httptools", log_level="error", backlog=2048
    )
    asyncio.run(uvicorn.Server(config).serve())


if __name__ == "__main__":
    {"bare": bare, "fastapi": fastapi}[sys.argv[1]](int(sys.argv[2]))
