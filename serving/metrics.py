"""What the server counts, for Prometheus.

Knows neither routes nor the engine's inside: answers report themselves, stats are read when asked.

Averages and rates are over a sliding window of the last WINDOW_SECONDS; they are zero when nothing
happened in it. The histograms hold the same for a Prometheus that does its own arithmetic.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from glm_jax.engine.request import EngineStats

WINDOW_SECONDS = 60

# From 1 ms: a fast server lives below the first bucket of the usual ones.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_SECONDS += (1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640, 1280)
_INTER_TOKEN_SECONDS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)
_INTER_TOKEN_SECONDS += (0.1, 0.2, 0.4, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_TOKENS += (100_000, 200_000)
_CHOICES = (1, 2, 5, 10, 20)

# name -> (what it is, buckets); the names are vLLM's behind another prefix.
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token.", _SECONDS),
    "request_time_per_output_token_seconds": (
        "Mean time between an answer's tokens.",
        _INTER_TOKEN_SECONDS,
    ),
    "e2e_request_latency_seconds": ("From the request's arrival to its end.", _SECONDS),
    "request_queue_time_seconds": ("From the arrival to the first step.", _SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token.", _SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", _SECONDS),
    "request_inference_time_seconds": ("From the first step to the last token.", _SECONDS),
    "request_prompt_tokens": ("Tokens of prompts.", _TOKENS),
    "request_generation_tokens": ("Tokens of answers.", _TOKENS),
    "request_params_max_tokens": ("Tokens that answers may have.", _TOKENS),
    "request_params_n": ("Answers to a prompt.", _CHOICES),
}


@dataclass(slots=True, kw_only=True)
class Times:
    """When the parts of an answer began, in seconds of time.monotonic().

    Attributes:
      arrived: the request.
      began: its first step, if the engine told.
      first, last: its first token and its last one so far; None before there is one.
    """

    arrived: float
    began: float | None = None
    first: float | None = None
    last: float | None = None


class Window:
    """Sum and number of what was added in the last WINDOW_SECONDS, to the second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[list[float]] = deque()  # [second, sum, number], oldest first

    def add(self, value: float) -> None:
        second = int(self._clock())
        if not self._seconds or self._seconds[-1][0] != second:
            self._expire(second)
            self._seconds.append([second, 0.0, 0.0])
        latest = self._seconds[-1]
        latest[1] += value
        latest[2] += 1

    def mean(self) -> float:
        total, number = self._totals()
        return total / number if number else 0.0

    def per_second(self) -> float:
        """The sum per second since the oldest value in the window, one second at least."""
        total, _ = self._totals()
        if not self._seconds:
            return 0.0
        return total / max(1.0, min(WINDOW_SECONDS, self._clock() - self._seconds[0][0]))

    def _totals(self) -> tuple[float, float]:
        self._expire(int(self._clock()))
        return sum(entry[1] for entry in self._seconds), sum(entry[2] for entry in self._seconds)

    def _expire(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - WINDOW_SECONDS:
            self._seconds.popleft()


class Gaps:
    """The times between tokens: a histogram that takes the tokens of a step at once.

    The library's own takes one value at a time, under a lock; here is one thread, and every token
    passes.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._numbers = [0] * (len(_INTER_TOKEN_SECONDS) + 1)
        self._sum = 0.0

    def add(self, number: int, seconds: float) -> None:
        """So many tokens came together, so long after the ones before."""
        self._numbers[bisect_left(_INTER_TOKEN_SECONDS, seconds / number)] += number
        self._sum += seconds

    def families(self) -> Iterator[Metric]:
        bounds = [*map(float, _INTER_TOKEN_SECONDS), float("inf")]
        buckets = list(zip(map(floatToGoString, bounds), accumulate(self._numbers), strict=True))
        text = "Between two tokens of an answer."
        yield HistogramMetricFamily("glm_inter_token_latency_seconds", text, buckets, self._sum)
        text = "Tokens generated."
        yield CounterMetricFamily("glm_generation_tokens", text, value=self.num_tokens)


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
      stats: the engine's numbers now; None while there is no engine.
    """

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._latencies = Window()
        self._ttfts = Window()
        self._tokens = Window()
        self._gaps = Gaps()
        self._registry.register(
            _Gauges(stats, self._tokens, self._latencies, self._ttfts, self._gaps)
        )
        self._startup_seconds = Gauge(
            "glm_startup_seconds",
            "What the start took, by phase; phases run side by side, total is all of them.",
            ["phase"],
            registry=self._registry,
        )
        # The status is a finish reason, or "cancelled", "error", "rejected".
        self._requests = Counter(
            "glm_request",
            "Answers that have ended, and requests refused.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "glm_prompt_tokens", "Tokens of accepted prompts.", registry=self._registry
        )
        self._finished = Counter(
            "glm_request_success",
            "Complete answers, by how they ended.",
            ["finished_reason"],
            registry=self._registry,
        )
        self._rejections = Counter(
            "glm_admission_rejections",
            "Requests that were refused for the server's sake, by its reason.",
            ["reason"],
            registry=self._registry,
        )
        self._histograms = {
            name: Histogram(f"glm_{name}", text, buckets=buckets, registry=self._registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }

    def started(self, phase: str, seconds: float) -> None:
        """A phase of the start is over."""
        self._startup_seconds.labels(phase).set(seconds)

    def accepted(self, num_prompt_tokens: int, max_tokens: int = 0) -> None:
        """The engine took a request."""
        self._prompt_tokens.inc(num_prompt_tokens)
        self._observe("request_prompt_tokens", num_prompt_tokens)
        if max_tokens:
            self._observe("request_params_max_tokens", max_tokens)

    def asked(self, num_answers: int) -> None:
        """A prompt is to have so many answers."""
        self._observe("request_params_n", num_answers)

    def first_token(self, times: Times) -> None:
        """An answer got its first token."""
        assert times.first is not None
        self._ttfts.add(times.first - times.arrived)
        self._observe("time_to_first_token_seconds", times.first - times.arrived)
        if times.began is not None:
            self._observe("request_queue_time_seconds", times.began - times.arrived)
            self._observe("request_prefill_time_seconds", times.first - times.began)

    def next_tokens(self, number: int, seconds: float) -> None:
        """An answer got further tokens, so many seconds after the ones before."""
        self._gaps.add(number, seconds)

    def tokens(self, number: int) -> None:
        """Tokens of any answer arrived."""
        self._tokens.add(number)
        self._gaps.num_tokens += number

    def finished(self, endpoint: str, status: str, times: Times, num_tokens: int = 0) -> None:
        """An answer has ended with so many tokens; its times count if it is complete."""
        self._requests.labels(endpoint, status).inc()
        if status in ("cancelled", "error"):
            return
        self._finished.labels(status).inc()
        seconds = time.monotonic() - times.arrived
        self._latencies.add(seconds)
        self._observe("e2e_request_latency_seconds", seconds)
        self._observe("request_generation_tokens", num_tokens)
        if times.first is None or times.last is None:
            return
        decoding = times.last - times.first
        self._observe("request_decode_time_seconds", decoding)
        if num_tokens > 1:
            self._observe("request_time_per_output_token_seconds", decoding / (num_tokens - 1))
        if times.began is not None:
            self._observe("request_inference_time_seconds", times.last - times.began)

    def rejected(self, endpoint: str, reason: str | None = None) -> None:
        """A request was answered with an error before the engine took it.

        Args:
          reason: the error's code, where the server and not the request is at fault.
        """
        self._requests.labels(endpoint, "rejected").inc()
        if reason is not None:
            self._rejections.labels(reason).inc()

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """What is read at the moment of asking."""

    def __init__(
        self,
        stats: Callable[[], EngineStats | None],
        tokens: Window,
        latencies: Window,
        ttfts: Window,
        gaps: Gaps,
    ) -> None:
        self._stats = stats
        self._tokens = tokens
        self._latencies = latencies
        self._ttfts = ttfts
        self._gaps = gaps

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from self._gauges(stats)
        yield from self._gaps.families()
        if stats is not None:
            yield from _totals(stats)

    def _gauges(self, stats: EngineStats | None) -> Iterator[Metric]:
        window = f"over the last {WINDOW_SECONDS} s"
        for name, help_, value in (
            ("tokens_per_second", f"Tokens generated per second, {window}.", self._per_second()),
            ("latency_avg_ms", f"Mean request latency, {window}.", 1e3 * self._latencies.mean()),
            ("ttft_avg_ms", f"Mean time to first token, {window}.", 1e3 * self._ttfts.mean()),
            ("queue_depth", "Requests waiting for a slot.", stats and stats.num_waiting),
            ("num_requests_waiting", "Requests waiting for a slot.", stats and stats.num_waiting),
            ("active_requests", "Requests in a slot.", stats and stats.num_running),
            ("num_requests_running", "Requests in a slot.", stats and stats.num_running),
            ("kv_pages_used", "Pages of the KV cache in use.", stats and stats.num_pages_used),
            ("kv_pages_resting", "Pages kept as prefixes.", stats and stats.num_pages_resting),
            ("kv_pages", "Pages of the KV cache.", stats and stats.num_pages),
            ("kv_cache_usage_perc", "Share of the pages in use.", stats and _usage(stats)),
            ("engine_up", "1 while the engine runs.", stats and stats.is_alive),
        ):
            yield GaugeMetricFamily(f"glm_{name}", help_, value=float(value or 0))

    def _per_second(self) -> float:
        return self._tokens.per_second()


def _usage(stats: EngineStats) -> float:
    return stats.num_pages_used / stats.num_pages


def _totals(stats: EngineStats) -> Iterator[Metric]:
    """What the engine has counted since its start."""
    for name, help_, value in (
        ("preemptions", "Requests that lost slot and pages to others.", stats.num_preemptions),
        ("num_preemptions", "The same by vLLM's name.", stats.num_preemptions),
        ("queue_timeouts", "Requests that had not begun by their deadline.", stats.num_timeouts),
        (
            "prefix_cache_queries",
            "Tokens of prompts looked up in the cache; also of preempted requests that go on.",
            stats.num_admitted_tokens,
        ),
        ("prefix_cache_hits", "Of these, tokens found there.", stats.num_cached_tokens),
        ("prefix_cache_evictions", "Pages whose prefix was given up.", stats.num_evicted),
        (
            "integrity_checks",
            "Times that the account of slots and pages was checked.",
            stats.num_integrity_checks,
        ),
        ("integrity_check_seconds", "What these checks took.", stats.integrity_seconds),
    ):
        yield CounterMetricFamily(f"glm_{name}", help_, value=float(value))
    if len(stats.num_gained) > 1:
        yield from _speculation(stats)
    for name, help_, prefill, decode in (
        ("steps", "Steps dispatched.", stats.num_prefill_steps, stats.num_decode_steps),
        ("step_tokens", "Tokens fed.", stats.num_prefill_tokens, stats.num_decode_tokens),
        (
            "step_padding_tokens",
            "Tokens computed for nothing, to fill a compiled shape.",
            stats.num_prefill_padding,
            stats.num_decode_padding,
        ),
    ):
        family = CounterMetricFamily(f"glm_{name}", help_, labels=["phase"])
        family.add_metric(["prefill"], prefill)
        family.add_metric(["decode"], decode)
        yield family


def _speculation(stats: EngineStats) -> Iterator[Metric]:
    """Guesses by what became of them, by vLLM's names; position 0 is the first guess of a step."""
    drafted, accepted = stats.num_offered[1:], stats.num_gained[1:]
    for name, help_, value in (
        ("num_drafts", "Times that tokens of an answer were guessed.", drafted[0]),
        ("num_draft_tokens", "Tokens guessed.", sum(drafted)),
        ("num_accepted_tokens", "Of these, tokens of the answer.", sum(accepted)),
    ):
        yield CounterMetricFamily(f"glm_spec_decode_{name}", help_, value=float(value))
    family = CounterMetricFamily(
        "glm_spec_decode_num_accepted_tokens_per_pos",
        "Guesses that were right, by position.",
        labels=["position"],
    )
    for position, number in enumerate(accepted):
        family.add_metric([str(position)], float(number))
    yield family
