"""What a decode layer's kernels read at least, and what they take in a captured step.

Knows kernels by their names alone.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from glm_jax.config import ModelConfig
from glm_jax.sharding import partition_spec
from tests.perf.card import Card

# Runs of each kernel in a step, and its microseconds in all of them.
Kernels = Mapping[str, tuple[float, float]]

_OTHERS = "others of XLA"
# The first that matches a kernel's name says what it is for.
_PATTERNS = (
    ("gate_up, down", r"grouped_mlp"),
    ("gate_up", r"gate_up"),
    ("down", r"grouped_down"),
    ("quantize_hidden", r"quantize_hidden"),
    ("add_up", r"add_up"),
    ("picks, sorting", r"rout|dispatch|stage"),
    ("attention", r"attention|attend"),
    ("kv_write", r"kv_write"),
    ("QKV, o_proj", r"dense_matmul"),
    ("norms, sums", r"norm|all_reduce"),
)
# Weights of each, by a part of their paths.
_WEIGHTS = {
    "QKV, o_proj": r"qkv_proj|o_proj",
    "picks, sorting": r"moe\.gate\.",
    "gate_up": r"gate_up_proj",
    "down": r"down_proj",
    "gate_up, down": r"gate_up_proj|down_proj",
}


class Floor(NamedTuple):
    """Of a layer's kernels of one purpose: bytes a device moves at least, and what a copy of these takes."""

    num_bytes: float
    us: float


def purpose(name: str) -> str:
    """What a kernel is for."""
    found = (what for what, pattern in _PATTERNS if re.search(pattern, name))
    return next(found, _OTHERS)


def floors_of(
    config: ModelConfig,
    weights: Mapping[str, Any],
    devices: int,
    rows: int,
    positions: int,
    card: Card,
) -> dict[str, Floor]:
    """Each purpose's floor by the card's large copy: weights in use, keys and values, rows in and out."""
    # The router chooses among the experts of the whole model.
    share = config.num_experts_per_tok / config.n_routed_experts
    in_use = 1 - (1 - share) ** rows
    sizes: dict[str, float] = {}
    for what, pattern in _WEIGHTS.items():
        total = 0.0
        for path, spec in weights.items():
            if path.startswith("layers.") and re.search(pattern, path):
                is_shared_out = any(axis is not None for axis in partition_spec(spec.axes))
                size = np.prod(spec.shape) * spec.dtype.itemsize / config.num_hidden_layers
                size /= devices if is_shared_out else 1
                total += size * (in_use if ".experts." in path else 1)
        sizes[what] = total
    width = config.hidden_size
    sizes["attention"] = rows * positions * 2 * config.head_dim
    sizes["norms, sums"] = 2 * rows * width * (2 + 2 + 2 + 2 + 1)
    sizes["add_up"] = rows * width * 2 * 3
    return {what: Floor(size, size / card.copy * 1e6) for what, size in sizes.items()}


def compare(
    steps_us: Mapping[int, float],
    alone_us: Mapping[int, float],
    kernels: Mapping[int, Kernels],
    few: int,
    many: int,
    floors: Mapping[str, Floor],
) -> dict[str, Any]:
    """What one more layer adds to a captured step.

    Args:
      steps_us, alone_us, kernels: of steps of so many layers: microseconds; the same where no kernels
        overlap; and what runs then.

    Returns:
      "layer_us": of a captured step; "alone_us": where no kernels overlap; "kernels": of each purpose its
      "runs", "us" in kernels, "floor_us", "bytes"; "floor_us": the sum of those that ran; "kernels_us", the
      same; "gaps_us": what is left of alone_us, between kernels and where they are launched.
    """
    sums: dict[str, list[float]] = {}
    for sign, count in ((1, many), (-1, few)):
        for name, (runs, us) in kernels[count].items():
            mine = sums.setdefault(purpose(name), [0.0, 0.0])
            mine[0] += sign * runs / (many - few)
            mine[1] += sign * us / (many - few)
    # Once a step, not once a layer: what is left of these is noise.
    rows = [(what, runs, us) for what, (runs, us) in sums.items() if runs > 0.05 or us > 0.5]
    nothing = Floor(0.0, 0.0)
    parts = [
        {
            "kernel": what,
            "runs": round(runs, 2),
            "us": round(us, 2),
            "floor_us": round(floors.get(what, nothing).us, 2),
            "bytes": round(floors.get(what, nothing).num_bytes),
        }
        for what, runs, us in sorted(rows, key=lambda row: -row[2])
    ]
    layer_us, apart_us = (
        (times[many] - times[few]) / (many - few) for times in (steps_us, alone_us)
    )
    kernels_us = sum(part["us"] for part in parts)
    return {
        "layer_us": round(layer_us, 2),
        "alone_us": round(apart_us, 2),
        "kernels_us": round(kernels_us, 2),
        "floor_us": round(sum(part["floor_us"] for part in parts), 2),
        "gaps_us": round(apart_us - kernels_us, 2),
        "launches": round(sum(part["runs"] for part in parts), 1),
        "kernels": parts,
    }


def text(found: Mapping[str, Any]) -> str:
    """The same, for people."""
    lines = [
        f"  {part['us']:8.2f} us in {part['runs']:5.2f} of {part['kernel']}, floor {part['floor_us']:.2f}"
        for part in found["kernels"]
    ]
    return "\n".join(
        [
            f"a layer: {found['layer_us']:.1f} us; one by one {found['alone_us']:.1f}, kernels "
            f"{found['kernels_us']:.1f}, gaps {found['gaps_us']:.1f}; floors {found['floor_us']:.1f}; "
            f"{found['launches']:.1f} launches",
            *lines,
        ]
    )
