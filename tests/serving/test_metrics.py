"""What is counted, and over which time."""

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from glm_jax.engine.request import EngineStats
from serving.metrics import WINDOW_SECONDS, Metrics, Window

STATS = EngineStats(
    num_waiting=3,
    num_running=2,
    num_pages_used=5,
    num_pages=9,
    num_prefill_steps=0,
    num_decode_steps=0,
    is_alive=True,
)


def values(metrics: Metrics) -> dict[str, float]:
    text = metrics.exposition().decode()
    return {
        sample.name + "".join(f"/{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_window_forgets_what_is_older():
    clock = Clock()
    window = Window(clock)
    assert window.mean() == window.per_second() == 0.0
    window.add(10)
    clock.now += WINDOW_SECONDS / 2
    window.add(20)
    window.add(30)
    assert window.mean() == 20
    clock.now += WINDOW_SECONDS / 2
    assert window.mean() == 25
    clock.now += WINDOW_SECONDS
    assert window.mean() == window.per_second() == 0.0


def test_a_rate_counts_the_time_since_the_oldest_value():
    clock = Clock()
    window = Window(clock)
    window.add(100)
    assert window.per_second() == 100
    clock.now += 10
    window.add(100)
    assert window.per_second() == 20


def test_gauges_are_the_engines_numbers_now():
    found = values(Metrics(lambda: STATS))
    assert found["glm_queue_depth"] == 3
    assert found["glm_active_requests"] == 2
    assert found["glm_kv_pages_used"] == 5
    assert found["glm_kv_pages"] == 9
    assert found["glm_engine_up"] == 1
    assert values(Metrics(lambda: None))["glm_engine_up"] == 0


def test_requests_are_counted_by_endpoint_and_end():
    metrics = Metrics(lambda: STATS)
    metrics.accepted(7)
    metrics.first_token(0.5)
    metrics.next_tokens(2, 0.2)
    metrics.tokens(3)
    metrics.finished("/v1/completions", "stop", 2.0)
    metrics.finished("/v1/completions", "cancelled", 9.0)
    metrics.rejected("/v1/completions")
    found = values(metrics)
    for status in ("stop", "cancelled", "rejected"):
        assert found[f"glm_request_total//v1/completions/{status}"] == 1
    assert found["glm_latency_avg_ms"] == 2000
    assert found["glm_ttft_avg_ms"] == 500
    assert found["glm_tokens_per_second"] == 3
    assert found["glm_prompt_tokens_total"] == 7
    assert found["glm_generation_tokens_total"] == 3
    assert found["glm_inter_token_latency_seconds_count"] == 2
    assert found["glm_e2e_request_latency_seconds_count"] == 1


def test_the_start_is_told_by_phase():
    metrics = Metrics(lambda: None)
    metrics.started("load", 0.5)
    metrics.started("total", 2.0)
    assert values(metrics)["glm_startup_seconds/load"] == 0.5
    assert values(metrics)["glm_startup_seconds/total"] == 2.0


def test_what_the_engine_counts_is_told_as_totals():
    counted = {
        "num_preemptions": 4,
        "num_timeouts": 2,
        "num_admitted_tokens": 90,
        "num_cached_tokens": 64,
        "num_evicted": 7,
        "num_prefill_tokens": 26,
        "num_decode_padding": 3,
        "num_integrity_checks": 5,
        "integrity_seconds": 0.25,
    }
    seen = values(Metrics(lambda: replace(STATS, **counted)))
    assert {name: seen[f"glm_{name}"] for name in EXPECTED_TOTALS} == EXPECTED_TOTALS


EXPECTED_TOTALS = {
    "preemptions_total": 4,
    "queue_timeouts_total": 2,
    "prefix_cache_queries_total": 90,
    "prefix_cache_hits_total": 64,
    "prefix_cache_evictions_total": 7,
    "step_tokens_total/prefill": 26,
    "step_padding_tokens_total/decode": 3,
    "integrity_checks_total": 5,
    "integrity_check_seconds_total": 0.25,
}
