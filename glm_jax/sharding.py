"""The mesh, the one table from logical axes to mesh axes, and the sums over devices.

Knows no layer: arrays name their axes, this table says where each axis lives.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

# All devices form one axis: attention is split over kv heads and the experts over whole experts, so
# every device holds every token and one all-reduce per sub-layer is all the traffic there is.
MESH_AXIS = "tensor"
# Rows a device from which on it is worth another exchange to have each choose for its own.
_LEAST_SHARE = 4

RULES: dict[str, str | None] = {
    "layers": None,
    "embed": None,
    "head_dim": None,
    "expert_mlp": None,
    "pages": None,
    "vocab": MESH_AXIS,
    "heads": MESH_AXIS,
    "kv_heads": MESH_AXIS,
    "experts": MESH_AXIS,
    "mlp": MESH_AXIS,
}

Axes = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """What an array will be, before it is.

    Attributes:
      shape: global shape.
      dtype: element type.
      axes: the logical axis of each dimension; None where it has no name.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes


def make_mesh(num_devices: int | None = None) -> Mesh:
    """The mesh over the first num_devices devices, or over all of them.

    Raises:
      ValueError: there are fewer devices than asked for.
    """
    devices = jax.devices()
    if num_devices is not None and num_devices > len(devices):
        raise ValueError(
            f"{num_devices} devices were asked for and {len(devices)} exist ({devices[0].platform})"
        )
    return Mesh(np.array(devices[:num_devices]), (MESH_AXIS,))


def partition_spec(axes: Axes) -> PartitionSpec:
    """Turns logical axes into a partition spec.

    Raises:
      KeyError: an axis has no rule.
      ValueError: two dimensions would be split over the same mesh axis.
    """
    placed = [None if axis is None else RULES[axis] for axis in axes]
    used = [axis for axis in placed if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} use a mesh axis twice: {placed}")
    return PartitionSpec(*placed)


def sharding_for(axes: Axes, mesh: Mesh) -> NamedSharding:
    """Where an array with these logical axes lives on the mesh."""
    return NamedSharding(mesh, partition_spec(axes))


def check_divisible(specs: dict[str, WeightSpec], mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh that cannot split the weights evenly.

    Raises:
      ValueError: names the first array and dimension that does not divide, and the sizes.
    """
    for path, spec in specs.items():
        for size, axis, place in zip(spec.shape, spec.axes, partition_spec(spec.axes), strict=True):
            if place is not None and size % mesh.shape[place]:
                raise ValueError(
                    f"{mesh.shape[place]} devices cannot share {path}: its {axis} dimension is {size}; "
                    f"use a number of devices that divides {size}"
                )


def device_index() -> Int32[Array, ""]:
    """This device's place on the mesh, inside a step."""
    return lax.axis_index(MESH_AXIS)


def num_devices() -> int:
    """Devices of the mesh, inside a step."""
    return lax.axis_size(MESH_AXIS)


def all_reduce(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sum of x over all devices."""
    return lax.psum(x, MESH_AXIS)


def all_gather(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Joins every device's x along one axis."""
    return lax.all_gather(x, MESH_AXIS, axis=axis, tiled=True)


def shares_rows(num_rows: int) -> bool:
    """Whether devices had better take a share of so many rows each than all of them all rows."""
    devices = num_devices()
    return devices > 1 and num_rows % devices == 0 and num_rows >= _LEAST_SHARE * devices


def share_of(x: Array) -> Array:
    """This device's share of the rows, [T, …], that all have."""
    share = len(x) // num_devices()
    return lax.dynamic_slice_in_dim(x, device_index() * share, share)


def exchange(x: Float[Array, "T N"]) -> Float[Array, "share all_N"]:
    """This device's share of the rows, of which each device has a part of the columns."""
    return lax.all_to_all(x, MESH_AXIS, split_axis=0, concat_axis=1, tiled=True)


def in_memory(x: Array) -> Array:
    """x as what it is for is computed from it wherever it comes from: of what several devices bring, in
    parts, XLA would otherwise take sums by other ways than of what one has, with other bits."""
    return lax.optimization_barrier(x) if num_devices() > 1 else x


def sum_in_order(x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The sum of x over all devices, added in float32 with device 0 first, and rounded once.

    The bits do not depend on T, as those of a library's sum may, and are those of the sum that is
    fused with the norm. It carries what an all-reduce does: every device adds up its share of the
    rows and hands out the sums.
    """
    devices, (num_rows, width) = num_devices(), x.shape
    if devices <= 2:
        return all_reduce(x)
    padded = jnp.pad(x, ((0, -num_rows % devices), (0, 0)))
    shares = lax.all_to_all(padded, MESH_AXIS, split_axis=0, concat_axis=0, tiled=True)
    addends = shares.reshape(devices, -1, width).astype(jnp.float32)
    total = addends[0]
    for addend in addends[1:]:
        total = total + addend
    return all_gather(total.astype(x.dtype), axis=0)[:num_rows]


def sum_partials(partials: Float[Array, "R T D"], dtype: jnp.dtype) -> Float[Array, "T D"]:
    """Sums partial products over this device's R and then over all devices.

    A row-parallel product is cut into num_key_value_heads partial products whatever the mesh, each
    rounded to dtype before the sum. So one device and eight add up the very same numbers, and with
    one partial per device (the deployed layout) the wire carries dtype and loses nothing.
    """
    rounded = round_partials(partials, dtype)
    if rounded.shape[0] == 1:
        return all_reduce(rounded[0])
    return all_reduce(rounded.sum(0)).astype(dtype)


def round_partials(partials: Float[Array, "R T D"], dtype: jnp.dtype) -> Float[Array, "R T D"]:
    """Each partial rounded to dtype: a single one in dtype, several in float32, to be added up."""
    if partials.dtype == dtype and partials.shape[0] == 1:
        return partials
    info = jnp.finfo(dtype)
    # reduce_precision, unlike a pair of converts, may not be optimized away.
    rounded = lax.reduce_precision(partials, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return rounded.astype(dtype) if partials.shape[0] == 1 else rounded
