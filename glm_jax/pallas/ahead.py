"""Asks for what a later kernel reads: from device memory into the L2 cache, while this one has other work.

Knows no kernel. A kernel that waits, for other CTAs, for other devices or for its own last loads, leaves
device memory idle, and the kernel after it then starts with an empty pipe. No bits depend on any of
this; where kernels are interpreted, nothing is asked for.

What is asked for is copied to shared memory that nobody reads: on an H200, instructions that only
prefetch are dropped. A CTA ends when its copies are there, so only time that it has anyway is worth it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Shaped

_WARPGROUP = 128
_WARP = 32
# What one copy of a word brings into the cache.
_LINE = 256
# One multiprocessor takes in about 50 bytes a nanosecond, and its own copies wait behind that.
MOST_A_CTA = 192 * 1024
_COPY = "@$2 cp.async.ca.shared.global.L2::256B [$0], [$1], 4;"


class Later(NamedTuple):
    """What a kernel asks for on a later one's behalf.

    Attributes:
      weights: [L, size], each place flat: a view of the stack that the later kernel reads.
      shift: from the kernel's own place in its stacks to the place in this one.
      limit: bytes that are worth asking for, by default all of a place.
    """

    weights: Shaped[Array, "L size"]
    shift: int = 0
    limit: int | None = None


def later_of(stack: Shaped[Array, "L ..."], shift: int = 0) -> Later:
    """All of a place of a stack."""
    return Later(stack.reshape(len(stack), -1), shift)


def sink() -> Any:
    """The shared memory that copies end in."""
    return plgpu.SMEM((_WARPGROUP,), jnp.int32)


def ask(
    refs: Sequence[Any],
    later: Sequence[Later],
    place: jax.Array,
    share: jax.Array | int,
    num_shares: int,
    sink_ref: Any,
    *,
    is_warp: bool = False,
) -> None:
    """Asks for one of num_shares shares of everything in later, whose weights the refs are.

    For all threads of a warpgroup, or of a warp inside warp_map.

    Args:
      place: of the kernel that asks, in its own stacks.
      sink_ref: of `sink`, or 512 bytes of shared memory that are idle to the kernel's end.
    """
    for ref, each in zip(refs, later, strict=True):
        limit = each.limit or ref.shape[1] * ref.dtype.itemsize
        limit = min(limit, MOST_A_CTA * num_shares)
        how = {"limit": limit, "is_warp": is_warp}
        fetch_share(ref, place + each.shift, share, num_shares, sink_ref, **how)


def fetch(ref: Any, sink_ref: Any, *, is_warp: bool = False) -> None:
    """Asks for a part of device memory: ref[R, C] or ref[C], whose rows lie wherever they lie.

    For all threads of a warpgroup, or of a warp inside warp_map. It waits for nothing.

    Raises:
      ValueError: more than two dimensions, or rows that begin at no multiple of 4 bytes.
    """
    shape, itemsize = ref.shape, ref.dtype.itemsize
    num_rows, num_bytes = math.prod(shape[:-1]), shape[-1] * itemsize
    if len(shape) > 2 or num_bytes % 4:
        raise ValueError(f"{shape=} of {itemsize} bytes: rows are of a multiple of 4 bytes")
    num_threads = _WARP if is_warp else _WARPGROUP
    lines = -(-num_bytes // _LINE)

    def copy(_: Any, ref: Any, sink_ref: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        strides, _offset = ir.MemRefType(ref.type).get_strides_and_offset()
        stride = strides[0] * itemsize if len(shape) > 1 else 0
        thread = arith.remui(utils.thread_idx(), utils.c(num_threads, i32))
        begin = llvm.ptrtoint(i64, utils.memref_ptr(ref))
        into = arith.addi(
            llvm.ptrtoint(i32, utils.memref_ptr(sink_ref)), arith.muli(thread, utils.c(4, i32))
        )
        for first in range(0, num_rows * lines, num_threads):
            number = arith.addi(thread, utils.c(first, i32))
            is_there = arith.cmpi(arith.CmpIPredicate.ult, number, utils.c(num_rows * lines, i32))
            row = arith.extui(i64, arith.divui(number, utils.c(lines, i32)))
            line = arith.extui(i64, arith.remui(number, utils.c(lines, i32)))
            offset = arith.addi(
                arith.muli(row, utils.c(stride, i64)), arith.muli(line, utils.c(_LINE, i64))
            )
            place = arith.addi(begin, offset)
            utils.inline_ptx(_COPY, into, place, is_there, has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    inline(copy)(ref, sink_ref)


def fetch_share(
    ref: Any,
    place: jax.Array,
    share: jax.Array | int,
    num_shares: int,
    sink_ref: Any,
    *,
    limit: int | None = None,
    is_warp: bool = False,
) -> None:
    """Asks for one of num_shares equal shares of ref[place], ref being [L, size], or of its first bytes.

    Args:
      place: beyond the last one nothing is asked for.
      limit: bytes of ref[place] that are worth asking for, by default all.
    """
    num_places, size = ref.shape
    size = min(size, (limit or size * ref.dtype.itemsize) // ref.dtype.itemsize)
    piece = -(-size // num_shares)
    # Whole lines; the last shares overlap where that is more than there is.
    piece = min(-(-piece // _LINE) * _LINE, size)
    first = jnp.minimum(share * piece, size - piece)

    @pl.when(place < num_places)
    def _():
        fetch(ref.at[jnp.int32(place), pl.ds(first, piece)], sink_ref, is_warp=is_warp)
