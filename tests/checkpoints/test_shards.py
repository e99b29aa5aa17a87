"""Shards: pieces land where they should, in one buffer that is never copied."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from checkpoints.shards import DeviceShard, HostShard, Shard, make_shard
from tests.checkpoints.samples import BF16, F32, FP8

DTYPES = [FP8, BF16, F32]
KINDS = [HostShard, DeviceShard]
Kind = Callable[[tuple[int, ...], np.dtype, SingleDeviceSharding], Shard]


def place(number: int = 0) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[number])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_land_at_their_index_on_their_device(kind: Kind, dtype: np.dtype) -> None:
    expected = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(dtype)
    shard = kind((3, 4, 6), dtype, place(5))
    for i in range(3):
        for j in (0, 2):
            # Not contiguous, as a slice of columns is not.
            piece = np.repeat(expected[i : i + 1, j : j + 2], 2, axis=2)[:, :, ::2]
            shard.write(piece, (i, j, 0))
            shard.wait()
    array = shard.finish()
    assert array.devices() == {jax.devices()[5]}
    assert array.dtype == dtype
    assert np.asarray(array).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_takes_the_dtype_of_the_shard(kind: Kind) -> None:
    piece = np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)
    for shape in ((2, 4), (4, 4)):
        shard = kind(shape, BF16, place())
        for start in range(0, shape[0], 2):
            shard.write(piece, (start, 0))
        assert np.array_equal(np.asarray(shard.finish())[:2], piece.astype(BF16))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_device_buffer_is_updated_in_place(dtype: np.dtype) -> None:
    shard = DeviceShard((4, 1 << 16), dtype, place())
    addresses = set()
    for row in range(4):
        shard.write(np.full((1, 1 << 16), row, dtype), (row, 0))
        addresses.add(shard.finish().unsafe_buffer_pointer())
    assert len(addresses) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [100, 1 << 17])
def test_a_cpu_device_takes_the_host_buffer_over_as_it_is(dtype: np.dtype, size: int) -> None:
    shard = make_shard((2, size), dtype, place(3))
    assert isinstance(shard, HostShard)
    assert shard.finish().unsafe_buffer_pointer() == shard._array.ctypes.data


def test_donating_a_weight_leaves_the_memory_it_came_from_alone() -> None:
    shard = HostShard((1 << 16,), F32, place())
    shard.write(np.ones(1 << 16, np.float32), (0,))
    doubled = jax.jit(lambda x: x + x, donate_argnums=0)(shard.finish())
    assert float(jnp.max(doubled)) == 2
    assert (shard._array == 1).all()


def test_a_shard_that_got_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"no piece of this part, float32 \(2, 3\)"):
        DeviceShard((2, 3), F32, place()).finish()
