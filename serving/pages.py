"""The pages: a chat at /, the API's description at /docs.

Knows no service: a page asks the API like any client.
"""

from __future__ import annotations

from importlib.resources import files

from quart import Quart, Response

from serving import openapi
from serving.operations import json_response

# A page loads nothing from anywhere, and nothing else may show it.
_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
}


def add_pages(app: Quart) -> None:
    """Adds the routes."""
    pages = files("serving") / "static"
    chat, docs = ((pages / name).read_bytes() for name in ("chat.html", "docs.html"))

    @app.get("/")
    async def chat_page() -> Response:
        return Response(chat, headers=_HEADERS)

    @app.get("/docs")
    async def docs_page() -> Response:
        return Response(docs, headers=_HEADERS)

    @app.get("/openapi.json")
    async def openapi_json() -> Response:
        return await json_response(openapi.document())
