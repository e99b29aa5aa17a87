"""Runs a kernel's PTX on this machine: the few instructions that our own PTX is of, a warp at a time.

Knows no kernel. Warps of all CTAs go on in a random order, a few instructions each, and meet where they
wait for each other. A branch is for a warp as a whole; a register is read only after it was written.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

WARP, WARPS = 32, 4
_LOW = np.uint64(0xFFFFFFFF)
_ALL_LANES = np.ones(WARP, bool)
_FEW = 40
_FREE = {"bar.warp.sync", "cp.async.wait_all"}
_FREE |= {"cp.async.bulk.commit_group", "cp.async.bulk.wait_group.read"}
_COMPARED = {"lt": np.less, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal}
_REDUCED = {"max": np.max, "min": np.min, "or": np.bitwise_or.reduce}
_COMPUTED: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "rem": np.remainder,
    "mad": lambda a, b, c: a * b + c,
    "div": lambda a, b: a / b if a.dtype == np.float32 else a // b,
    "popc": np.bitwise_count,
    "shl": lambda a, b: np.where(b < 32, a << np.minimum(b, 31), 0),
    "shr": lambda a, b: np.where(b < 32, a >> np.minimum(b, 31), np.where(a < 0, -1, 0)),
}  # fmt: skip


class Memory:
    """Arrays and the addresses that they have in a kernel."""

    def __init__(self, base: int) -> None:
        self._next = base
        self._arrays: list[tuple[int, np.ndarray]] = []

    def add(self, array: np.ndarray) -> int:
        """The address of an array, which a kernel then reads and writes."""
        base = self._next
        self._arrays.append((base, array.view(np.uint8).reshape(-1)))
        self._next += (array.nbytes // 4096 + 2) * 4096
        return base

    def at(self, address: int, size: int) -> np.ndarray:
        """The bytes there.

        Raises:
          IndexError: they are of no array, or not aligned to their own size.
        """
        for base, array in self._arrays:
            if (
                base <= address
                and address + size <= base + len(array)
                and not address % min(size, 16)
            ):
                return array[address - base : address - base + size]
        raise IndexError(f"{size} bytes at {address:#x}")


class _Instruction(NamedTuple):
    """Words of its name, and its operands; with a predicate, for lanes where that is not is_off."""

    predicate: str | None
    is_off: bool
    words: list[str]
    operands: list[str]


def _parsed(line: str) -> _Instruction:
    predicate = None
    if line.startswith("@"):
        predicate, line = line[1:].split(" ", 1)
    name, _, rest = line.partition(" ")
    operands = [part.strip() for part in re.split(r",(?![^{]*\})", rest)]
    is_off = predicate is not None and predicate.startswith("!")
    words = ["free"] if name in _FREE else name.split(".")
    return _Instruction(predicate and predicate.removeprefix("!"), is_off, words, operands)


class Program:
    """PTX between braces: instructions, labels, and the types of registers."""

    def __init__(self, code: str) -> None:
        self.types: dict[str, str] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[_Instruction] = []
        inner = code.strip().removeprefix("{").removesuffix("}")
        for line in re.split(r"[;\n]+", inner):
            if declared := re.match(r"\s*\.reg \.(\w+) (.+)", line):
                self.types |= dict.fromkeys(re.split(r",\s*", declared[2].strip()), declared[1])
            elif label := re.match(r"\s*(\w+):\s*$", line):
                self.labels[label[1]] = len(self.instructions)
            elif line.strip():
                self.instructions.append(_parsed(line.strip()))


class _Warp:
    def __init__(
        self, program: Program, operands: Sequence[int], place: tuple[int, int], memory: Any
    ) -> None:
        self.program, self.operands, self.memory = program, operands, memory
        self.cta, self.warp = place
        self.at, self.is_waiting = 0, False
        self.registers: dict[str, np.ndarray] = {}

    @property
    def is_done(self) -> bool:
        return self.at == len(self.program.instructions)

    def read(self, name: str, kind: str = "b64") -> np.ndarray:
        bits = self.registers.get(name)
        if bits is None:
            bits = self.registers[name] = self._constant(name)
        if kind == "pred" or kind.endswith("64"):
            return bits
        return (bits & _LOW).astype(np.uint32).view({"f": "f4", "s": "i4"}.get(kind[0], "u4"))

    def _constant(self, name: str) -> np.ndarray:
        """What never changes of a warp, in 64 bits."""
        assert name not in self.program.types, f"{name} was never written"
        if name == "%tid.x":
            return np.arange(WARP, dtype=np.uint64) + np.uint64(WARP * self.warp)
        if name == "%ctaid.x":
            value = self.cta
        elif name.startswith("$"):
            value = self.operands[int(name[1:])]
        else:
            value = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(WARP, value, np.uint64)

    def write(self, name: str, values: np.ndarray, mask: np.ndarray) -> None:
        if values.dtype.itemsize == 4:
            values = values.view(np.uint32)
        if values.dtype != bool:
            values = values.astype(np.uint64)
        if self.program.types[name] in ("b32", "f32"):
            values = values & _LOW
        if mask is not _ALL_LANES:
            values = np.where(mask, values, self.registers.get(name, 0 * values))
        self.registers[name] = values

    def address(self, operand: str) -> np.ndarray:
        found = re.fullmatch(r"\[([^+\]]+)(?:\+(\d+))?\]", operand)
        assert found, operand
        return self.read(found[1]) + np.uint64(found[2] or 0)

    def bytes_of(self, space: str, address: np.ndarray, lane: int, size: int) -> np.ndarray:
        return self.memory[space].at(int(address[lane]), size)

    def step(self) -> None:
        predicate, is_off, words, operands = self.program.instructions[self.at]
        self.at += 1
        mask = _ALL_LANES
        if predicate is not None:
            mask = self.read(predicate).astype(bool) ^ is_off
        if words[0] == "bra":
            assert mask.all() or not mask.any(), "the warp goes two ways"
            self.at = self.program.labels[operands[0]] if mask.all() else self.at
        elif words[0] == "bar":
            self.is_waiting = True
        elif words[0] in ("ld", "st", "cp"):
            self._move(words, operands, mask)
        elif words[0] in ("redux", "shfl", "vote"):
            assert mask.all(), "all lanes take part"
            self._exchange(words, operands)
        elif words[0] != "free":
            self._compute(words, operands, mask)

    def _move(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        lanes = np.flatnonzero(mask).tolist()
        if words[0] == "cp":
            to, source, size = *map(self.address, operands[:2]), int(operands[2])
            spaces = ("global", "shared") if words[2] == "bulk" else ("shared", "global")
            for lane in lanes:
                source_bytes = self.bytes_of(spaces[1], source, lane, size)
                self.bytes_of(spaces[0], to, lane, size)[:] = source_bytes
            return
        space, dtype = "shared" if "shared" in words else "global", f"u{int(words[-1][1:]) // 8}"
        address = self.address(operands[words[0] == "ld"])
        size = np.dtype(dtype).itemsize
        if words[0] == "ld":
            values = np.zeros(WARP, np.uint64)
            for lane in lanes:
                values[lane] = self.bytes_of(space, address, lane, size).view(dtype)[0]
            self.write(operands[0], values, mask)
            return
        values = self.read(operands[1])
        for lane in lanes:
            self.bytes_of(space, address, lane, size).view(dtype)[0] = values[lane].astype(dtype)

    def _exchange(self, words: list[str], operands: list[str]) -> None:
        every, lane = _ALL_LANES, np.arange(WARP)
        if words[0] == "vote":
            self.write(operands[0], np.full(WARP, self.read(operands[1]).any()), every)
            return
        values = self.read(operands[1], "u32")
        if words[0] == "redux":
            self.write(operands[0], np.full(WARP, _REDUCED[words[2]](values)), every)
            return
        number = self.read(operands[2], "u32").astype(int)
        source = {"bfly": lane ^ number, "up": lane - number, "idx": number % WARP}[words[2]]
        to, _, is_found = operands[0].partition("|")
        self.write(to, values[np.where(source >= 0, source, lane)], every)
        if is_found:
            self.write(is_found, source >= 0, every)

    def _compute(self, words: list[str], operands: list[str], mask: np.ndarray) -> None:
        name, kind, to, *inputs = words[0], words[-1], *operands
        if name == "mov" and to.startswith("{"):
            low, high = to.strip("{}").split(", ")
            self.write(low, self.read(inputs[0]) & _LOW, mask)
            self.write(high, self.read(inputs[0]) >> np.uint64(32), mask)
        elif name == "mov" and inputs[0].startswith("{"):
            low, high = (self.read(each) & _LOW for each in inputs[0].strip("{}").split(", "))
            self.write(to, low | high << np.uint64(32), mask)
        elif name == "mov":
            self.write(to, self.read(inputs[0], kind), mask)
        elif name == "selp":
            chosen = self.read(inputs[2]).astype(bool)
            self.write(to, np.where(chosen, self.read(inputs[0]), self.read(inputs[1])), mask)
        elif name == "setp":
            holds = _COMPARED[words[1]](*(self.read(each, kind) for each in inputs[:2]))
            if words[2] == "and":
                holds = holds & self.read(inputs[2]).astype(bool)
            self.write(to, holds, mask)
        elif name == "lop3":
            a, b, c = (self.read(each, kind) for each in inputs[:3])
            table = (1 & int(inputs[3], 0) >> np.arange(8)).astype(np.uint32)
            bits = range(32)
            picked = [table[(a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1] << n for n in bits]
            self.write(to, np.bitwise_or.reduce(picked).astype(np.uint32), mask)
        elif "wide" in words:
            factors = (self.read(each) & _LOW for each in inputs[:2])
            added = self.read(inputs[2]) if name == "mad" else np.uint64(0)
            self.write(to, np.multiply(*factors) + added, mask)
        else:
            found = _COMPUTED[name](*(self.read(each, kind) for each in inputs))
            self.write(to, found.astype(self.read("0", kind).dtype), mask)


def run(
    codes: Sequence[tuple[str, Sequence[str]]],
    numbers: range,
    device: Memory,
    addresses: Callable[[int, Memory], Mapping[str, int]],
    seed: int,
) -> None:
    """Runs CTAs of 128 threads, each of which runs all codes, one after the other.

    Args:
      codes: PTX, and the names of its operands.
      numbers: of the CTAs.
      addresses: of a CTA's operands, by name; it adds the CTA's shared memory to what it is given.
    """
    order, ctas = np.random.default_rng(seed), []
    for cta in numbers:
        shared = Memory(1024)
        ctas.append((cta, addresses(cta, shared), {"global": device, "shared": shared}))
    for code, names in codes:
        program = Program(code)
        groups = [
            [
                _Warp(program, [at[name] for name in names], (cta, warp), memory)
                for warp in range(WARPS)
            ]
            for cta, at, memory in ctas
        ]
        warps = [warp for group in groups for warp in group]
        while warps:
            order.shuffle(warps)  # pyright: ignore[reportArgumentType]
            for warp in warps:
                for _ in range(_FEW):
                    if warp.is_waiting or warp.is_done:
                        break
                    warp.step()
            for group in groups:
                if all(warp.is_waiting for warp in group):
                    for warp in group:
                        warp.is_waiting = False
            warps = [warp for warp in warps if not warp.is_done]
