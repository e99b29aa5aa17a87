"""A compiled program as XLA prints it: computations, instructions, and how often each runs.

Knows no model. Only what is executed as such is kept apart: what a fusion computes inside never
reaches memory.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<rest>.*)$")
_OPCODE = re.compile(r" ?(?P<opcode>[a-z][a-z0-9-]*)\((?P<operands>[^)]*)\)")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<dims>[\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%([^\s,]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LONG_COMMENT = re.compile(r"/\*[^*]*\*/")

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0}


@dataclass(frozen=True, slots=True)
class ArrayType:
    """Element type and dimensions of a value."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def dims_above_one(self) -> tuple[int, ...]:
        """Dimensions, without those of size one."""
        return tuple(size for size in self.dims if size > 1)

    @property
    def num_bytes(self) -> int:
        """Bytes, without padding."""
        known = _BYTES.get(self.dtype)
        width = known if known is not None else int(re.sub(r"\D", "", self.dtype)[:3]) / 8
        return int(self.size * width)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation.

    Attributes:
      home: the computation it stands in.
      types: of its result; several when that is a tuple.
      called: computations it runs or fuses.
      trips: of a while loop, how often its body runs, when the compiler knows.
      op_name: the path of named scopes it was traced under, "" if none is kept.
      text: the whole line.
    """

    name: str
    home: str
    opcode: str
    types: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    trips: int | None
    op_name: str
    is_root: bool
    text: str


Computation = dict[str, Instruction]


@dataclass(frozen=True, slots=True)
class Program:
    """All computations by name, the entry first to run."""

    entry: str
    computations: dict[str, Computation] = field(repr=False)

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs by itself, and how often in one step.

        A loop of unknown length (pages of a cache, bits of a threshold) counts as one turn.
        """
        yield from self._run(self.entry, 1)

    def _run(self, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in self.computations[name].values():
            yield instruction, times
            if instruction.opcode in ("while", "conditional", "call", "async-start"):
                inner = times * (instruction.trips or 1)
                for called in instruction.called:
                    yield from self._run(called, inner)

    def fused(self, instruction: Instruction) -> Computation:
        """What a fusion computes inside; empty for anything else."""
        if instruction.opcode not in ("fusion", "fusion-start"):
            return {}
        return self.computations[instruction.called[0]]

    def operand_types(self, instruction: Instruction) -> list[ArrayType]:
        """The arrays it reads."""
        near = self.computations[instruction.home]
        return [kind for name in instruction.operands for kind in near[name].types]

    def result_types(self, instruction: Instruction) -> tuple[ArrayType, ...]:
        """The arrays it writes; a -start repeats what it reads before them."""
        if instruction.opcode == "fusion-start":
            return instruction.types[len(self.operand_types(instruction)) :]
        return instruction.types[:1] if instruction.opcode == "copy-start" else instruction.types

    def produced_by(self, instruction: Instruction) -> set[str]:
        """The opcodes that write the instruction's results, seen through fusions and bitcasts."""
        inside = self.fused(instruction)
        if not inside:
            return {instruction.opcode}
        pending = [each for each in inside.values() if each.is_root]
        opcodes: set[str] = set()
        while pending:
            each = pending.pop()
            if each.opcode in ("tuple", "bitcast", "reshape"):
                pending += [inside[name] for name in each.operands]
            else:
                opcodes.add(each.opcode)
        return opcodes


def parse_program(text: str) -> Program:
    """Reads what Compiled.as_text() gives.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, home, current = None, "", None
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            home = opened["name"]
            current = computations.setdefault(home, {})
            entry = home if opened["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(home, found)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is not a compiled program")
    return Program(entry, computations)


def _instruction(home: str, found: re.Match[str]) -> Instruction:
    rest = _LONG_COMMENT.sub("", found["rest"])
    end = _end_of_type(rest)
    operation = _OPCODE.match(rest, end)
    assert operation is not None, f"unreadable instruction: {rest[:200]}"
    called = _CALLED.findall(rest)
    for branches in _BRANCHES.findall(rest):
        called += [name.strip().lstrip("%") for name in branches.split(",")]
    trips, op_name = _TRIPS.search(rest), _OP_NAME.search(rest)
    return Instruction(
        name=found["name"],
        home=home,
        opcode=operation["opcode"],
        types=tuple(
            ArrayType(each["dtype"], tuple(int(n) for n in each["dims"].split(",") if n))
            for each in _ARRAY.finditer(rest, 0, end)
        ),
        operands=tuple(re.findall(r"%([^\s,()]+)", operation["operands"])),
        called=tuple(called),
        trips=int(trips[1]) if trips else None,
        op_name=op_name[1] if op_name else "",
        is_root=found["root"] is not None,
        text=rest,
    )


def _end_of_type(rest: str) -> int:
    """Where the result's type ends: at a space, outside of any parenthesis."""
    depth = 0
    for index, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if character == " " and depth == 0:
            return index
    raise ValueError(f"an instruction without an operation: {rest[:200]}")
