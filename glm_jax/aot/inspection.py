"""What the compiled steps of a model do on a target, as plain data, and how two such records differ.

Knows no gate: it reports, and compares with what was reported before.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from glm_jax.aot.findings import Findings, find
from glm_jax.aot.graphs import compile_with_graphs
from glm_jax.aot.memory import Limits, engine_shapes
from glm_jax.aot.topology import mesh_of
from glm_jax.config import ModelConfig
from glm_jax.runner import Bucket, buckets
from glm_jax.shapes import StepShapes
from glm_jax.steps import DEFAULT_OPTIONS, StepOptions, lower, step_specs
from glm_jax.targets.target import Target


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
        compiled, graphs = compile_with_graphs(lowered, is_gpu=not target.is_cpu)
        found = find(compiled, specs, target.num_devices, graphs)
        record[f"{phase}-{rows}"] = _record(found)
    return record


def _chosen(shapes: StepShapes, steps: Iterable[str]) -> list[Bucket]:
    every: dict[str, Bucket] = {f"{phase}-{rows}": (phase, rows) for phase, rows in buckets(shapes)}
    unknown = [name for name in steps if name not in every]
    if unknown:
        raise InspectionError(
            f"no step {unknown[0]!r} at these limits: there are {', '.join(every)}"
        )
    return [every[name] for name in steps] or list(every.values())


def _record(found: Findings) -> dict[str, Any]:
    graphs = {} if found.graphs is None else asdict(found.graphs)
    return graphs | {
        "kernels_per_step": found.kernels,
        "layers_a_turn": found.layers_a_turn,
        "turn_kernels": list(found.turn_kernels),
        "fused_sums": found.fused_sums,
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
