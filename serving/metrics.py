"""What the server counts, for Prometheus.

Knows neither routes nor the engine's inside: answers report themselves, stats are read when asked.

Averages and rates are over a sliding window of the last WINDOW_SECONDS; they are zero when nothing
happened in it. The histograms hold the same for a Prometheus that does its own arithmetic.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glm_jax.engine.request import EngineStats

WINDOW_SECONDS = 60

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_TTFT_BUCKETS += (1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
# From 1 ms: a fast server lives below the first bucket of the usual ones.
_INTER_TOKEN_BUCKETS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)
_INTER_TOKEN_BUCKETS += (0.1, 0.2, 0.4, 1, 2.5, 5)
_LATENCY_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120)
_LATENCY_BUCKETS += (240, 480, 960)


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
        self._registry.register(_Gauges(stats, self._tokens, self._latencies, self._ttfts))
        self._startup_seconds = Gauge(
            "glm_startup_seconds",
            "What the start took, by phase; phases run side by side, total is all of them.",
            ["phase"],
            registry=self._registry,
        )
        # The status is a finish reason, or "cancelled", "error", "rejected".
        self._requests = Counter(
            "glm_request",
            "Requests that have ended, by how they did.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "glm_prompt_tokens", "Tokens of accepted prompts.", registry=self._registry
        )
        self._generation_tokens = Counter(
            "glm_generation_tokens", "Tokens generated.", registry=self._registry
        )
        self._ttft_seconds = Histogram(
            "glm_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self._inter_token_seconds = Histogram(
            "glm_inter_token_latency_seconds",
            "Between two tokens of a request.",
            buckets=_INTER_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._latency_seconds = Histogram(
            "glm_e2e_request_latency_seconds",
            "From the request's arrival to its end.",
            buckets=_LATENCY_BUCKETS,
            registry=self._registry,
        )

    def started(self, phase: str, seconds: float) -> None:
        """A phase of the start is over."""
        self._startup_seconds.labels(phase).set(seconds)

    def accepted(self, num_prompt_tokens: int) -> None:
        """The engine took a request."""
        self._prompt_tokens.inc(num_prompt_tokens)

    def first_token(self, seconds: float) -> None:
        """A request got its first token, so many seconds after it arrived."""
        self._ttfts.add(seconds)
        self._ttft_seconds.observe(seconds)

    def next_tokens(self, number: int, seconds: float) -> None:
        """A request got further tokens, so many seconds after the ones before."""
        for _ in range(number):
            self._inter_token_seconds.observe(seconds / number)

    def tokens(self, number: int) -> None:
        """Tokens of any request arrived."""
        self._tokens.add(number)
        self._generation_tokens.inc(number)

    def finished(self, endpoint: str, status: str, seconds: float) -> None:
        """An accepted request has ended; its latency counts if its answer is complete."""
        self._requests.labels(endpoint, status).inc()
        if status in ("cancelled", "error"):
            return
        self._latencies.add(seconds)
        self._latency_seconds.observe(seconds)

    def rejected(self, endpoint: str) -> None:
        """A request was answered with an error before the engine took it."""
        self._requests.labels(endpoint, "rejected").inc()

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
    ) -> None:
        self._stats = stats
        self._tokens = tokens
        self._latencies = latencies
        self._ttfts = ttfts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from self._gauges(stats)
        if stats is not None:
            yield from _totals(stats)

    def _gauges(self, stats: EngineStats | None) -> Iterator[Metric]:
        window = f"over the last {WINDOW_SECONDS} s"
        for name, help_, value in (
            ("tokens_per_second", f"Tokens generated per second, {window}.", self._per_second()),
            ("latency_avg_ms", f"Mean request latency, {window}.", 1e3 * self._latencies.mean()),
            ("ttft_avg_ms", f"Mean time to first token, {window}.", 1e3 * self._ttfts.mean()),
            ("queue_depth", "Requests waiting for a slot.", stats and stats.num_waiting),
            ("active_requests", "Requests in a slot.", stats and stats.num_running),
            ("kv_pages_used", "Pages of the KV cache in use.", stats and stats.num_pages_used),
            ("kv_pages_resting", "Pages kept as prefixes.", stats and stats.num_pages_resting),
            ("kv_pages", "Pages of the KV cache.", stats and stats.num_pages),
            ("engine_up", "1 while the engine runs.", stats and stats.is_alive),
        ):
            yield GaugeMetricFamily(f"glm_{name}", help_, value=float(value or 0))

    def _per_second(self) -> float:
        return self._tokens.per_second()


def _totals(stats: EngineStats) -> Iterator[Metric]:
    """What the engine has counted since its start."""
    for name, help_, value in (
        ("preemptions", "Requests that lost slot and pages to others.", stats.num_preemptions),
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
