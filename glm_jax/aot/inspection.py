"""What the compiled steps of a model do on a target, as plain data, and how two such records differ.

Knows no gate: it reports, and compares with what was reported before.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.aot.findings import Findings, find
from glm_jax.aot.memory import Limits, engine_shapes
from glm_jax.aot.topology import mesh_of
from glm_jax.config import ModelConfig
from glm_jax.runner import Bucket, buckets
from glm_jax.shapes import StepShapes
from glm_jax.steps import DEFAULT_OPTIONS, StepOptions, lower, step_specs
from glm_jax.targets.target import Target

_THUNK = re.compile(r"^(?P<indent> *)\d+: k(?P<kind>[A-Za-z]+)", re.MULTILINE)
_GRAPH = "CommandBuffer"
# They order or branch; what they order is counted by itself.
_NO_LAUNCH = frozenset({"AsyncStart", "AsyncDone", "While", "Conditional", "PartitionId"})


class InspectionError(ValueError):
    """A step that was asked for is not compiled at these limits."""


def inspect_steps(
    config: ModelConfig,
    target: Target,
    dtype: np.dtype,
    limits: Limits,
    steps: Iterable[str],
    options: StepOptions = DEFAULT_OPTIONS,
) -> dict[str, Any]:
    """Compiles the steps and records each, by names like "decode-64".

    Args:
      steps: names; every bucket when there are none.

    Raises:
      InspectionError: there is no such bucket.
      SizingError, TargetError: the model or the compiler is not there.
    """
    mesh = mesh_of(target)
    shapes = engine_shapes(config, target, mesh, dtype, limits, options.kv_dtype)
    specs = step_specs(config, shapes, dtype, options)
    record = {}
    for phase, rows in _chosen(shapes, steps):
        lowered = lower(config, shapes, mesh, dtype, phase, rows, options)
        with tempfile.TemporaryDirectory() as dump:
            compiled = _compile(lowered, Path(dump), is_gpu=not target.is_cpu)
            graphs = {} if target.is_cpu else _graphs(Path(dump))
        found = find(compiled, specs, target.num_devices)
        record[f"{phase}-{rows}"] = _record(found, config.num_hidden_layers) | graphs
    return record


def _chosen(shapes: StepShapes, steps: Iterable[str]) -> list[Bucket]:
    every: dict[str, Bucket] = {f"{phase}-{rows}": (phase, rows) for phase, rows in buckets(shapes)}
    unknown = [name for name in steps if name not in every]
    if unknown:
        raise InspectionError(
            f"no step {unknown[0]!r} at these limits: there are {', '.join(every)}"
        )
    return [every[name] for name in steps] or list(every.values())


def _compile(lowered: jax.stages.Lowered, dump: Path, *, is_gpu: bool) -> jax.stages.Compiled:
    if not is_gpu:
        return lowered.compile()
    # Graphs are made after the program that as_text() shows: only the dump tells them.
    options: Any = {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True}
    return lowered.compile(compiler_options=options)


def _graphs(dump: Path) -> dict[str, int]:
    """Command buffers of a step, and launches that are in none of them, as written."""
    texts = list(dump.glob("*.thunk_sequence_after_thunk_passes.txt"))
    assert texts, "XLA dumps the thunks of every program for a GPU"
    inside, outside = 0, 0
    for kind, is_inside in _thunks(texts[0].read_text(encoding="utf-8")):
        inside += kind == _GRAPH
        outside += not is_inside and kind != _GRAPH and kind not in _NO_LAUNCH
    return {"command_buffers": inside, "launches_outside_of_them": outside}


def _thunks(text: str) -> Iterator[tuple[str, bool]]:
    """Each thunk, and whether a command buffer holds it: what is indented deeper."""
    graph_indent: int | None = None
    for thunk in _THUNK.finditer(text):
        indent = len(thunk["indent"])
        if graph_indent is not None and indent <= graph_indent:
            graph_indent = None
        yield thunk["kind"], graph_indent is not None
        if thunk["kind"] == _GRAPH and graph_indent is None:
            graph_indent = indent


def _record(found: Findings, num_layers: int) -> dict[str, Any]:
    return {
        "kernels_per_step": found.kernels,
        "kernels_per_layer": round(found.repeated_kernels / num_layers, 1),
        "collectives": [asdict(each) for each in found.collectives],
        "copies": [asdict(each) for each in found.copies],
        "aliased_bytes": found.aliased_bytes,
        "argument_bytes": found.argument_bytes,
        "temporary_bytes": found.temporary_bytes,
    }


def differences_of(expected: Any, found: Any, where: str = "") -> list[str]:
    """Every place where two records differ, one line each."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = []
        for key in sorted(expected.keys() | found.keys()):
            place = f"{where}.{key}" if where else key
            if key in expected and key in found:
                lines += differences_of(expected[key], found[key], place)
            else:
                lines.append(f"{place}: {'only expected' if key in expected else 'not expected'}")
        return lines
    if isinstance(expected, list) and isinstance(found, list):
        gone = [each for each in expected if each not in found]
        new = [each for each in found if each not in expected]
        return [f"{where}: - {each}" for each in gone] + [f"{where}: + {each}" for each in new]
    return [] if expected == found else [f"{where}: {expected} expected, {found} found"]
