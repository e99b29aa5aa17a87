"""A run's numbers as tables for people.

Knows neither servers nor how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from serving.bench.observed import differences
from serving.bench.summary import LATENCIES, PERCENTILES, Summary

# Above it the client is about to be what is measured.
_BUSY_CLIENT = 0.8

_STATISTICS = ("mean", "median", *(f"p{percentile}" for percentile in PERCENTILES))


def point_name(summary: Summary) -> str:
    """What load a run was, in few words."""
    rate, concurrency = summary["request_rate"], summary["concurrency"]
    if rate is None:
        return f"{concurrency} at a time"
    limit = "" if concurrency is None else f", {concurrency} at most"
    return f"{rate:g}/s{limit}"


def show(summaries: Sequence[Summary], console: Console) -> None:
    """Prints throughputs and latencies, a column a run, and what has to be said about them."""
    console.print(Group(*_tables(summaries)))
    for summary in summaries:
        for remark in remarks(summary):
            console.print(f"{point_name(summary)}: {remark}", style="yellow", highlight=False)


def _tables(summaries: Sequence[Summary]) -> list[RenderableType]:
    totals = Table(title="throughput", title_justify="left")
    totals.add_column("")
    for summary in summaries:
        totals.add_column(point_name(summary), justify="right")
    for label, value in _ROWS:
        cells = [value(summary) for summary in summaries]
        if any(cell is not None for cell in cells):
            totals.add_row(label, *("-" if cell is None else cell for cell in cells))
    return [totals, *(_latencies(summary) for summary in summaries)]


def _latencies(summary: Summary) -> Table:
    table = Table(title=f"latency in ms, {point_name(summary)}", title_justify="left")
    table.add_column("")
    for statistic in _STATISTICS:
        table.add_column(statistic, justify="right")
    for name in LATENCIES:
        values = summary[f"{name}_ms"]
        cells = [f"{values[s]:.2f}" if s in values else "-" for s in _STATISTICS]
        table.add_row(name.upper(), *cells)
    return table


def _errors(summary: Summary) -> str:
    kinds = [f"{number} {kind}" for kind, number in summary["errors"].items()]
    return ", ".join(kinds) or "0"


def _server(summary: Summary, name: str) -> Any:
    return (summary.get("server") or {}).get(name)


def _acceptance(summary: Summary) -> str | None:
    found = _server(summary, "acceptance")
    return found and f"{found['rate']:.1%}, {found['length']:.2f} tokens a step"


def _prefix_hits(summary: Summary) -> str | None:
    found = _server(summary, "prefix_hits")
    return found and f"{found['rate']:.1%}"


def _server_ttft(summary: Summary) -> str | None:
    mean = _server(summary, "ttft_mean_ms")
    return None if mean is None else f"{mean:.2f}"


def _goodput(summary: Summary) -> str | None:
    return None if summary["goodput"] is None else f"{summary['goodput']:.2f}"


_ROWS = (
    ("duration, s", lambda s: f"{s['duration_s']:.2f}"),
    ("complete answers", lambda s: f"{s['completed']:,}"),
    ("errors", _errors),
    ("input tokens", lambda s: f"{s['input_tokens']:,}"),
    ("output tokens", lambda s: f"{s['output_tokens']:,}"),
    ("requests/s", lambda s: f"{s['request_throughput']:.2f}"),
    ("input tokens/s", lambda s: f"{s['input_throughput']:,.1f}"),
    ("output tokens/s", lambda s: f"{s['output_throughput']:,.1f}"),
    ("peak output tokens/s", lambda s: f"{s['peak_output_throughput']:,.0f}"),
    ("peak concurrency", lambda s: str(s["peak_concurrency"])),
    ("good answers/s", _goodput),
    ("drafts accepted", _acceptance),
    ("prompt tokens from cache", _prefix_hits),
    ("TTFT by the server, mean ms", _server_ttft),
    ("client, cores", lambda s: f"{s['client']['cpu_fraction']:.2f}"),
)


def remarks(summary: Summary) -> list[str]:
    """What makes a run less than it looks."""
    found = []
    if summary["given_up"]:
        found.append(f"given up: {summary['given_up']}")
    found += [f"{kind}: {detail}" for kind, detail in summary["error_examples"].items()]
    found += differences(summary)
    if summary["client"]["cpu_fraction"] > _BUSY_CLIENT:
        share = summary["client"]["cpu_fraction"]
        found.append(
            f"the client itself took {share:.0%} of a core, so its times are partly its own"
        )
    return found
