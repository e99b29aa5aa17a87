"""What a compiled step may cost: the promises of the design, each a gate that names what broke it.

Knows no exceptions: what cannot hold yet is listed, with a date, where the gates are tested.
"""

import math
from dataclasses import dataclass

from glm_jax.aot.findings import Findings, local_shape
from glm_jax.aot.graphs import Graphs
from glm_jax.config import ModelConfig
from glm_jax.environment import MEMORY_SHARE
from glm_jax.shapes import Phase, StepShapes
from glm_jax.steps import StepSpecs, slot_shapes
from glm_jax.targets.target import Target

TWO_SUMS = "two sums over devices a layer"
BF16_SUMS = "sums over devices in bfloat16"
NO_OTHER_TRAFFIC = "no other collective in a layer"
NO_WEIGHT_COPY = "no copy of a layer's weights"
NO_CACHE_COPY = "no copy of the cache"
CACHE_IN_PLACE = "the cache is updated in place"
TEMPORARIES = "temporaries within bounds"
FITS = "fits in memory"
FEW_KERNELS = "few kernels a layer"
ONE_GRAPH = "one command buffer a step"

# Launches of a decode layer, sums among them, and beside them XLA's count of turns of the loop. Eight,
# and one more where so many tokens leave the router's products no room in its picks' kernel.
MAX_LAYER_KERNELS, MAX_TURN_KERNELS = 9, 1
# Bytes a device may spend beside its arguments. Of 256 rows decoding, sampling holds seven arrays of
# float32 logits of 155 MB at once, and a layer less than 300 MB; a prefill of 8192 tokens works on more.
MAX_TEMPORARIES: dict[Phase, int] = {"decode": 1_200_000_000, "prefill": 4 * 10**9}
# Outside the layers a step sums the embedding once and joins the logits once.
_SUMS_OUTSIDE, _GATHERS_OUTSIDE = 1, 1
_SHARED_LOGITS = "all-to-all", "f32"


@dataclass(frozen=True, slots=True, order=True)
class Violation:
    """A gate that did not hold.

    Attributes:
      gate: one of the names above.
      op: the operation at fault, by its named scope; "" where no single one is.
      detail: what was found.
    """

    gate: str
    op: str
    detail: str


def check(
    findings: Findings,
    config: ModelConfig,
    shapes: StepShapes,
    specs: StepSpecs,
    phase: Phase,
    target: Target,
) -> list[Violation]:
    """Everything the step of a phase does that it may not; an empty list is a pass."""
    violations = _traffic(findings, config.num_hidden_layers) + _copies(findings)
    if phase == "decode":
        violations += _launches(findings)
    one_stack = 1
    for size in local_shape(specs.cache, target.num_devices):
        one_stack *= size
    kv_bytes = 2 * one_stack * specs.cache.dtype.itemsize
    slot_bytes = sum(4 * math.prod(shape) for shape in slot_shapes(shapes))
    if findings.aliased_bytes != kv_bytes + slot_bytes:
        detail = f"{findings.aliased_bytes - slot_bytes} bytes of {kv_bytes} are aliased"
        violations.append(Violation(CACHE_IN_PLACE, "", detail))
    if findings.temporary_bytes > MAX_TEMPORARIES[phase]:
        detail = f"{findings.temporary_bytes} bytes, more than {MAX_TEMPORARIES[phase]}"
        violations.append(Violation(TEMPORARIES, "", detail))
    if target.memory is not None:
        needed = findings.argument_bytes + findings.temporary_bytes
        if needed > MEMORY_SHARE * target.memory:
            detail = f"{needed} bytes, more than {MEMORY_SHARE:.0%} of {target.memory}"
            violations.append(Violation(FITS, "", detail))
    return sorted(violations)


def _traffic(findings: Findings, num_layers: int) -> list[Violation]:
    # A sum in a fixed order is an all-to-all, after which everyone gathers the sums; that of logits
    # gives each device those of its share of the rows, of whose tokens everyone gathers what they are.
    # What is exchanged so in every layer is a sum that nobody rounded.
    logits = [
        each
        for each in findings.collectives
        if (each.kind, each.dtype) == _SHARED_LOGITS and each.executions <= _GATHERS_OUTSIDE
    ]
    found = [each for each in findings.collectives if each not in logits]
    sums = [each for each in found if each.kind in ("all-reduce", "all-to-all")]
    gathers = [each for each in found if each.kind == "all-gather"]
    others = [each for each in found if each not in sums + gathers]
    violations = []
    executions = sum(each.executions for each in sums) + findings.fused_sums
    if executions != 2 * num_layers + _SUMS_OUTSIDE:
        detail = f"{executions} sums in a step of {num_layers} layers"
        violations.append(Violation(TWO_SUMS, "", detail))
    violations += [
        Violation(BF16_SUMS, "", f"{each.executions} {each.kind} of {each.dtype}")
        for each in sums
        if each.dtype != "bf16"
    ]
    in_order = sum(each.executions for each in sums if each.kind == "all-to-all")
    of_sums = sum(each.executions for each in gathers if each.dtype == "bf16")
    if sum(each.executions for each in logits) > _GATHERS_OUTSIDE:
        others = others + logits
    if sum(each.executions for each in gathers) > min(in_order, of_sums) + _GATHERS_OUTSIDE:
        others = others + gathers
    violations += [
        Violation(NO_OTHER_TRAFFIC, "", f"{each.executions} {each.kind} of {each.dtype}")
        for each in others
    ]
    return violations


def _launches(findings: Findings) -> list[Violation]:
    violations = []
    names, graphs = findings.turn_kernels, findings.graphs
    if len(names) > findings.layers_a_turn * MAX_LAYER_KERNELS + MAX_TURN_KERNELS:
        detail = f"{len(names)} of {findings.layers_a_turn}: {', '.join(names)}"
        violations.append(Violation(FEW_KERNELS, "", detail))
    if graphs is not None and graphs != Graphs(1, 0):
        detail = (
            f"{graphs.command_buffers} command buffers, and {graphs.launches_outside_of_them} "
            "launches outside of them"
        )
        violations.append(Violation(ONE_GRAPH, "", detail))
    return violations


def _copies(findings: Findings) -> list[Violation]:
    violations = []
    for copy in findings.copies:
        detail = f"{copy.path}: {copy.how} of {copy.num_bytes} bytes, {copy.executions} times"
        gate = NO_CACHE_COPY if copy.path == "cache" else NO_WEIGHT_COPY
        violations.append(Violation(gate, copy.op, detail))
    return violations
