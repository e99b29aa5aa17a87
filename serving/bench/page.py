"""A page of results made from the JSON files of measurements: tables, pictures, and what each was measured on.

Knows no server: every number on the page stands in one of the files, and the page says in which.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from serving.bench import chart
from serving.bench.report import point_name

Result = dict[str, Any]

_INTRODUCTION = """\
# Benchmarks

Written by `python -m serving.bench page docs`, from the JSON files in `docs/results/`; do not edit. Each section says what its
numbers were measured on. A commit with a + had uncommitted changes. The load average tells how busy the machine was when the
numbers were written down: on a machine that is shared, ratios and numbers per second of CPU time say more than seconds do.

Definitions are those of `vllm bench serve`: TTFT is from sending a request to its first piece of text; ITL between two pieces;
TPOT is (E2E - TTFT) / (tokens - 1); throughputs are of complete answers over the time from the first request to the last answer.
"""


class PageError(Exception):
    """There is nothing to make a page of; the message is for the user."""


def write(directory: Path) -> Path:
    """Writes benchmarks.md, and a picture for each sweep, from directory/results/*.json.

    Raises:
      PageError: there are none, or one is no result.
      NoMatplotlibError: a sweep is to be drawn, and matplotlib is missing.
    """
    files = sorted((directory / "results").glob("*.json"))
    if not files:
        raise PageError(f"{directory / 'results'} has no JSON files")
    sections = [_section(path) for path in files]
    page = directory / "benchmarks.md"
    page.write_text("\n".join([_INTRODUCTION, *sections]), encoding="utf-8")
    return page


def _section(path: Path) -> str:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        title, body, conditions = _BODIES[result["kind"]]
    except (ValueError, KeyError, TypeError) as error:
        raise PageError(f"{path} is no result of a measurement: {error}") from error
    lines = [f"## {title} ({path.stem})", "", *body(result, path), "", *conditions(result, path)]
    return "\n".join(lines) + "\n"


def _conditions(result: Result, path: Path) -> Iterator[str]:
    machine = result["machine"]
    devices = ", ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['processor']}"
    options = {key: value for key, value in result["options"].items() if value not in (None, "")}
    yield f"Measured {result['date']} at commit {result['commit']} on {devices}, "
    yield f"{machine['memory_gib']} GiB of memory, load average {machine['load_average']}."
    yield f"Versions: {_listed(result['versions'])}."
    yield f"Options: {_listed(options)}. File: `results/{path.name}`."


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _load(result: Result, path: Path) -> Iterator[str]:
    yield from _runs(result["runs"])
    if len(result["runs"]) > 1:
        picture = path.with_suffix(".svg")
        chart.draw(result["runs"], picture, f"{result['server']['model']}, {path.stem}")
        yield ""
        yield f"![latency over throughput](results/{picture.name})"


def _frontend(result: Result, path: Path) -> Iterator[str]:
    yield from _runs(result["runs"])


def _runs(runs: Sequence[Result]) -> Iterator[str]:
    head = ("load", "answers", "errors", "output tok/s", "TTFT ms, median", "p99")
    head += ("TPOT ms, median", "p99", "ITL ms, p99")
    yield from _table(
        head,
        (
            (
                point_name(run),
                str(run["completed"]),
                str(run["requests"] - run["completed"]),
                f"{run['output_throughput']:,.0f}",
                *(_latency(run, "ttft", statistic) for statistic in ("median", "p99")),
                *(_latency(run, "tpot", statistic) for statistic in ("median", "p99")),
                _latency(run, "itl", "p99"),
            )
            for run in runs
        ),
    )


def _latency(run: Result, name: str, statistic: str) -> str:
    value = run[f"{name}_ms"].get(statistic)
    return "-" if value is None else f"{value:.1f}"


def _startup(result: Result, path: Path) -> Iterator[str]:
    medians = result["medians"]
    head = [f"{kind}, s (median of {len(result['starts'][kind])})" for kind in medians]
    phases = dict.fromkeys(phase for found in medians.values() for phase in found)
    rows = [
        [phase, *(f"{found[phase]:.2f}" if phase in found else "-" for found in medians.values())]
        for phase in phases
    ]
    yield from _table(["phase", *head], rows)


def _decode(result: Result, path: Path) -> Iterator[str]:
    head = ("requests at a time", "decode tok/s", "range", "output tok/s", "step ms", "TTFT ms")
    yield from _table(
        head,
        (
            (
                str(run["concurrency"]),
                f"{run['decode_throughput']:,.1f}",
                _range(run["decode_throughput_range"], ",.1f"),
                f"{run['output_throughput']:,.1f}",
                f"{run['step_ms']:.2f}",
                f"{run['ttft_ms']:.1f}",
            )
            for run in result["runs"]
        ),
    )


def _range(found: Sequence[float], format: str) -> str:
    low, high = found
    return f"{low:{format}} … {high:{format}}"


def _ratios(ratios: Sequence[Result]) -> Iterator[str]:
    head = ("at a time", "over", "tok/s, ratio", "range", "tok per CPU second, ratio", "range")
    yield from _table(
        head,
        (
            (
                str(ratio["concurrency"]),
                ratio["over"],
                f"{ratio['output_throughput']:.2f}",
                _range(ratio["output_throughput_range"], ".2f"),
                f"{ratio['tokens_per_cpu_second']:.2f}",
                _range(ratio["tokens_per_cpu_second_range"], ".2f"),
            )
            for ratio in ratios
        ),
    )


def _frontend_peers(result: Result, path: Path) -> Iterator[str]:
    columns = {
        "tok/s": ("output_throughput", ",.0f"),
        "user µs per token": ("user_us_per_token", ".2f"),
        "system µs": ("system_us_per_token", ".2f"),
        "tokens per event": ("tokens_per_event", ".1f"),
        "ITL p99, ms": ("itl_p99_ms", ".1f"),
    }
    yield "Engines without a model, as fast as the host goes. The others send every token in an event of"
    yield "its own; ours joins tokens that come faster than it writes them down."
    yield ""
    yield from _medians("server", columns, result["runs"])
    yield ""
    yield from _ratios(result["ratios"])


def _peers(result: Result, path: Path) -> Iterator[str]:
    columns = {
        "tok/s": ("output_throughput", ",.1f"),
        "tok per CPU second": ("tokens_per_cpu_second", ",.1f"),
    }
    for size, model in result["models"].items():
        yield f"{size}, {model['parameters'] / 1e6:.1f} million parameters:"
        yield ""
        yield from _medians("engine", columns, model["runs"])
        yield ""
        yield from _ratios(model["ratios"])
        yield ""
        for name, why in model["left_out"].items():
            yield f"{name} was left out: {why}"
            yield ""


def _medians(
    whose: str, columns: dict[str, tuple[str, str]], runs: Sequence[Result]
) -> Iterator[str]:
    """Medians over the rounds, of each server or engine at each concurrency."""
    groups: dict[tuple[int, str], list[Result]] = {}
    for run in runs:
        groups.setdefault((run["concurrency"], run[whose]), []).append(run)
    yield from _table(
        ("at a time", whose, *columns),
        (
            [str(number), name]
            + [
                format(statistics.median(run[field] for run in group), spec)
                for field, spec in columns.values()
            ]
            for (number, name), group in groups.items()
        ),
    )


def _kernels(result: Result, path: Path) -> Iterator[str]:
    head = (
        "kernel", "shape", "steps", "error", "µs (in a graph)", "of the floor",
        "of a copy of as much", "best alternative, µs (in a graph)", "over ours",
    )  # fmt: skip
    yield from _table(head, map(_kernel_cells, result["results"]))


def _kernel_cells(found: Result) -> Sequence[str]:
    cells = (found["kernel"], found["shape"], found.get("phase", "") or "-")
    if "failed" in found:
        said = found["failed"][:100].replace("|", "/").replace("\n", " ")
        return (*cells, said, "", "", "", "", "")
    others = {**found["alternatives"], **found["peers"]}
    best = min(others, key=lambda name: others[name]["us"], default=None)
    wrong = "" if found["is_right"] else " **wrong**"
    compared = "-" if best is None else f"{_kernel_times(others[best])} {best}"
    in_graphs = {name: x["us_graph"] for name, x in others.items() if "us_graph" in x}
    first = min(in_graphs, key=lambda name: in_graphs[name], default=best)
    if first != best and "us_graph" in found:
        compared += f", ({in_graphs[first]:.1f}) {first}"
    return (
        *cells,
        (f"{found['error']:.1e}" if "error" in found else "") + wrong,
        _kernel_times(found),
        f"{found['floor_us'] / found['us']:.0%}",
        f"{found['small_floor_us'] / found['us']:.0%}",
        compared,
        "-" if best is None else _ratio_of_kernels(found, others[best]["us"], in_graphs.get(first)),
    )


def _kernel_times(times: Result) -> str:
    in_graph = f" ({times['us_graph']:.1f})" if "us_graph" in times else ""
    return f"{times['us']:.1f}{in_graph}"


def _ratio_of_kernels(ours: Result, us: float, us_graph: float | None) -> str:
    ratio = f"{us / ours['us']:.2f}"
    if "us_graph" not in ours or us_graph is None:
        return ratio
    return f"{ratio} ({us_graph / ours['us_graph']:.2f})"


def _layer(result: Result, path: Path) -> Iterator[str]:
    head = ("rows", "of a layer", "launches", "µs", "floor, µs", "of the floor")
    yield from _table(head, (cells for found in result["results"] for cells in _layer_cells(found)))


def _layer_cells(found: Result) -> Iterator[Sequence[str]]:
    rows = str(found["rows"])
    for part in found["kernels"]:
        share = f"{part['floor_us'] / part['us']:.0%}" if part["floor_us"] and part["us"] else "-"
        yield (
            rows, part["kernel"], f"{part['runs']:.1f}", f"{part['us']:.1f}",
            f"{part['floor_us']:.1f}", share,
        )  # fmt: skip
    yield (rows, "gaps", "", f"{found['gaps_us']:.1f}", "", "")
    if "alone_us" in found:
        yield (rows, "all, one after the other", "", f"{found['alone_us']:.1f}", "", "")
    yield (
        rows, "**all**", f"{found['launches']:.1f}", f"{found['layer_us']:.1f}",
        f"{found['floor_us']:.1f}", f"{found['floor_us'] / found['layer_us']:.0%}",
    )  # fmt: skip


def _layer_conditions(result: Result, path: Path) -> Iterator[str]:
    yield f"Measured {result['date']} at commit {result['commit']} on {result['device']},"
    few, many = result["layers"][0], result["layers"][-1]
    yield f"jax {result['jax']}, from steps of {few} and of {many} layers as XLA captures them: a layer is what one"
    yield "more takes, with its share of the loop over layers. In all there one kernel begins while the one ahead"
    yield "of it still runs. Such kernels have no times of their own: those are of steps without that, of which"
    yield "gaps are what kernels do not fill, below nothing where they take less in a graph. A floor is what this card's"
    yield f"large copy ({result['copy_bytes_per_second'] / 1e12:.2f} TB/s) would take for the bytes."
    yield f"Command: `{result['command']}`. File: `results/{path.name}`."


def _card_conditions(result: Result, path: Path) -> Iterator[str]:
    rates = (f"{name} {rate / 1e12:.0f}" for name, rate in result["operations_per_second"].items())
    yield f"Measured {result['date']} at commit {result['commit']} on {result['device']}, jax {result['jax']},"
    yield "ours and all alternatives in one run on one card. A floor is what this card's own copies (read"
    yield f"and written together {result['copy_bytes_per_second'] / 1e12:.2f} TB/s) and products (TFLOP/s:"
    yield f"{', '.join(rates)}) would take for the bytes and operations of the kernel. A copy of as much moves"
    yield "as many bytes by itself, from a cold L2 cache, or is an empty kernel"
    yield f"({result['empty_kernel_us']:.1f} µs) where that takes longer: that is what kernels of few bytes are"
    yield "held against. Times are sums of kernels one after the other, by CUPTI; in a graph of all layers, as steps"
    yield "have it, there are gaps between kernels, or one begins before the one ahead has ended: ours with jax"
    yield "0.12, and Triton's where that takes less. Both begin with a cold L2 cache and take no layer's weights,"
    yield "keys or values twice; rows, which the kernel ahead leaves in the cache in a step, lie there here too."
    yield "Over ours: above 1, ours is faster."
    yield ""
    yield 'Steps run the rows that name them. "router … norm" is a layer of a decode step from the norm after'
    yield "attention to the next layer's, kernel for kernel, and the rows that begin with … are its parts, theirs"
    yield "the same parts of the same calls; the first norm begins a step, once; two tokens of a sequence are what"
    yield "steps with a guess run. Rows with - are no kernel of a step by themselves: attention without the write and"
    yield "the quantization that steps have with it, beside others' that do as little; the write alone; the norm of a"
    yield "sum, which decode steps run only where XLA sums over devices; and, split, a layout with a part of every"
    yield "expert on each device, which nothing loads yet. PyTorch's attention reads bfloat16 keys that lie in one"
    yield "piece, ours and Triton's FP8 pages. In a graph attention follows attention, and its CTAs crowd on the"
    yield "multiprocessors that come free first, which in a step another kernel is ahead of."
    yield ""
    yield f"Command: `{result['command']}`. File: `results/{path.name}`."


_Lines = Callable[[Result, Path], Iterator[str]]
# kind -> title, what was measured, on what.
_BODIES: dict[str, tuple[str, _Lines, _Lines]] = {
    "load": ("A server under load", _load, _conditions),
    "startup": ("The start", _startup, _conditions),
    "frontend": ("The front end without a model", _frontend, _conditions),
    "decode": ("The engine without HTTP", _decode, _conditions),
    "frontend-peers": ("The front end beside others", _frontend_peers, _conditions),
    "peers": ("The engine beside others on the CPU", _peers, _conditions),
    "kernels": ("Kernels", _kernels, _card_conditions),
    "layer": ("A layer of a decode step", _layer, _layer_conditions),
}
