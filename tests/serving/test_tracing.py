"""Traces: a span for every request for an answer, in the trace of who asked; nothing without the flag."""

import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from serving.__main__ import main
from serving.app import HttpOptions, create_app
from serving.tracing import Tracing
from tests.serving.model_dir import write_model_dir
from tests.serving.scripted import END, ScriptedEngine, scripted_service, tokens

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def spans_of(
    tmp_path, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[ReadableSpan, ...]:
    """The spans of one request."""
    exporter = InMemorySpanExporter()
    observe = Tracing(SimpleSpanProcessor(exporter))
    engine = ScriptedEngine(lambda request: [*tokens("hello there"), END], pause=0.002)
    async with scripted_service(engine, tmp_path) as service:
        app = create_app(service, HttpOptions(observe=observe))
        response = await app.test_client().post(path, json=body, headers=headers)
        await response.get_data()
        await app.test_client().get("/healthz")
    return exporter.get_finished_spans()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_a_span_of_the_trace_it_was_asked_in(tmp_path, stream):
    body = {"model": "tiny", "messages": MESSAGES, "reasoning_effort": "none", "stream": stream}
    body |= {"temperature": 0.5, "top_k": 3, "max_tokens": 20, "seed": 2**63}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "abc"}
    [span] = await spans_of(tmp_path, CHAT, body, headers)
    assert (span.name, span.kind) == ("chat tiny", SpanKind.SERVER)
    assert span.context is not None and span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    told = dict(span.attributes or {})
    assert str(told.pop("gen_ai.response.id")).startswith("chatcmpl-")
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") < 5  # type: ignore[operator]
    assert told.pop("gen_ai.usage.input_tokens") > 2  # type: ignore[operator]
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "glm-jax",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.max_tokens": 20,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.output_tokens": len(tokens("hello there")) + 1,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": CHAT,
        "glm.request_id": "abc",
    }
    moments = [event.timestamp for event in span.events]
    assert [event.name for event in span.events] == ["queue", "decode", "end"]
    assert span.start_time is not None and span.end_time is not None
    times = [span.start_time, *moments, span.end_time]
    assert times == sorted(times)
    assert moments[-1] - moments[1] > 4e6  # nanoseconds: two pauses of the engine at least


async def test_each_answer_of_several_has_its_events_and_begins_a_trace_of_its_own(tmp_path):
    [span] = await spans_of(tmp_path, COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 4})
    assert span.parent is None and span.name == "text_completion"
    choices = [(e.attributes or {})["gen_ai.choice.index"] for e in span.events]
    assert choices == [0, 0, 0, 1, 1, 1]
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("length", "length")


async def test_what_is_refused_is_a_span_too(tmp_path):
    [span] = await spans_of(tmp_path, COMPLETIONS, {"prompt": 5})
    told = span.attributes or {}
    assert (told["http.response.status_code"], told["error.type"]) == (400, "400")
    assert span.status.is_unset and not span.events


def test_without_the_flag_nothing_of_it_is_imported():
    script = "import sys, serving.__main__, serving.app; print('opentelemetry' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert told.stdout == "False\n"


def test_asked_for_and_not_installed_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    model_dir = str(write_model_dir(tmp_path / "tiny"))
    flags = ["serve", "--mock", "--model-dir", model_dir, "--otlp-endpoint", "http://127.0.0.1:9"]
    told = CliRunner().invoke(main, flags)
    assert told.exit_code == 2
    assert "--otlp-endpoint needs the packages of the extra otel" in told.output
