"""A plan: what a model needs on a target, how fast it can be there, and what limits it.

Knows neither how a plan is shown nor any device: it is computed from shapes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.aot.memory import Limits, Memory, measure, refuse, shapes_for
from glm_jax.aot.roofline import Assumptions, Cells, Roofline, StepTime, table
from glm_jax.config import ModelConfig
from glm_jax.shapes import StepShapes
from glm_jax.targets.target import Target, TargetError

PLANNED_KV_DTYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}
ACTIVATIONS = np.dtype(ml_dtypes.bfloat16)

_CONTEXTS = (2048, 8192, 32768, 131072)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything `plan` has to say.

    Attributes:
      model: the preset or directory.
      kv_dtype: "bf16" or "fp8_e4m3".
      decode: (rows, context, time) of a step.
      prefill: (chunk, prompt, time) of a step.
      refusal: why the settings do not fit, and which do; None when they fit.
      notes: what the numbers rest on.
    """

    model: str
    target: Target
    limits: Limits
    kv_dtype: str
    shapes: StepShapes
    memory: Memory
    decode: Cells
    prefill: Cells
    refusal: str | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: bytes, seconds, tokens per second."""
        return {
            "model": self.model,
            "target": str(self.target),
            "limits": asdict(self.limits),
            "kv_dtype": self.kv_dtype,
            "shapes": asdict(self.shapes),
            "memory_per_device": asdict(self.memory) | {"headroom": self.memory.headroom},
            "decode": [_cell(*cell, names=("rows", "context")) for cell in self.decode],
            "prefill": [_cell(*cell, names=("chunk", "prompt")) for cell in self.prefill],
            "fits": self.refusal is None,
            "refusal": self.refusal,
            "notes": self.notes,
        }

    def holds(self, rows: int, context: int) -> bool:
        """Whether the cache has room for so many sequences of this length."""
        return rows * context <= self.memory.kv_tokens


def _cell(tokens: int, length: int, time: StepTime, names: tuple[str, str]) -> dict[str, Any]:
    spent = asdict(time) | {"total": time.total}
    return {
        names[0]: tokens,
        names[1]: length,
        "seconds": spent,
        "tokens_per_second": tokens / time.total,
        "limit": time.limit,
    }


def make_plan(
    model: str,
    config: ModelConfig,
    target: Target,
    limits: Limits,
    kv_dtype: str,
    *,
    may_compile: bool,
    assumptions: Assumptions | None = None,
) -> Plan:
    """Plans the model on the target.

    Args:
      kv_dtype: a key of PLANNED_KV_DTYPES.
      may_compile: ask the compiler for the temporaries, if it is installed.

    Raises:
      SizingError: the devices cannot share the model, or it has no sequences this long.
      TargetError: the target is this machine, which has no description.
    """
    if target.peaks is None:
        raise TargetError("a plan needs a described machine; cpu has neither rates nor memory")
    assumptions = assumptions or Assumptions()
    kept = PLANNED_KV_DTYPES[kv_dtype]
    shapes = shapes_for(config, target, ACTIVATIONS, kept, limits)
    memory = measure(config, target, shapes, ACTIVATIONS, kept, may_compile=may_compile)
    roofline = Roofline(config, ACTIVATIONS, kept, target.peaks, target.num_devices, assumptions)
    lengths = tuple(n for n in _CONTEXTS if n < limits.max_seq_len) + (limits.max_seq_len,)
    chunk = shapes.prefill_budget
    return Plan(
        model=model,
        target=target,
        limits=limits,
        kv_dtype=kv_dtype,
        shapes=shapes,
        memory=memory,
        decode=table(shapes.decode_buckets, lengths, roofline.decode),
        prefill=table((chunk,), lengths, roofline.prefill),
        refusal=refuse(config, target, memory, limits, shapes.page_size, ACTIVATIONS, kept),
        notes=[_memory_note(memory), *assumptions.sentences(config.is_fp8)],
    )


def _memory_note(memory: Memory) -> str:
    if memory.is_compiled:
        return "Temporaries are the compiler's, of the largest prefill and decode step."
    return (
        "Temporaries are an estimate of the reference operations; with the extra aot they are the "
        "compiler's."
    )
