"""What a compiled step does that costs: sums over devices, copies of weights or cache, memory.

Knows the arrays of a step by path and shape; what is allowed of them, gates.py says.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import jax

from glm_jax.aot.graphs import Graphs
from glm_jax.aot.program import ArrayType, Instruction, Program, parse_program
from glm_jax.sharding import WeightSpec, partition_spec
from glm_jax.steps import StepSpecs

_COLLECTIVES = frozenset(
    """all-reduce all-reduce-start all-gather all-gather-start reduce-scatter all-to-all
    all-to-all-start ragged-all-to-all collective-permute collective-permute-start collective-broadcast""".split()
)
# They name or hand on a value that is already in memory.
_NAMES_ONLY = frozenset(
    """parameter get-tuple-element tuple bitcast while conditional call opt-barrier constant
    fusion-done async-done async-update copy-done all-reduce-done all-gather-done all-to-all-done
    collective-permute-done partition-id""".split()
)
# They write a few elements into the array they are given.
_IN_PLACE = frozenset({"scatter", "dynamic-update-slice"})
_DTYPES = {"float8_e4m3fn": "f8e4m3fn", "bfloat16": "bf16", "float32": "f32", "float16": "f16"}


@dataclass(frozen=True, slots=True, order=True)
class Collective:
    """A sum or gather over devices.

    Attributes:
      kind: "all-reduce", ….
      num_bytes: of its result on one device.
      executions: in one step.
    """

    kind: str
    dtype: str
    num_bytes: int
    executions: int


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """A whole layer of a stacked array, or all of it, written to memory again.

    Attributes:
      path: of the array, as in the step's arguments; "cache" for keys and values.
      how: the operation that writes, "dynamic-slice", "convert", ….
      op: the innermost named scope it was traced under.
      num_bytes: written each time.
      executions: in one step.
    """

    path: str
    how: str
    op: str
    num_bytes: int
    executions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one compiled step does, per device.

    Attributes:
      fused_sums: sums over devices that a kernel of ours does together with what follows.
      kernels: launches in one step, copies and sums included; one turn of each loop over pages.
      turn_kernels: the launches of one turn of the loop over layers of experts by name, in order; none
        where the layers are no loop.
      layers_a_turn: of the experts' layers, 0 where they are no loop.
      graphs: of a GPU's step, if whoever compiled it looked.
      aliased_bytes: of arguments that a result takes the place of.
      argument_bytes, temporary_bytes: of memory.
    """

    collectives: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    fused_sums: int
    kernels: int
    turn_kernels: tuple[str, ...]
    layers_a_turn: int
    graphs: Graphs | None
    argument_bytes: int
    aliased_bytes: int
    temporary_bytes: int


def local_shape(spec: WeightSpec, num_devices: int) -> tuple[int, ...]:
    """The shape of one device's part."""
    places = partition_spec(spec.axes)
    return tuple(
        size if place is None else size // num_devices
        for size, place in zip(spec.shape, places, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Stack:
    """A stacked array of the step: how one device's part, or a layer of it, can be recognized."""

    path: str
    dtype: str
    sizes: frozenset[int]
    shapes: frozenset[tuple[int, ...]]

    @classmethod
    def of(cls, path: str, spec: WeightSpec, num_devices: int) -> "_Stack":
        shape = local_shape(spec, num_devices)
        whole, layer = (tuple(n for n in dims if n > 1) for dims in (shape, shape[1:]))
        sizes = frozenset({math.prod(whole), math.prod(layer)})
        return cls(path, _DTYPES[spec.dtype.name], sizes, frozenset({whole, layer}))


def find(
    compiled: jax.stages.Compiled,
    specs: StepSpecs,
    num_devices: int,
    graphs: Graphs | None = None,
) -> Findings:
    """Reads the findings off a compiled step of these arrays."""
    program = parse_program(compiled.as_text() or "")
    stacks = [
        _Stack.of(path, spec, num_devices)
        for path, spec in (specs.weights | {"cache": specs.cache}).items()
        if spec.axes[0] == "layers" and path.endswith((".values", "gate.weight", "cache"))
    ]
    launches = [
        (kernel_name(program, instruction), times)
        for instruction, times in program.executed()
        if instruction.opcode not in _NAMES_ONLY
    ]
    routers = specs.weights.get("layers.moe.gate.weight")
    num_turns = _turns_of(
        [times for _, times in launches], 1 if routers is None else routers.shape[0]
    )
    memory = compiled.memory_analysis()
    assert memory is not None, "XLA analyses the memory of every program it compiles"
    return Findings(
        collectives=_collectives(program),
        copies=_copies(program, stacks),
        fused_sums=sum(times for name, times in launches if name == _FUSED_SUM),
        kernels=sum(times for _, times in launches),
        turn_kernels=tuple(name for name, times in launches if times == num_turns),
        layers_a_turn=routers.shape[0] // num_turns if routers is not None and num_turns else 0,
        graphs=graphs,
        argument_bytes=memory.argument_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def _turns_of(executions: list[int], num_layers: int) -> int:
    """How often the loop over so many layers turns: the one with the most launches of those that some
    layers a turn would make; what is left over of the layers stands before it. 0 where there is none."""
    possible = Counter(
        times
        for times in executions
        if 1 < times <= num_layers and num_layers // (num_layers // times) == times
    )
    return max(possible, key=lambda times: (possible[times], times), default=0)


def kernel_name(program: Program, instruction: Instruction) -> str:
    """What a person would call it: our kernel's name, or XLA's name and the scope it came from."""
    for inside in program.fused(instruction).values():
        if inside.opcode in _COLLECTIVES:
            return inside.opcode
    scopes = instruction.op_name.split("/")
    if instruction.opcode == "custom-call" and "mosaic_gpu" in instruction.text and scopes[1:]:
        return scopes[-2]
    name, scope = re.sub(r"[.\d]+$", "", instruction.name), _scope(instruction)
    return f"{name} ({scope})" if scope else name


def _collectives(program: Program) -> tuple[Collective, ...]:
    found: Counter[tuple[str, str, int]] = Counter()
    for instruction, times in program.executed():
        inside = [*program.fused(instruction).values()]
        for each in [instruction, *inside]:
            if each.opcode in _COLLECTIVES:
                # A -start has its operand among its results: the last one is what it makes.
                result = each.types[-1]
                kind = each.opcode.removesuffix("-start")
                found[kind, result.dtype, result.num_bytes] += times
    return tuple(sorted(Collective(*key, number) for key, number in found.items()))


def _copies(program: Program, stacks: list[_Stack]) -> tuple[Copy, ...]:
    found: Counter[tuple[str, str, str, int]] = Counter()
    for instruction, times in program.executed():
        if instruction.opcode in _NAMES_ONLY or _is_kernel_in_place(instruction):
            continue
        written = program.produced_by(instruction) - _IN_PLACE
        if not written:
            continue
        read = program.operand_types(instruction)
        for result in set(program.result_types(instruction)):
            if stack := _copied(result, read, stacks):
                how, scope = "+".join(sorted(written)), _scope(instruction)
                found[stack.path, how, scope, result.num_bytes] += times
    return tuple(sorted(Copy(*key, number) for key, number in found.items()))


def _copied(result: ArrayType, read: list[ArrayType], stacks: list[_Stack]) -> _Stack | None:
    """The stack of which the result holds a layer or all, going by sizes, then by shapes."""
    candidates = [
        (kind.dims_above_one in stack.shapes, -index, stack)
        for kind in read
        for index, stack in enumerate(stacks)
        if kind.dtype == stack.dtype and kind.size in stack.sizes and result.size in stack.sizes
    ]
    return max(candidates, key=lambda each: each[:2])[2] if candidates else None


def _is_kernel_in_place(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and "output_to_operand_aliasing" in instruction.text


_WRAPPERS = frozenset({"shard_map", "while", "body", "cond", "closed_call", "eval_jaxpr", "jit"})
_FUSED_SUM = "all_reduce_add_norm"


def _scope(instruction: Instruction) -> str:
    """The innermost named scope: In "jit(decode)/shard_map/while/body/experts/dot". Out "experts"."""
    scopes = instruction.op_name.split("/")[:-1]
    named = [scope for scope in scopes if scope not in _WRAPPERS and "(" not in scope]
    return named[-1] if named else ""
