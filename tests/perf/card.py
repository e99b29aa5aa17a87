"""What a GPU reaches, measured where the kernels are: large copies, small ones, products, empty kernels.

Knows no kernel of ours.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm_jax.pallas.chip import Chip
from tests.perf.measure import Case, Step, chip_of, time_program

# Of small copies, read and written together; between them times are interpolated.
_SIZES = tuple(1 << power for power in range(16, 29))
_LAYERS = 16


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


def measure_card(*, is_thorough: bool = True) -> Card:
    """Copies and multiplies large arrays; thoroughly, small copies and empty kernels too."""
    device = jax.devices()[0]
    source = jax.random.normal(jax.random.key(0), (1 << 28,), jnp.float32)
    # XLA leaves out what adds 0, and the copy with it.
    copied = _seconds(lambda operands, layer: operands + (layer + 1).astype(jnp.float32), source)
    num_bytes = 2 * source.nbytes
    del source
    rates = {}
    size = 8192
    for name, dtype in (("bf16", jnp.bfloat16), ("fp8", jnp.float8_e4m3fn)):
        square = jax.random.normal(jax.random.key(1), (size, size), jnp.float32).astype(dtype)
        rates[name] = 2 * size**3 / _seconds(_square, square)
    card = Card(device.device_kind, chip_of(device), num_bytes / copied, rates)
    if not is_thorough:
        return card
    copies = tuple((size, small_copy(size)) for size in _SIZES)
    return Card(card.name, card.chip, card.copy, rates, copies, empty_kernel(card.chip))


def small_copy(num_bytes: int) -> float:
    """Seconds of a copy that reads half of the bytes and writes the other half; what it reads is cold."""
    width = num_bytes // 2 // 4

    def copy(operands: jax.Array, layer: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(operands, layer, keepdims=False) + 1

    layers = min(_LAYERS, max(2, (1 << 31) // (num_bytes // 2)))
    return _seconds(copy, jnp.zeros((layers, width), jnp.float32), layers)


def empty_kernel(chip: Chip) -> float:
    """Seconds of a kernel of ours whose CTAs, one a SM, do nothing but for one that writes a line."""

    def body(layer_ref: Any, out_ref: Any) -> None:
        @pl.when(lax.axis_index("cta") == 0)
        def _() -> None:
            out_ref[...] = jnp.full((128,), layer_ref[0], jnp.int32)

    def step(operands: jax.Array, layer: jax.Array) -> jax.Array:
        del operands
        kernel = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((128,), jnp.int32),
            grid=(chip.num_cores,),
            grid_names=("cta",),
            kernel_name="empty",
        )
        return kernel(layer[None])

    return _seconds(step, jnp.zeros(1))


def _square(operands: jax.Array, layer: jax.Array) -> jax.Array:
    del layer
    contract_columns = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        operands, operands, contract_columns, preferred_element_type=jnp.bfloat16
    )


def _seconds(step: Step, operands: Any, num_layers: int = 1) -> float:
    program = jax.jit(step).lower(operands, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    return time_program(program, operands, num_layers)["us"] * 1e-6
