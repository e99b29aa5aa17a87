"""What a GPU reaches, measured where the kernels are: large copies, small ones, products, empty kernels.

Knows no kernel of ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm_jax.pallas.chip import Chip
from tests.perf.clock import LOWERING, time_program
from tests.perf.measure import Case, Step, chip_of

Program = Callable[..., Any]

# Of small copies, read and written together; between them times are interpolated.
_SIZES = tuple(1 << power for power in (16, 18, 20, 21, 22, 23, 24, 25, 26, 28))
_LAYERS = 8
_LARGE = jax.ShapeDtypeStruct((1 << 28,), jnp.float32)
_SIDE = 8192
_DTYPES: dict[str, Any] = {"bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}


@dataclass(frozen=True)
class Card:
    """What this GPU reaches, measured here.

    Attributes:
      name: of the device, as its driver says.
      chip: what kernels are cut for.
      copy: bytes per second of a large copy, read and written together.
      rates: operations per second of a large product, by "fp8" and "bf16".
      copies: seconds of a copy of so many bytes, read and written together, by these, ascending.
      empty: seconds of a kernel that does nothing, on every SM.
    """

    name: str
    chip: Chip
    copy: float
    rates: dict[str, float]
    copies: tuple[tuple[int, float], ...] = ()
    empty: float = 0.0

    def floor(self, case: Case) -> float:
        """Seconds that no version of the case runs much below, however large its parts were."""
        return max(case.bytes / self.copy, case.operations / self.rates[case.unit])

    def small_floor(self, case: Case) -> float:
        """The same for a kernel of this size: a copy of as many bytes, an empty kernel, the operations."""
        copied = self.copy_seconds(case.bytes)
        return max(copied, self.empty, case.operations / self.rates[case.unit])

    def copy_seconds(self, num_bytes: float) -> float:
        """What a copy that moves so many bytes takes, one by one; between measured sizes by their logarithms."""
        if not self.copies or num_bytes >= self.copies[-1][0]:
            return num_bytes / self.copy
        below = (self.empty, self.copies[0][0] / 2) if self.copies else (0.0, 1.0)
        size, seconds = below[1], below[0]
        for next_size, next_seconds in self.copies:
            if num_bytes <= next_size:
                share = math.log(max(num_bytes, size) / size) / math.log(next_size / size)
                return seconds * (next_seconds / seconds) ** share if seconds else next_seconds
            size, seconds = next_size, next_seconds
        return num_bytes / self.copy


@dataclass(frozen=True)
class Probes:
    """What measure_card runs, compiled: programs of operands and a layer.

    Attributes:
      copy, empty: of large operands, and of none.
      squares: products of large operands, by their kind.
      copies: of operands of so many layers, by the bytes that one moves.
    """

    copy: Program
    empty: Program
    squares: dict[str, Program]
    copies: dict[int, Program]


def _copy(operands: jax.Array, layer: jax.Array) -> jax.Array:
    # XLA leaves out what adds 0, and the copy with it.
    return operands + (layer + 1).astype(jnp.float32)


def compile_probes(chip: Chip) -> Probes:
    """Compiles all of them."""
    squares = {name: _compiled(_square, _square_of(dtype)) for name, dtype in _DTYPES.items()}
    copies = {size: _compiled(_copy_layer, _layers_of(size)) for size in _SIZES}
    empty = _compiled(partial(_empty, chip), jax.ShapeDtypeStruct((1,), jnp.float32))
    return Probes(_compiled(_copy, _LARGE), empty, squares, copies)


def measure_copy() -> Card:
    """A card of which nothing but the large copy is known."""
    device = jax.devices()[0]
    seconds = _seconds(_compiled(_copy, _LARGE), _LARGE, 1)
    num_bytes = 2 * _LARGE.size * _LARGE.dtype.itemsize
    return Card(device.device_kind, chip_of(device), num_bytes / seconds, {})


def measure_card(probes: Probes | None = None) -> Card:
    """Copies and multiplies large arrays, copies small ones, and does nothing."""
    device = jax.devices()[0]
    chip = chip_of(device)
    probes = probes or compile_probes(chip)
    copied = _seconds(probes.copy, _LARGE, 1)
    rates = {
        name: 2 * _SIDE**3 / _seconds(program, _square_of(_DTYPES[name]), 1)
        for name, program in probes.squares.items()
    }
    copies = []
    for size, program in probes.copies.items():
        operands = _layers_of(size)
        copies.append((size, _seconds(program, operands, operands.shape[0])))
    empty = _seconds(probes.empty, jax.ShapeDtypeStruct((1,), jnp.float32), 1)
    num_bytes = 2 * _LARGE.size * _LARGE.dtype.itemsize
    return Card(device.device_kind, chip, num_bytes / copied, rates, tuple(copies), empty)


def _layers_of(num_bytes: int) -> jax.ShapeDtypeStruct:
    """What a copy that moves so many bytes reads, one layer of it each time: half of them."""
    return jax.ShapeDtypeStruct((_LAYERS, num_bytes // 2 // 4), jnp.float32)


def _copy_layer(operands: jax.Array, layer: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(operands, layer, keepdims=False) + 1


def _empty(chip: Chip, operands: jax.Array, layer: jax.Array) -> jax.Array:
    """A kernel of ours whose CTAs, one a SM, do nothing but for one that writes a line."""
    del operands

    def body(layer_ref: Any, out_ref: Any) -> None:
        @pl.when(lax.axis_index("cta") == 0)
        def _() -> None:
            out_ref[...] = jnp.full((128,), layer_ref[0], jnp.int32)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((128,), jnp.int32),
        grid=(chip.num_cores,),
        grid_names=("cta",),
        kernel_name="empty",
    )(layer[None])


def _square_of(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((_SIDE, _SIDE), dtype)


def _square(operands: jax.Array, layer: jax.Array) -> jax.Array:
    del layer
    contract_columns = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        operands, operands, contract_columns, preferred_element_type=jnp.bfloat16
    )


def _compiled(step: Step, operands: jax.ShapeDtypeStruct) -> Program:
    with LOWERING:
        lowered = jax.jit(step).lower(operands, jax.ShapeDtypeStruct((), jnp.int32))
    return lowered.compile()


def _seconds(program: Program, shape: jax.ShapeDtypeStruct, num_layers: int) -> float:
    def draw(key: jax.Array) -> jax.Array:
        # Products of zeros draw less power than those of numbers, and run faster.
        return jax.random.normal(key, shape.shape, jnp.bfloat16).astype(shape.dtype)

    operands = jax.block_until_ready(jax.jit(draw)(jax.random.key(0)))
    return time_program(program, operands, num_layers)["us"] * 1e-6
