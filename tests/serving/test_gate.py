"""Keys, origins, ids, limits, logs: what every request passes before its route, and after."""

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from typing import Any

import pytest

from glm_jax.engine.request import Request
from serving.app import HttpOptions, create_app
from serving.gate import Access
from tests.serving.scripted import END, ScriptedEngine, scripted_service, tokens

HI = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


def script(request: Request) -> list[int]:
    return [*tokens("ab"), END]


@asynccontextmanager
async def client_for(tmp_path, *, engine: ScriptedEngine | None = None, **options: Any):
    async with scripted_service(engine or ScriptedEngine(script), tmp_path) as service:
        yield create_app(service, HttpOptions(**options)).test_client()


KEYS = Access(api_keys=("first", "second é"))


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, None),
        ({"authorization": "Bearer "}, 401, None),
        ({"authorization": "Basic first"}, 401, None),
        ({"authorization": "Bearer third"}, 401, "invalid_api_key"),
        ({"authorization": "Bearer firs"}, 401, "invalid_api_key"),
        ({"x-api-key": "third"}, 401, "invalid_api_key"),
        ({"authorization": "Bearer first"}, 200, None),
        ({"authorization": "bearer first"}, 200, None),
        ({"authorization": "Bearer second é"}, 200, None),
        ({"x-api-key": "first"}, 200, None),
    ],
)
async def test_a_key_opens_and_nothing_else_does(tmp_path, headers, status, code):
    async with client_for(tmp_path, access=KEYS) as client:
        response = await client.post(CHAT, json={"messages": HI}, headers=headers)
        assert response.status_code == status
        if status == 401:
            error = (await response.get_json())["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", code)
            assert response.headers["www-authenticate"] == "Bearer"
            assert "first" not in error["message"]


async def test_probes_and_pages_need_no_key_and_everything_else_does(tmp_path):
    async with client_for(tmp_path, access=KEYS) as client:
        probes = ("/healthz", "/readyz", "/health", "/metrics", "/version")
        for path in ("/", "/docs", "/openapi.json", *probes):
            assert (await client.get(path)).status_code == 200, path
        for path in ("/v1/models", "/nowhere"):
            assert (await client.get(path)).status_code == 401, path
        for path in (CHAT, COMPLETIONS, MESSAGES, "/v1/responses", "/tokenize", "/start_profile"):
            assert (await client.post(path)).status_code == 401, path
        answer = await (await client.post(MESSAGES)).get_json()
        assert answer["error"]["type"] == "authentication_error"


async def test_an_id_comes_back_or_one_is_given(tmp_path):
    async with client_for(tmp_path) as client:
        for path, body in ((COMPLETIONS, {"prompt": "a"}), (COMPLETIONS, {}), ("/nowhere", {})):
            response = await client.post(path, json=body, headers={"x-request-id": "abc-1"})
            assert response.headers["x-request-id"] == "abc-1"
        for bad in ("with space", "x" * 201):
            response = await client.get("/healthz", headers={"x-request-id": bad})
            assert len(response.headers["x-request-id"]) == 32
        response = await client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
        assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("allowed", "origin", "may"),
    [
        ((), "https://a.example", False),
        (("https://a.example",), "https://a.example", True),
        (("https://a.example",), "https://b.example", False),
        (("*",), "https://b.example", True),
    ],
)
async def test_a_page_may_ask_if_its_origin_may(tmp_path, allowed, origin, may):
    access = Access(cors_origins=allowed, api_keys=("k",))
    async with client_for(tmp_path, access=access) as client:
        ask = {"origin": origin, "access-control-request-method": "POST"}
        response = await client.options(CHAT, headers=ask)
        assert response.headers.get("access-control-allow-origin") == (origin if may else None)
        assert (response.status_code == 204) == may
        headers = {"origin": origin, "authorization": "Bearer k"}
        response = await client.post(CHAT, json={"messages": HI}, headers=headers)
        assert response.status_code == 200
        assert response.headers.get("access-control-allow-origin") == (origin if may else None)


async def test_a_body_that_is_too_large_or_too_slow_is_refused(tmp_path):
    async with client_for(tmp_path, max_body_bytes=1000, body_timeout=0.05) as client:
        response = await client.post(CHAT, data=b"x" * 1001)
        assert response.status_code == 413
        error = (await response.get_json())["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "body_too_large")
        assert "up to" in error["message"]
        response = await client.post(MESSAGES, data=b"x" * 1001)
        assert (await response.get_json())["error"]["type"] == "request_too_large"
        async with client.request(CHAT, method="POST") as connection:
            await connection.send(b'{"messages":')
            await asyncio.sleep(0.2)
            await connection.send_complete()
            response = await connection.as_response()
        assert response.status_code == 408


async def test_a_silent_stream_says_that_it_lives(tmp_path):
    engine = ScriptedEngine(script, pause=0.12)
    async with client_for(tmp_path, engine=engine, keep_alive=0.04) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
        text = await response.get_data(as_text=True)
        assert text.count(": keep-alive\n\n") >= 3
        assert text.endswith("data: [DONE]\n\n")
        body = {"model": "tiny", "max_tokens": 9, "messages": HI, "stream": True}
        text = await (await client.post(MESSAGES, json=body)).get_data(as_text=True)
        assert text.count("event: ping\n") >= 3


async def test_a_lively_stream_says_nothing_besides(tmp_path):
    async with client_for(tmp_path, keep_alive=30) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "a", "stream": True})
        assert "keep-alive" not in await response.get_data(as_text=True)


async def test_every_request_is_a_line_of_json(tmp_path, caplog):
    access = Access(is_logged=True, api_keys=("k",))
    with caplog.at_level(logging.INFO, "serving.access"):
        async with client_for(tmp_path, access=access) as client:
            headers = {"authorization": "Bearer k", "x-request-id": "abc"}
            for stream in (False, True):
                body = {"prompt": "Hi", "stream": stream}
                response = await client.post(COMPLETIONS, json=body, headers=headers)
                await response.get_data()
            await client.get("/v1/models")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "serving.access"]
    whole, streamed, refused = lines
    for line in (whole, streamed):
        assert line["path"] == COMPLETIONS
        assert (line["request_id"], line["status"], line["method"]) == ("abc", 200, "POST")
        assert (line["prompt_tokens"], line["completion_tokens"]) == (2, 3)
        assert line["finish_reasons"] == ["stop"]
        assert line["bytes"] > 0
        assert line["seconds"] >= line["first_byte_seconds"] > 0
    assert refused["status"] == 401
    assert "prompt_tokens" not in refused
    assert "Bearer" not in caplog.text


class Recorder:
    def __init__(self) -> None:
        self.is_active = False

    def start(self) -> None:
        if self.is_active:
            raise RuntimeError("a profile is being recorded already")
        self.is_active = True

    def stop(self) -> str:
        if not self.is_active:
            raise RuntimeError("no profile is being recorded")
        self.is_active = False
        return "/there"


async def test_a_profile_is_recorded_once_at_a_time(tmp_path):
    async with scripted_service(ScriptedEngine(script), tmp_path) as service:
        client = create_app(service, profiler=Recorder()).test_client()
        for path, status in (
            ("/stop_profile", 409),
            ("/start_profile", 200),
            ("/start_profile", 409),
            ("/stop_profile", 200),
        ):
            response = await client.post(path)
            assert response.status_code == status, path
        assert (await response.get_json())["directory"] == "/there"
        off = create_app(service).test_client()
        assert (await off.post("/start_profile")).status_code == 400


async def test_texts_and_conversations_are_tokenized_and_back(tmp_path):
    async with client_for(tmp_path) as client:
        body = {"prompt": "hello <|user|>é", "return_token_strs": True}
        answer = await (await client.post("/tokenize", json=body)).get_json()
        assert answer["token_strs"][:3] == ["hello", " ", "<|user|>"]
        assert answer["count"] == len(answer["tokens"]) == 5
        assert answer["max_model_len"] == 4096
        body = {"tokens": answer["tokens"]}
        back = await (await client.post("/detokenize", json=body)).get_json()
        assert back == {"prompt": "hello <|user|>é"}
        answer = await (await client.post("/tokenize", json={"messages": HI})).get_json()
        asked = await (await client.post(CHAT, json={"messages": HI})).get_json()
        assert answer["count"] == asked["usage"]["prompt_tokens"]
        for path, body, param in (
            ("/detokenize", {"tokens": [10**6]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ):
            error = (await (await client.post(path, json=body)).get_json())["error"]
            assert error["param"] == param


async def test_the_load_is_told(tmp_path):
    async with client_for(tmp_path) as client:
        assert (await (await client.get("/load")).get_json())["server_load"] == 0
        assert "version" in await (await client.get("/version")).get_json()


async def test_pages_load_nothing_from_anywhere(tmp_path):
    async with client_for(tmp_path) as client:
        for path in ("/", "/docs"):
            response = await client.get(path)
            text = await response.get_data(as_text=True)
            assert response.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "http://" not in text
            assert "https://" not in text
            assert "innerHTML" not in text


async def test_the_description_names_every_route_and_every_field(tmp_path):
    async with client_for(tmp_path) as client:
        document = await (await client.get("/openapi.json")).get_json()
        assert document["openapi"].startswith("3.1")
        routes = {rule.rule for rule in client.app.url_map.iter_rules()}
        described = {path.replace("{name}", "<path:name>") for path in document["paths"]}
        pages = {"/", "/docs", "/metrics", "/openapi.json"}
        assert routes - pages == described
        chat = document["components"]["schemas"]["ChatRequest"]
        assert {"messages", "logit_bias", "response_format", "stop"} <= set(chat["properties"])
        assert chat["required"] == ["messages"]
