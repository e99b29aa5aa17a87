"""What a run's times mean: throughput, latencies, errors. The definitions are those of `vllm bench serve`.

Knows neither servers nor how requests were sent.

* Duration: from the first request's start to the last one's end, so that draining counts.
* Throughputs: requests, or tokens of `usage`, of complete answers, over the duration.
* TTFT: from sending a request to the first event with a piece of the answer: text, reasoning or a
  tool call. An event that has only a role is none.
* ITL: between two such events in succession. It is a gap between events: a server that puts two
  tokens into one event has fewer and longer gaps.
* E2E: from sending to the last event with a choice.
* TPOT: (E2E - TTFT) / (completion tokens - 1), of answers of two tokens and more.
* Peak output throughput: the most tokens received in one of the run's seconds. Usage tells the
  tokens of an answer as a whole, so each of its events counts as an equal share of them.
* Peak concurrency: the most requests that were under way at the same moment.
* Goodput: complete answers that met every SLO, over the duration.

Latencies are of complete answers only. Percentiles interpolate linearly, as NumPy's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from serving.bench.client import Sample
from serving.bench.load import Run

LATENCIES = ("ttft", "tpot", "itl", "e2e")
PERCENTILES = (90, 99)

Summary = dict[str, Any]


def summarize(run: Run, slos: Mapping[str, float]) -> Summary:
    """The numbers of a run, ready for JSON; latencies in ms, throughputs per second.

    Args:
      slos: milliseconds that "ttft", "tpot" or "e2e" may take for an answer to count as good.
    """
    complete = [sample for sample in run.samples if sample.error is None]
    duration = run.ended_at - run.started_at
    input_tokens = sum(sample.prompt_tokens for sample in complete)
    output_tokens = sum(sample.completion_tokens for sample in complete)

    def per_second(number: float) -> float:
        return number / duration if duration > 0 else 0.0

    return {
        "concurrency": run.load.concurrency,
        "request_rate": run.load.rate,
        "duration_s": duration,
        "given_up": run.given_up,
        "requests": len(run.samples),
        "completed": len(complete),
        "errors": dict(Counter(s.error for s in run.samples if s.error).most_common()),
        "error_examples": _examples(run.samples),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "request_throughput": per_second(len(complete)),
        "input_throughput": per_second(input_tokens),
        "output_throughput": per_second(output_tokens),
        "total_throughput": per_second(input_tokens + output_tokens),
        "peak_output_throughput": _peak_throughput(complete, run.started_at),
        "peak_concurrency": _peak_concurrency(run.samples),
        **{f"{name}_ms": distribution(values) for name, values in _latencies(complete).items()},
        "held_ms": distribution([1e3 * sample.held_seconds for sample in run.samples]),
        "goodput": per_second(sum(_is_good(s, slos) for s in complete)) if slos else None,
        "slos_ms": dict(slos),
        "client": _client(run, duration),
    }


def distribution(values: ArrayLike) -> dict[str, float | int]:
    """Number, mean, deviation, extremes, median and percentiles; the number alone if there is none."""
    array = np.asarray(values, np.float64)
    if array.size == 0:
        return {"count": 0}
    named = {f"p{p}": float(np.percentile(array, p)) for p in PERCENTILES}
    return {
        "count": array.size,
        "mean": float(array.mean()),
        "std": float(array.std()),
        "min": float(array.min()),
        "median": float(np.median(array)),
        **named,
        "max": float(array.max()),
    }


def ttft(sample: Sample) -> float:
    """Seconds to the first piece."""
    return sample.piece_times[0] - sample.sent_at


def e2e(sample: Sample) -> float:
    """Seconds to the end of the answer."""
    return sample.last_at - sample.sent_at


def tpot(sample: Sample) -> float | None:
    """Seconds per token after the first; None for an answer of one token."""
    if sample.completion_tokens < 2:
        return None
    return (e2e(sample) - ttft(sample)) / (sample.completion_tokens - 1)


def _latencies(complete: Sequence[Sample]) -> dict[str, Any]:
    gaps = [np.diff(sample.piece_times) for sample in complete]
    return {
        "ttft": [1e3 * ttft(sample) for sample in complete],
        "tpot": [1e3 * value for sample in complete if (value := tpot(sample)) is not None],
        "itl": 1e3 * np.concatenate(gaps) if gaps else [],
        "e2e": [1e3 * e2e(sample) for sample in complete],
    }


def _is_good(sample: Sample, slos: Mapping[str, float]) -> bool:
    took = {"ttft": ttft(sample), "tpot": tpot(sample) or 0.0, "e2e": e2e(sample)}
    return all(1e3 * took[name] <= limit for name, limit in slos.items())


def _peak_throughput(complete: Sequence[Sample], started_at: float) -> float:
    if not complete:
        return 0.0
    times = np.concatenate([sample.piece_times for sample in complete]) - started_at
    shares = np.concatenate(
        [
            np.full(len(sample.piece_times), sample.completion_tokens / len(sample.piece_times))
            for sample in complete
        ]
    )
    return float(np.bincount(times.astype(np.int64), shares).max())


def _peak_concurrency(samples: Sequence[Sample]) -> int:
    # At the same moment an end comes before a start: a worker's next request is not its second.
    changes = sorted(
        [(sample.sent_at, 1) for sample in samples] + [(sample.ended_at, -1) for sample in samples]
    )
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def _examples(samples: Sequence[Sample]) -> dict[str, str]:
    examples: dict[str, str] = {}
    for sample in samples:
        if sample.error:
            examples.setdefault(sample.error, sample.detail)
    return examples


def _client(run: Run, duration: float) -> dict[str, Any]:
    """What the client itself cost: beyond about 80 % of a core, its times are partly its own."""
    return {
        "cpu_fraction": run.cpu_seconds / duration if duration > 0 else 0.0,
        "lag_ms": distribution([1e3 * lag for lag in run.lags]),
    }
