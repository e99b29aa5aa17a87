"""What is counted, and over which time."""

import json
import re
import time
from dataclasses import replace
from importlib.resources import files

import pytest
from prometheus_client.parser import text_string_to_metric_families

from glm_jax.engine.request import EngineStats
from serving.app import create_app
from serving.metrics import WINDOW_SECONDS, Metrics, Times, Window
from tests.serving.scripted import END, ScriptedEngine, scripted_service, tokens

STATS = EngineStats(
    num_waiting=3,
    num_running=2,
    num_pages_used=5,
    num_pages=9,
    num_prefill_steps=0,
    num_decode_steps=0,
    is_alive=True,
    num_cached_tokens=7,
    num_preemptions=4,
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
    assert found["glm_kv_cache_usage_perc"] == pytest.approx(5 / 9)
    assert found["glm_prefix_cache_hits_total"] == 7
    assert found["glm_num_preemptions_total"] == 4
    assert found["glm_engine_up"] == 1
    assert values(Metrics(lambda: None))["glm_engine_up"] == 0


def test_guesses_are_counted_by_position_where_there_are_any():
    guessing = replace(STATS, num_offered=(10, 9, 8), num_gained=(10, 6, 2))
    found = values(Metrics(lambda: guessing))
    assert found["glm_spec_decode_num_drafts_total"] == 9
    assert found["glm_spec_decode_num_draft_tokens_total"] == 17
    assert found["glm_spec_decode_num_accepted_tokens_total"] == 8
    by_position = "glm_spec_decode_num_accepted_tokens_per_pos_total"
    assert (found[f"{by_position}/0"], found[f"{by_position}/1"]) == (6, 2)
    without = values(Metrics(lambda: replace(STATS, num_offered=(10,), num_gained=(10,))))
    assert not [name for name in without if "spec_decode" in name]


def test_requests_are_counted_by_endpoint_and_end():
    metrics = Metrics(lambda: STATS)
    metrics.accepted(7)
    now = time.monotonic()
    times = Times(arrived=now - 2, began=now - 1.8, first=now - 1.5, last=now - 0.5)
    metrics.asked(2)
    metrics.first_token(times)
    metrics.next_tokens(2, 0.2)
    metrics.tokens(3)
    metrics.finished("/v1/completions", "stop", times, 3)
    metrics.finished("/v1/completions", "cancelled", times, 1)
    metrics.rejected("/v1/completions")
    metrics.rejected("/v1/completions", "slow_down")
    found = values(metrics)
    for status, number in (("stop", 1), ("cancelled", 1), ("rejected", 2)):
        assert found[f"glm_request_total//v1/completions/{status}"] == number
    assert found["glm_request_success_total/stop"] == 1
    assert found["glm_admission_rejections_total/slow_down"] == 1
    assert found["glm_latency_avg_ms"] == pytest.approx(2000, abs=100)
    assert found["glm_ttft_avg_ms"] == pytest.approx(500)
    for name, seconds in (
        ("request_queue_time", 0.2),
        ("request_prefill_time", 0.3),
        ("request_decode_time", 1.0),
        ("request_inference_time", 1.3),
        ("request_time_per_output_token", 0.5),
    ):
        assert found[f"glm_{name}_seconds_sum"] == pytest.approx(seconds)
    assert found["glm_request_generation_tokens_sum"] == 3
    assert found["glm_request_params_n_sum"] == 2
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


async def test_every_panel_of_the_dashboard_shows_a_metric_that_is_there(tmp_path):
    engine = ScriptedEngine(lambda request: [*tokens("ab"), END])
    async with scripted_service(engine, tmp_path) as service:
        client = create_app(service).test_client()
        service.metrics.started("total", 1.0)
        answer = await client.post("/v1/completions", json={"prompt": "Hi"})
        assert answer.status_code == 200
        # A family with labels has no samples before it has counted something.
        service.metrics.rejected("/v1/completions", "slow_down")
        text = await (await client.get("/metrics")).get_data(as_text=True)
    there = {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    dashboard = json.loads((files("serving") / "grafana.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    assert len(expressions) > 20
    for expression in expressions:
        names = re.findall(r"\bglm_\w+", expression)
        assert names, expression
        for name in names:
            assert name in there, expression
        for label in re.findall(r"by \((\w+)\)", expression):
            assert any(label in there[name] for name in names), expression


async def test_the_times_of_an_answer_are_observed(tmp_path):
    engine = ScriptedEngine(lambda request: [*tokens("abc"), END], pause=0.01)
    async with scripted_service(engine, tmp_path) as service:
        client = create_app(service).test_client()
        await client.post("/v1/completions", json={"prompt": "Hi", "n": 2})
        found = values(service.metrics)
    for name, number in (
        ("time_to_first_token_seconds", 2),
        ("e2e_request_latency_seconds", 2),
        ("request_decode_time_seconds", 2),
        ("request_generation_tokens", 2),
        ("request_prompt_tokens", 2),
        ("request_params_n", 1),
    ):
        assert found[f"glm_{name}_count"] == number, name
    assert 0 < found["glm_inter_token_latency_seconds_count"] <= 6
