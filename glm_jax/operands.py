"""What heavy operations take and hand on: stacked weights, layers, and products still to be summed.

Knows neither kernels nor references.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from glm_jax import ops
from glm_jax.ops import Rows
from glm_jax.pallas import launch_order
from glm_jax.pallas.dispatch import Dispatch
from glm_jax.pallas.inbox import Inbox
from glm_jax.pallas.route_stage import Memory

# A stacked weight: its values, and their scale where they are FP8.
Weight = tuple[Array, Array | None]
# Products still to be summed over devices, one for each kv head's share of the model: float32, or a
# single one in the activations' dtype.
Partials = Float[Array, "R T D"]


class ExpertRows(NamedTuple):
    """What a device's experts made of its tokens, not added up yet: whoever sums over devices does.

    Attributes:
      rows: the experts' answers, in the order of a Dispatch.
      shared: each token's answer of the shared expert, first of all.
      places: the row of each choice of each token; R where its expert lives elsewhere.
      weights: what each choice's row is multiplied with.
    """

    rows: Float[Array, "R D"]
    shared: Float[Array, "shared_rows D"]
    places: Int32[Array, "T k"]
    weights: Float32[Array, "T k"]


# What a sub-layer leaves to be summed, first on a device and then over all.
Pending = Partials | ExpertRows


class Shifted(NamedTuple):
    """A place in a stack that is not counted as the loop over layers counts.

    Kernels add the two numbers themselves: an addition by XLA would be one more launch a layer.
    """

    layer: Int32[Array, ""]
    by: int


Layer = ops.Layer | Shifted


class Workspace(NamedTuple):
    """Memory that the kernels of a step share, made once, outside of its layers.

    Attributes:
      routing: memory of the router's kernels, whose CTAs wait for each other.
      gate_up: a counter that gate_up sets to zero, and by which down's CTAs wait for each other.
      inbox: where devices write rows for each other; None on one, and where XLA sums.
      first_expert: of this device.
      is_fused: whether kernels sum over devices too: then a layer of experts is nothing but kernels.
    """

    routing: Memory
    gate_up: jax.Ref
    inbox: Inbox | None
    first_expert: Int32[Array, ""]
    is_fused: bool

    def overlapping(self, num_rows: int, num_tokens: int) -> AbstractContextManager[None]:
        """In which layers of experts are traced, for so many tokens of each row: in a decode step their
        kernels follow each other, with nothing of XLA's between but for rows that are to be padded."""
        is_padded = num_rows > 8 and num_rows % 8 > 0
        return launch_order.overlapping(self.is_fused and num_tokens == 1 and not is_padded)


class Staged(NamedTuple):
    """A step's tokens in the order of their experts, made while they were routed, and the memory that
    the experts' kernels share."""

    plan: Dispatch
    workspace: Workspace


def plain(layer: Layer) -> ops.Layer:
    """The place in the stack, as references take it."""
    return layer.layer + layer.by if isinstance(layer, Shifted) else layer


def index(layer: Layer) -> tuple[Int32[Array, ""], int]:
    """The place in the stack, as kernels take it: a number on the device, and what they are to add."""
    if isinstance(layer, Shifted):
        return layer.layer, layer.by
    return jnp.asarray(layer, jnp.int32), 0


def quantized(rows: Rows, values: Array) -> tuple[Array, Array]:
    """The rows that a kernel multiplies with FP8 values.

    Raises:
      NotImplementedError: the values are not FP8, so neither are the rows.
    """
    if rows.values is None or rows.scale is None:
        raise NotImplementedError(
            f"weights are {values.dtype.name}: products on a GPU are for FP8 ones (python -m "
            "checkpoints quantize makes them)"
        )
    return rows.values, rows.scale


def check_single(num_groups: int) -> None:
    """Refuses more than one partial sum a device.

    Raises:
      NotImplementedError: a device holds the shares of several kv heads.
    """
    if num_groups != 1:
        raise NotImplementedError(
            f"{num_groups} kv heads a device: on GPUs a step is for as many devices as kv heads"
        )
