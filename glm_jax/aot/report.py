"""A plan as tables for people.

Knows no arithmetic beyond units: everything it shows, the plan has.
"""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from glm_jax.aot.plan import Plan
from glm_jax.aot.roofline import StepTime


def show(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    console.print(
        Group(
            Text(f"{plan.model} on {plan.target}", style="bold"),
            Text(_promise(plan)),
            Text(),
            _memory(plan),
            Text(),
            _decode(plan),
            Text(),
            _prefill(plan),
            Text(),
            *(Text(f"- {note}", style="dim") for note in plan.notes),
            _verdict(plan),
        )
    )


def _promise(plan: Plan) -> str:
    limits = plan.limits
    return (
        f"{limits.max_concurrency} sequences of {limits.max_seq_len:,} positions, "
        f"{plan.kv_dtype} keys and values, prefill steps of {plan.shapes.prefill_budget:,} tokens"
    )


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(title="Memory per device", title_justify="left", box=None)
    table.add_column("")
    table.add_column("GB", justify="right")
    table.add_column("")
    kept = plan.limits.max_concurrency * plan.limits.max_seq_len
    rows = (
        ("weights", memory.weights, ""),
        ("temporaries", memory.temporaries, "compiled" if memory.is_compiled else "estimated"),
        ("keys and values", memory.kv, f"{kept:,} positions; {memory.kv_tokens:,} would fit"),
        ("driver and libraries", memory.reserved, ""),
        ("headroom", memory.headroom, ""),
        ("total", memory.total, ""),
    )
    for name, size, remark in rows:
        style = "red" if size < 0 else "bold" if name in ("headroom", "total") else ""
        table.add_row(name, f"{size / 1e9:.1f}", remark, style=style)
    return table


def _times(title: str, leading: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    names = ("HBM", "compute", "all-reduce", "launch", "step ms", "tok/s")
    for name in (*leading, *names):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limit")
    return table


def _cells(time: StepTime, tokens: int) -> list[str]:
    parts = (time.hbm, time.compute, time.all_reduce, time.launches, time.total)
    return [*(f"{1e3 * part:.2f}" for part in parts), f"{tokens / time.total:,.0f}", time.limit]


def _decode(plan: Plan) -> Table:
    table = _times("Decode, at the roofline (ms)", ("rows", "context"))
    before = None
    for rows, context, time in plan.decode:
        if plan.holds(rows, context):
            shown = "" if rows == before else str(rows)
            table.add_row(shown, f"{context:,}", *_cells(time, rows))
            before = rows
    return table


def _prefill(plan: Plan) -> Table:
    table = _times("Prefill, at the roofline (ms)", ("chunk", "prompt"))
    for chunk, prompt, time in plan.prefill:
        table.add_row(f"{chunk:,}", f"{prompt:,}", *_cells(time, chunk))
    return table


def _verdict(plan: Plan) -> RenderableType:
    if plan.refusal is not None:
        return Text(f"does not fit: {plan.refusal}", style="bold red")
    return Text(
        f"fits, with {plan.memory.headroom / 1e9:.1f} GB per device to spare", style="green"
    )
