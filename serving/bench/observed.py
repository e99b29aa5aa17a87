"""What the server says of itself: its counters before and after a run, from /metrics.

Knows no server in particular: the usual names are looked for under each usual prefix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_READ_SECONDS = 3
_PREFIXES = ("glm_", "vllm:", "sglang:")
_COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds_sum",
    "time_to_first_token_seconds_count",
    "e2e_request_latency_seconds_sum",
    "e2e_request_latency_seconds_count",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_cached_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "num_preemptions_total",
)

Counters = dict[str, float]


async def read_counters(session: aiohttp.ClientSession) -> Counters | None:
    """The counters we know, each summed over its labels; None if the server shows none."""
    try:
        async with session.get(
            "/metrics", timeout=aiohttp.ClientTimeout(total=_READ_SECONDS)
        ) as response:
            text = await response.text()
            return parse_counters(text) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None


def parse_counters(text: str) -> Counters | None:
    """The counters we know in Prometheus' text format; a name under two prefixes counts once.

    Raises:
      ValueError: it is no such text.
    """
    found: dict[str, Counters] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            prefix = next((p for p in _PREFIXES if sample.name.startswith(p)), None)
            if prefix is None:
                continue
            name = sample.name.removeprefix(prefix)
            if name in _COUNTERS:
                by_prefix = found.setdefault(name, {})
                by_prefix[prefix] = by_prefix.get(prefix, 0.0) + sample.value
    counters = {name: next(iter(by_prefix.values())) for name, by_prefix in found.items()}
    return counters or None


def observed(before: Counters | None, after: Counters | None) -> dict[str, Any] | None:
    """What happened between two readings, as the server counts it; None if it shows nothing.

    Latencies in ms. `acceptance` and `prefix_hits` are there if the server speculates or caches.
    """
    if before is None or after is None:
        return None
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    result: dict[str, Any] = {
        "input_tokens": _whole(grown, "prompt_tokens_total"),
        "output_tokens": _whole(grown, "generation_tokens_total"),
        "ttft_mean_ms": _mean_ms(grown, "time_to_first_token_seconds"),
        "e2e_mean_ms": _mean_ms(grown, "e2e_request_latency_seconds"),
        "preemptions": _whole(grown, "num_preemptions_total"),
    }
    if drafted := grown.get("spec_decode_num_draft_tokens_total"):
        accepted = grown.get("spec_decode_num_accepted_tokens_total", 0.0)
        drafts = grown.get("spec_decode_num_drafts_total") or drafted
        result["acceptance"] = {
            "drafted_tokens": int(drafted),
            "accepted_tokens": int(accepted),
            "rate": accepted / drafted,
            "length": 1 + accepted / drafts,
        }
    if asked := grown.get("prefix_cache_queries_total"):
        hits = grown.get("prefix_cache_hits_total", 0.0)
        result["prefix_hits"] = {"tokens": int(hits), "rate": hits / asked}
    elif cached := grown.get("prompt_tokens_cached_total"):
        of = grown.get("prompt_tokens_total") or cached
        result["prefix_hits"] = {"tokens": int(cached), "rate": cached / of}
    return result


def _whole(grown: Counters, name: str) -> int | None:
    return round(grown[name]) if name in grown else None


def _mean_ms(grown: Counters, name: str) -> float | None:
    number = grown.get(f"{name}_count")
    return 1e3 * grown[f"{name}_sum"] / number if number else None


def differences(summary: dict[str, Any]) -> Iterable[str]:
    """Where the client's counts and the server's are not the same, for people.

    Only of runs in which every answer was complete: what a failed request cost, one side cannot
    know. Other clients of the same server show here too.
    """
    server = summary.get("server")
    if not server or summary["requests"] != summary["completed"]:
        return
    for name in ("input_tokens", "output_tokens"):
        if server[name] is not None and server[name] != summary[name]:
            yield f"{name}: the client received {summary[name]}, the server counts {server[name]}"
