"""Asks for what a later kernel reads: from device memory into the L2 cache, while this one has other work.

Knows no kernel. A kernel that waits, for a launch, for other devices or for its own last loads, leaves
device memory idle, and the kernel after it then starts with an empty pipe. No bits depend on any of
this; where kernels are interpreted, nothing is asked for.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_WARPGROUP = 128
_WARP = 32
# What one instruction asks for is a multiple of this, and so is where it begins.
_UNIT = 16
_PREFETCH = "@$2 cp.async.bulk.prefetch.L2.global [$0], $1;"


def fetch(ref: Any, *, is_warp: bool = False) -> None:
    """Asks for a part of device memory: ref[R, C] or ref[C], whose rows lie wherever they lie.

    For all threads of a warpgroup, or of a warp inside warp_map: each asks for rows of its own. It
    waits for nothing.

    Raises:
      ValueError: a row is no multiple of 16 bytes.
    """
    shape, itemsize = ref.shape, ref.dtype.itemsize
    num_rows, num_bytes = math.prod(shape[:-1]), shape[-1] * itemsize
    if num_bytes % _UNIT or len(shape) > 2:
        raise ValueError(f"{shape=} of {itemsize} bytes: rows are multiples of {_UNIT} bytes")
    num_threads = _WARP if is_warp else _WARPGROUP

    def ask(_: Any, ref: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        strides, _offset = ir.MemRefType(ref.type).get_strides_and_offset()
        stride = strides[0] * itemsize if len(shape) > 1 else 0
        thread = arith.remui(utils.thread_idx(), utils.c(num_threads, i32))
        begin = llvm.ptrtoint(i64, utils.memref_ptr(ref))
        for first in range(0, num_rows, num_threads):
            row = arith.addi(thread, utils.c(first, i32))
            is_mine = arith.cmpi(arith.CmpIPredicate.ult, row, utils.c(num_rows, i32))
            offset = arith.muli(arith.extui(i64, row), utils.c(stride, i64))
            place = arith.addi(begin, offset)
            size = utils.c(num_bytes, i32)
            utils.inline_ptx(_PREFETCH, place, size, is_mine, has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    inline(ask)(ref)


def fetch_share(
    ref: Any, place: jax.Array, share: jax.Array | int, num_shares: int, *, limit: int | None = None
) -> None:
    """Asks for one of num_shares equal shares of ref[place], ref being [L, size], or of its first bytes.

    Args:
      place: beyond the last one nothing is asked for.
      limit: bytes of ref[place] that are worth asking for, by default all.
    """
    num_places, size = ref.shape
    size = min(size, (limit or size * ref.dtype.itemsize) // ref.dtype.itemsize)
    piece = -(-size // num_shares)
    # Whole lines of 128 bytes; the last shares overlap where that is more than there is.
    piece = min(-(-piece // 128) * 128, size)
    first = jnp.minimum(share * piece, size - piece)

    @pl.when(place < num_places)
    def _():
        fetch(ref.at[jnp.int32(place), pl.ds(first, piece)])
