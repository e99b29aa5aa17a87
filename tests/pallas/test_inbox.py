"""Rows that devices write to each other: why none is lost, what the compiler makes of it, and its bits.

The order of things is tested on a model, in every order that a seed makes; the kernel itself only runs
on several GPUs, and elsewhere its code is read.
"""

import random
import re
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from glm_jax import sharding
from glm_jax.pallas import all_reduce, norm
from glm_jax.pallas.chip import Chip, chip_in_trace
from glm_jax.pallas.inbox import make_inbox
from glm_jax.sharding import MESH_AXIS
from tests.pallas.compiled import CompiledKernel, Program, compile_programs, needs_compiler

ROWS, WIDTH, EPS = 6, 5120, 1e-5
TARGETS = ("h200x2", "b200x8")

# A model: what a slot holds is the number of its exchange.
Slots = dict[tuple[int, int, int, int], int]


def cta(slots: Slots, device: int, row: int, exchange: int, devices: int) -> Iterator[None]:
    """A row's part of one exchange on one device, step by step."""
    slot = exchange % 2
    others = [(device + distance) % devices for distance in range(1, devices)]

    def send(peers: list[int]) -> Iterator[None]:
        for peer in peers:
            assert (peer, slot, device, row) not in slots, "overwritten before it was read"
            slots[peer, slot, device, row] = exchange
            yield

    def receive(senders: list[int]) -> Iterator[None]:
        for sender in senders:
            while (device, slot, sender, row) not in slots:
                yield
        for sender in senders:
            assert slots.pop((device, slot, sender, row)) == exchange
            yield

    if not devices % 2:  # at once
        yield from send(others)
        yield from receive(others)
        return
    owner = row % devices
    yield from send([owner])
    yield from receive([*range(devices)] if owner == device else [owner])
    yield from send(others if owner == device else [])


def kernels(
    slots: Slots, device: int, devices: int, rows: int, exchanges: int, order: random.Random
):
    """All exchanges of a device, each a kernel whose CTAs run in any order."""
    for exchange in range(exchanges):
        running = [cta(slots, device, row, exchange, devices) for row in range(rows)]
        while running:
            chosen = order.choice(running)
            if next(chosen, StopIteration) is StopIteration:
                running.remove(chosen)
            yield


@pytest.mark.parametrize("seed", range(40))
def test_no_row_is_overwritten_or_taken_for_another_and_all_end(seed: int) -> None:
    order = random.Random(seed)
    devices, rows, exchanges = order.choice([2, 3, 5, 8]), order.choice([1, 6]), 6
    slots: Slots = {}
    running = {
        device: kernels(slots, device, devices, rows, exchanges, order) for device in range(devices)
    }
    # Some devices are faster than others.
    speeds = {device: order.choice([1, 5, 50]) for device in running}
    for _ in range(1_000_000):
        device = order.choice(list(running))
        for _ in range(order.randrange(speeds[device]) + 1):
            if device in running and next(running[device], StopIteration) is StopIteration:
                del running[device]
        if not running:
            break
    assert not running and not slots


def busy(steps: int) -> Iterator[None]:
    """A CTA that has to do with no other device."""
    for _ in range(steps):
        yield


class Overlapping:
    """A device whose kernels begin early, as launch_order has it, on so few multiprocessors that CTAs of
    one kernel keep those of another waiting."""

    def __init__(
        self, kernels: list[list[Iterator[None]]], room: int, order: random.Random
    ) -> None:
        self.kernels, self.room, self.order = kernels, room, order
        self.started = [0] * len(kernels)
        self.running: list[tuple[int, Iterator[None]]] = []

    def has_ended(self, kernel: int) -> bool:
        return kernel < 0 or (
            self.started[kernel] == len(self.kernels[kernel])
            and all(kernel != of for of, _ in self.running)
        )

    def may_begin(self, kernel: int) -> bool:
        ahead = kernel - 1
        if ahead < 0:
            return True
        has_started = self.started[ahead] == len(self.kernels[ahead])
        # What waits for the kernel ahead of its own lets nobody begin.
        return has_started and self.has_ended(ahead - 1)

    def step(self) -> bool:
        """Whether anything is left to do; does some of it, if that can be done now."""
        left = [at for at, ctas in enumerate(self.kernels) if self.started[at] < len(ctas)]
        if left and len(self.running) < self.room and self.may_begin(left[0]):
            at = left[0]
            self.running.append((at, self.kernels[at][self.started[at]]))
            self.started[at] += 1
        if self.running:
            chosen = self.order.choice(self.running)
            if self.has_ended(chosen[0] - 1) and next(chosen[1], StopIteration) is StopIteration:
                self.running.remove(chosen)
        return bool(left or self.running)


@pytest.mark.parametrize("seed", range(40))
def test_no_row_is_lost_and_all_end_where_launches_overlap(seed: int) -> None:
    """Between the sums are kernels of any number of CTAs; a sum's CTAs, up to all the room there is."""
    order = random.Random(seed)
    devices, room = order.choice([2, 3, 5, 8]), order.choice([1, 4, 9])
    slots: Slots = {}
    shapes = [
        (
            order.randrange(room) + 1,
            [order.randrange(3 * room) + 1 for _ in range(order.randrange(3))],
        )
        for _ in range(6)
    ]
    rows = [shape[0] for shape in shapes]
    turns = [[sum(row < count for count in rows[:at]) for row in range(room)] for at in range(6)]
    running: dict[int, Overlapping] = {}
    for device in range(devices):
        kernels: list[list[Iterator[None]]] = []
        for at, (count, between) in enumerate(shapes):
            kernels += [[busy(order.randrange(5)) for _ in range(each)] for each in between]
            ctas = [cta(slots, device, row, turns[at][row], devices) for row in range(count)]
            kernels.append(ctas)
        running[device] = Overlapping(kernels, room, order)
    speeds = {device: order.choice([1, 5, 50]) for device in running}
    for _ in range(1_000_000):
        device = order.choice(list(running))
        for _ in range(order.randrange(speeds[device]) + 1):
            if device in running and not running[device].step():
                del running[device]
        if not running:
            break
    assert not running and not slots


def programs(chip: Chip) -> dict[str, Program]:
    """Sums of a row of every device, and of what experts made."""
    spec = jax.ShapeDtypeStruct
    row = spec((ROWS, WIDTH), jnp.bfloat16)
    last = row, row, spec((2, WIDTH), jnp.bfloat16), spec((), jnp.int32)
    experts = spec((800, WIDTH), jnp.bfloat16), row, spec((ROWS, 8), jnp.int32)
    weights = spec((ROWS, 8), jnp.float32)
    return {
        "rows": (partial(_reduce, chip), last),
        "experts": (partial(_reduce_experts, chip), (*experts, weights, *last[1:])),
    }


def _reduce(chip: Chip, partial_rows: Array, *operands: Array, repeats: int = 1) -> norm.NormedRows:
    num_rows, width = operands[0].shape
    devices = sharding.num_devices()
    inbox = make_inbox(num_rows, width, axis_name=MESH_AXIS, num_devices=devices)
    call = partial(
        all_reduce.all_reduce_add_norm, partial_rows, eps=EPS, axis_name=MESH_AXIS,
        num_devices=devices, chip=chip, inbox=inbox,
    )  # fmt: skip
    found = call(*operands)
    for _ in range(repeats - 1):
        found = call(found.residual, *operands[1:])
    return found


def _reduce_experts(chip: Chip, *operands: Array) -> norm.NormedRows:
    return _reduce(chip, all_reduce.Summands(*operands[:4]), *operands[4:])  # type: ignore[arg-type]


@pytest.fixture(params=TARGETS, scope="module")
def sums(request: pytest.FixtureRequest) -> tuple[int, dict[str, CompiledKernel]]:
    compiled = compile_programs(request.param, programs)
    found = {
        name: next(kernel for kernel in of_program if kernel.name == "all_reduce_add_norm")
        for name, of_program in compiled.items()
    }
    return int(request.param.split("x")[1]), found


@needs_compiler
class TestCompiled:
    def test_a_row_is_sent_before_anybody_is_waited_for(
        self, sums: tuple[int, dict[str, CompiledKernel]]
    ) -> None:
        devices, found = sums
        for kernel in found.values():
            steps = re.findall(
                r"(st|ld)\.relaxed\.sys\.global\.v4\.b32|(bar)\.sync|(@is_early)", kernel.ptx
            )
            order = [step for step in ("".join(step) for step in steps) if step != "bar"]
            pieces = WIDTH // 128 // 8
            # Two add up in either order; more send to themselves too, and wait for three at a time.
            others = 1 if devices == 2 else devices
            expected = ["st"] * pieces * others
            for first in range(0, others, 3):
                together = min(3, others - first) * pieces
                expected += ["ld"] * together + ["@is_early"] + ["st"] * together
            assert order == expected

    def test_nothing_else_holds_it_up(self, sums: tuple[int, dict[str, CompiledKernel]]) -> None:
        for kernel in sums[1].values():
            waits = r"multimem|membar|cp\.async|\b(?:atom|red)\.|fence\.(?!mbarrier_init)"
            assert not re.search(waits, kernel.ptx), kernel
            assert not kernel.uses_local_memory, kernel
            # Two CTAs of 128 threads fit a multiprocessor, so those of 256 rows run at once.
            assert kernel.registers <= 255


@pytest.mark.parametrize(
    ("num_rows", "num_devices", "expected"),
    [(256, 2, False), (6, 8, False), (8, 8, True), (16, 4, False), (64, 4, True)],
)
def test_many_rows_among_many_devices_are_added_up_by_one(
    num_rows: int, num_devices: int, expected: bool
) -> None:
    assert all_reduce.takes_two_steps(num_rows, num_devices) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("in_two_steps", [False, True])
@pytest.mark.parametrize("num_rows", [1, 64, 256])
def test_bits_are_those_of_the_sum_apart(
    num_rows: int, in_two_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_reduce, "takes_two_steps", lambda *_: in_two_steps)
    devices = jax.devices("gpu")
    if len(devices) < 2:
        pytest.skip("several GPUs")
    mesh, repeats = Mesh(np.array(devices), (MESH_AXIS,)), 5
    keys = jax.random.split(jax.random.key(num_rows), 3)
    draw = partial(jax.random.normal, dtype=jnp.bfloat16)
    operands = (
        draw(keys[0], (len(devices), num_rows, WIDTH)),
        draw(keys[1], (num_rows, WIDTH)),
        draw(keys[2], (2, WIDTH)),
        jnp.int32(1),
    )

    def sent(partial_rows: Array, *operands: Array) -> Array:
        chip = chip_in_trace()
        assert chip is not None
        return _reduce(chip, partial_rows[0], *operands, repeats=repeats).residual[None]

    def apart(partial_rows: Array, residual: Array, weight: Array, layer: Array) -> Array:
        added = sharding.sum_in_order(partial_rows[0])
        return lax.fori_loop(0, repeats, lambda _, total: total + added, residual)[None]

    split, whole = PartitionSpec(MESH_AXIS), PartitionSpec()
    found = [
        jax.jit(
            jax.shard_map(
                body, mesh=mesh, in_specs=(split, whole, whole, whole), out_specs=split,
                check_vma=False,
            ),
            compiler_options={"xla_allow_excess_precision": False},
        )(*operands)
        for body in (sent, apart)
    ]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(found[0]), np.asarray(found[1]))
