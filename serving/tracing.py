"""Traces of answers, for OpenTelemetry: a span a request, with the moments of its life.

Knows neither routes nor the engine: a visit that is over says all there is. It is imported only
where traces are asked for, since OpenTelemetry is an extra.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.gate import Visit
from serving.reply import Reply
from serving.wire import Wire

# What the conventions of generative AI call the endpoints.
_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}
# field of a request -> attribute
_ASKED = {
    "model": "gen_ai.request.model",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "n": "gen_ai.request.choice.count",
    "seed": "gen_ai.request.seed",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
}
_MOST = 2**63 - 1  # an attribute's integer; seeds may be larger


class Tracing:
    """Makes a span of every request for an answer, once it is over.

    A request with a `traceparent` belongs to that trace; what is sampled is OpenTelemetry's to
    decide, by its environment variables.

    Args:
      processor: takes the spans, in any thread.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({SERVICE_NAME: "glm-jax", SERVICE_VERSION: version("glm-jax")})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer("glm-jax", version("glm-jax"))
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, visit: Visit) -> None:
        """Tells of a visit that is over."""
        operation = _OPERATIONS.get(visit.path)
        if operation is None or visit.method != "POST":
            return
        asked = {} if visit.body is None else _asked(visit.body)
        name = " ".join(filter(None, (operation, asked.get("gen_ai.request.model"))))
        span = self._tracer.start_span(
            name,
            self._propagator.extract(visit.headers),
            SpanKind.SERVER,
            {"gen_ai.operation.name": operation, "gen_ai.provider.name": "glm-jax", **asked},
            start_time=visit.wall_time(visit.started),
        )
        span.set_attributes(
            {
                "http.request.method": visit.method,
                "http.response.status_code": visit.status,
                "url.path": visit.path,
                "glm.request_id": visit.id,
            }
        )
        if visit.reply is not None:
            _tell_of_reply(span, visit, visit.reply)
        if visit.status >= 400:
            span.set_attribute("error.type", str(visit.status))
        if visit.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(visit.wall_time(visit.ended))


def to_collector(endpoint: str) -> Tracing:
    """Traces to a collector that speaks OTLP over HTTP, at such a base address.

    The last ones are handed over when the process exits.

    Raises:
      ImportError: the exporter is not installed.
    """
    # Apart: tests make spans without it.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[import]
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    return Tracing(BatchSpanProcessor(exporter))


def _asked(body: Wire) -> dict[str, Any]:
    fields = body.model_dump(include=set(_ASKED), exclude_none=True)
    return {
        _ASKED[field]: value
        for field, value in fields.items()
        if not isinstance(value, int) or value <= _MOST
    }


def _tell_of_reply(span: Span, visit: Visit, reply: Reply) -> None:
    usage, reasons = reply.usage, reply.finish_reasons
    span.set_attributes(
        {
            "gen_ai.response.id": reply.id,
            "gen_ai.response.finish_reasons": [reason or "cancelled" for reason in reasons],
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        }
    )
    for index, times in enumerate(reply.times):
        # Each phase lasts until the next one begins.
        moments = [("queue", times.arrived), ("prefill", times.began), ("decode", times.first)]
        moments.append(("end", times.last))
        for name, moment in moments:
            if moment is not None:
                when = visit.wall_time(moment)
                span.add_event(name, {"gen_ai.choice.index": index}, timestamp=when)
        if times.first is not None:
            seconds = times.first - times.arrived
            span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
