"""A sweep as a picture: latency over throughput.

Knows neither servers nor how anything was measured. Needs matplotlib, the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serving.bench.report import point_name
from serving.bench.summary import Summary

_PANELS = (("ttft", "time to first token, ms"), ("tpot", "time per further token, ms"))


class NoMatplotlibError(Exception):
    """matplotlib is not installed; the message is for the user."""


def draw(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Writes a picture, in the format that the path's suffix names: a point a run, median and p99.

    Raises:
      NoMatplotlibError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlibError("a plot needs matplotlib: make env EXTRAS=plot") from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    shown = [summary for summary in summaries if summary["completed"]]
    for axes, (name, label) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for statistic, style in (("median", "o-"), ("p99", "s--")):
            points = [s for s in shown if statistic in s[f"{name}_ms"]]
            throughputs = [summary["output_throughput"] for summary in points]
            latencies = [summary[f"{name}_ms"][statistic] for summary in points]
            axes.plot(throughputs, latencies, style, label=statistic)
        for summary in shown:
            median = summary[f"{name}_ms"].get("median")
            if median is not None:
                where = (summary["output_throughput"], median)
                axes.annotate(
                    point_name(summary), where, (4, 6), textcoords="offset points", fontsize=7
                )
        axes.set(xlabel="output tokens per second", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
