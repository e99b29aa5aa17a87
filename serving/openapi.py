"""The API's description, as OpenAPI has it: made from the models that requests are parsed with.

Knows no service.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from serving.anthropic import CountRequest, MessagesRequest
from serving.openai_responses import ResponsesRequest
from serving.operations import DetokenizeRequest, TokenizeRequest
from serving.protocol import ChatRequest, CompletionRequest
from serving.wire import Wire

_REF = "#/components/schemas/"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": ["string", "null"]},
    },
}
_USAGE = {"type": "object"}
# Of a stream, OpenAPI 3.1 describes each event.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}

# path -> (summary, request model, what a whole answer must have, whether it streams too)
_POSTS: dict[str, tuple[str, type[Wire] | None, dict[str, Any], bool]] = {
    "/v1/chat/completions": (
        "The next message of a conversation",
        ChatRequest,
        {"id": {"type": "string"}, "object": {"const": "chat.completion"},
         "choices": {"type": "array"}, "usage": _USAGE},
        True,
    ),
    "/v1/completions": (
        "How texts go on",
        CompletionRequest,
        {"id": {"type": "string"}, "object": {"const": "text_completion"},
         "choices": {"type": "array"}, "usage": _USAGE},
        True,
    ),
    "/v1/responses": (
        "A response, as OpenAI's newer API has it",
        ResponsesRequest,
        {"id": {"type": "string"}, "object": {"const": "response"}, "output": {"type": "array"},
         "status": {"enum": ["completed", "incomplete"]}},
        True,
    ),
    "/v1/messages": (
        "The next message of a conversation, as Anthropic's API has it",
        MessagesRequest,
        {"id": {"type": "string"}, "type": {"const": "message"}, "content": {"type": "array"},
         "usage": _USAGE},
        True,
    ),
    "/v1/messages/count_tokens": (
        "Tokens of a conversation",
        CountRequest,
        {"input_tokens": {"type": "integer"}},
        False,
    ),
    "/tokenize": (
        "Tokens of a text; with messages in place of a prompt, of a conversation",
        TokenizeRequest,
        {"count": {"type": "integer"}, "tokens": {"type": "array", "items": {"type": "integer"}}},
        False,
    ),
    "/detokenize": ("The text of tokens", DetokenizeRequest, {"prompt": {"type": "string"}}, False),
    "/start_profile": (
        "Begins to record what the device does", None, {"status": {"const": "started"}}, False
    ),
    "/stop_profile": ("Ends the record", None, {"status": {"const": "stopped"}}, False),
}  # fmt: skip
_GETS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/models": (
        "The names of the model", {"object": {"const": "list"}, "data": {"type": "array"}}
    ),
    "/v1/models/{name}": (
        "One name of the model", {"id": {"type": "string"}, "object": {"const": "model"}}
    ),
    "/healthz": ("Whether the process is up", {"status": {"const": "ok"}}),
    "/readyz": ("Whether requests are answered", {"status": {"type": "string"}}),
    "/health": ("The same, by the name that other servers have for it", {"status": {"type": "string"}}),
    "/version": ("The server's version", {"version": {"type": "string"}}),
    "/load": ("Requests in work", {"server_load": {"type": "integer"}}),
}  # fmt: skip


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    kinds = [kind for _, kind, _, _ in _POSTS.values() if kind is not None]
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=_REF + "{model}"
    )
    paths: dict[str, Any] = {}
    for path, (summary, kind, fields, streams) in _POSTS.items():
        paths[path] = {"post": _operation(path, summary, fields, kind, streams)}
    for path, (summary, fields) in _GETS.items():
        paths[path] = {"get": _operation(path, summary, fields, None, False)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "glm-jax",
            "version": version("glm-jax"),
            "description": "GLM-4.7 in JAX. A parameter is honored, or refused with a 400 that names it.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(
    path: str, summary: str, fields: dict[str, Any], kind: type[Wire] | None, streams: bool
) -> dict[str, Any]:
    whole = {"type": "object", "required": list(fields), "properties": fields}
    content: dict[str, Any] = {"application/json": {"schema": whole}}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    error = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    refused = {"application/json": {"schema": {"$ref": _REF + error}}}
    operation: dict[str, Any] = {
        "operationId": path.strip("/").replace("/", "_").replace("{name}", "one"),
        "summary": summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": {"description": "The request is at fault", "content": refused},
            "503": {"description": "No requests are taken now", "content": refused},
        },
    }
    if path in ("/readyz", "/health"):
        operation["responses"]["503"]["content"] = content
    if kind is not None:
        schema = {"$ref": _REF + kind.__name__}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    if "{name}" in path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [name]
    return operation
