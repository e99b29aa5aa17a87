"""A plan as a picture: tokens per second over the batch, and where a step's time goes.

Knows no arithmetic: everything it draws, the plan has. Needs the extra `plot`.
"""

from pathlib import Path
from typing import Any

from glm_jax.aot.plan import Plan

_PARTS = (
    ("hbm", "HBM"),
    ("compute", "compute"),
    ("all_reduce", "all-reduce"),
    ("launches", "launches"),
)


def draw(plan: Plan, path: Path) -> None:
    """Writes the picture; the suffix of the path chooses its format.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError: the suffix names no format.
    """
    from matplotlib.figure import Figure  # a second to load, and optional

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _throughput(plan, left)
    _shares(plan, right)
    figure.suptitle(f"{plan.model} on {plan.target}, {plan.kv_dtype} keys and values: the roofline")
    figure.savefig(path)


def _throughput(plan: Plan, axes: Any) -> None:
    contexts = sorted({context for _, context, _ in plan.decode})
    for context in contexts:
        cells = [(rows, time) for rows, length, time in plan.decode if length == context]
        fitting = [(rows, time) for rows, time in cells if plan.holds(rows, context)]
        rows = [number for number, _ in fitting]
        speeds = [number / time.total for number, time in fitting]
        axes.plot(rows, speeds, marker="o", label=f"context {context:,}")
    axes.set(
        xscale="log", yscale="log", xlabel="sequences", ylabel="tokens per second, all together"
    )
    axes.set_xscale("log", base=2)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()


def _shares(plan: Plan, axes: Any) -> None:
    shortest = min(context for _, context, _ in plan.decode)
    cells = [(rows, time) for rows, length, time in plan.decode if length == shortest]
    labels = [str(rows) for rows, _ in cells]
    bottom = [0.0] * len(cells)
    for field, name in _PARTS:
        heights = [1e3 * getattr(time, field) for _, time in cells]
        axes.bar(labels, heights, bottom=bottom, label=name)
        bottom = [base + height for base, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel=f"sequences at context {shortest:,}", ylabel="ms per decode step")
    axes.legend()
