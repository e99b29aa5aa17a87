"""One device's part of a weight, filled piece by piece without a second copy of it.

Knows neither files nor names. A CPU device's memory is host memory, so there the part is a NumPy
array that the device takes over as it is; elsewhere it is a device buffer updated in place.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from checkpoints.reader import aligned_empty


class Shard(Protocol):
    """A part of a weight on one device, of a fixed shape and dtype."""

    def write(self, piece: np.ndarray, start: tuple[int, ...]) -> None:
        """Puts a piece, converted to the part's dtype, at an index; may return before it is done.

        Args:
          piece: an array of as many dimensions as the part.
          start: where in the part the piece's first element goes.
        """
        ...

    def memory(
        self, start: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray | None:
        """The part's own memory for a piece, to be filled before it is finished.

        None where there is none, or none of this dtype in one contiguous run.
        """
        ...

    def wait(self) -> None:
        """Blocks until every piece written so far has arrived and may be forgotten."""
        ...

    def finish(self) -> jax.Array:
        """The part as an array on its device; nothing may be written after it."""
        ...


class HostShard:
    """A part in host memory, which its CPU device uses in place.

    XLA's CPU backend widens FP8 to update it, the whole buffer for each piece, and compiles each
    shape anew for each device (0.1 s); plain memory copies do neither.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, place: SingleDeviceSharding
    ) -> None:
        self._array = aligned_empty(shape, dtype)
        self._place = place

    def write(self, piece: np.ndarray, start: tuple[int, ...]) -> None:
        """See Shard."""
        where = tuple(slice(s, s + n) for s, n in zip(start, piece.shape, strict=True))
        copy(piece, self._array[where])

    def memory(
        self, start: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray | None:
        """See Shard."""
        where = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        piece = self._array[where]
        return piece if piece.flags.c_contiguous and dtype == self._array.dtype else None

    def wait(self) -> None:
        """See Shard; a copy in host memory is done when it returns."""

    def finish(self) -> jax.Array:
        """See Shard."""
        return jax.device_put(self._array, self._place, may_alias=True)


class DeviceShard:
    """A part in a device's own memory, updated in place by a donated, jitted copy."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, place: SingleDeviceSharding
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._place = place
        self._buffer: jax.Array | None = None

    def write(self, piece: np.ndarray, start: tuple[int, ...]) -> None:
        """See Shard; a piece as large as the part becomes the part, with no buffer to fill."""
        piece = np.ascontiguousarray(piece)
        if piece.shape == self._shape:
            self._buffer = jax.device_put(piece, self._place).astype(self._dtype)
            return
        if self._buffer is None:
            self._buffer = _zeros(self._shape, self._dtype, self._place)
        self._buffer = _update(self._buffer, piece, np.array(start, np.int32))

    def memory(
        self, start: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray | None:
        """See Shard; the host cannot write a device's memory."""
        del start, shape, dtype
        return None

    def wait(self) -> None:
        """See Shard."""
        if self._buffer is not None:
            self._buffer.block_until_ready()

    def finish(self) -> jax.Array:
        """See Shard.

        Raises:
          ValueError: nothing was ever written.
        """
        if self._buffer is None:
            raise ValueError(f"no piece of this part, {self._dtype} {self._shape}, was written")
        return self._buffer


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Fills an array from another of its shape, converting the dtype if it differs."""
    if source.dtype == target.dtype:
        # NumPy moves FP8 and bfloat16 element by element, but whole rows of integers.
        bits = f"u{target.itemsize}"
        source, target = source.view(bits), target.view(bits)
    target[...] = source


def make_shard(shape: tuple[int, ...], dtype: np.dtype, place: SingleDeviceSharding) -> Shard:
    """An empty part of the kind that suits the device."""
    (device,) = place.device_set
    kind = HostShard if device.platform == "cpu" else DeviceShard
    return kind(shape, dtype, place)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, place: SingleDeviceSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()


# The start is an array, so that one compilation serves every place a shape of piece can go.
@partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece.astype(buffer.dtype), tuple(start))
