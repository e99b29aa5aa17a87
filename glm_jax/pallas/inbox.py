"""Rows that devices write into each other's memory, and how a kernel waits for them.

Knows no kernel. A device has a slot for each row of each other device, twice: a row's first exchange of
a step uses one, the second the other, and so on by turns. A row is its own flag: an empty slot holds a
word that no row contains, and whoever waits reads until there is none of it. So a row takes one way over
NVLink, with no fence, no counter and no answer.

Why a slot is empty when a row comes:
- A CTA that has read a row empties its slot, so a kernel that ends leaves the slots of its turn empty.
- Slots of exchange n are written again in exchange n + 2. A device gets there after it has read, in
  exchange n + 1, rows of all others; those send them in a kernel that began after their exchange n had
  ended. (With owners: after a sum that had rows of all others in it.)
- A step's first rows: `make_inbox` empties all slots, then holds XLA's barrier between the devices. That
  also keeps a device that is ahead out of memory that another's earlier kernels still use.
- After a step's last exchange nobody writes: what was written to a device is what it waited for.
A device may so be ahead of another by one exchange, and what runs between makes no difference. All
devices make the same exchanges in the same order; none ends before its rows have come, and since
each row's CTA sends before it waits, all CTAs need not even run at once if devices begin them in order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, BFloat16

from glm_jax.pallas.norm import row_layout

_SLOTS = 2
_THREADS = 128
# Widths are multiples of this: a thread's part of a row is whole words.
UNIT = 2 * _THREADS
# Two NaNs of bfloat16 that arithmetic does not make: a conversion's are 0x7fff.
_EMPTY = 0xFFFFFFFF
# Rows that a thread waits for together, in registers.
_TOGETHER = 3


class Inbox(NamedTuple):
    """Where a device's peers write, while a step lasts.

    Attributes:
      rows: bfloat16[2, num_devices, T, D], the second dimension by sender.
      turns: int32[T], which half is next for a row; the same on all devices.
    """

    rows: jax.Ref
    turns: jax.Ref


def make_inbox(num_rows: int, width: int, *, axis_name: str, num_devices: int) -> Inbox:
    """An inbox for every exchange of up to so many rows, empty on all devices.

    Raises:
      NotImplementedError: width is no multiple of UNIT.
    """
    if width % UNIT:
        raise NotImplementedError(f"{width=}: rows are multiples of {UNIT}")
    shape = (_SLOTS, num_devices, num_rows, width)

    def empty_inbox(rows_ref: Any, turns_ref: Any) -> None:
        row = lax.axis_index("row")
        for slot in range(_SLOTS):
            for sender in range(num_devices):
                clear(rows_ref.at[slot, sender, row])
        turns_ref[row] = jnp.int32(0)

    rows, turns = plgpu.kernel(
        empty_inbox,
        out_type=[
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((num_rows,), jnp.int32),
        ],
        grid=(num_rows,),
        grid_names=("row",),
        kernel_name="empty_inbox",
    )()
    inbox = Inbox(jax.new_ref(rows), jax.new_ref(turns))

    def meet(rows_ref: Any, turns_ref: Any) -> None:
        # A kernel that knows its device is one for which XLA holds the barrier.
        turns_ref[0] = lax.axis_index(axis_name) * turns_ref[0]
        _touch(rows_ref)

    plgpu.kernel(meet, out_type=(), grid=(1,), grid_names=("cta",), kernel_name="meet")(*inbox)
    return inbox


def send(
    row: BFloat16[Array, " D"],
    ref: Any,
    *,
    operand: int,
    distances: Sequence[int],
    num_devices: int,
) -> None:
    """Writes a row to peers, each as far after this device as distances say.

    Args:
      ref: the slot that the row would have on this device.
      operand: which of the kernel's the inbox's rows are.
    """
    layout = row_layout(row.shape[0])

    def write(context: Any, row: Any, ref: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        vector_size = row.layout.vec_size
        words = _words(vector_size)
        kind = ir.VectorType.get((words,), i32)
        # No row may have the word that says that a slot is empty.
        largest = vector.broadcast(kind, utils.c(_signed(_EMPTY - 1), i32))
        sealed = [arith.minui(vector.bitcast(kind, piece), largest) for piece in row.registers.flat]
        code = f"st.relaxed.sys.global{_suffix(words)} [$0], {_group(range(1, words + 1))};"
        for distance in distances:
            after = arith.addi(context.device_id(), utils.c(distance, i32))
            peer = arith.remui(after, utils.c(num_devices, i32))
            # A store by Pallas itself would be one of two bytes at a time, in jax 0.11.
            begin = context.to_remote(utils.memref_ptr(ref), peer, _kernel_arg_idx=operand)
            for place, piece in enumerate(sealed):
                found = [
                    vector.extract(piece, dynamic_position=[], static_position=[word])
                    for word in range(words)
                ]
                address = _address(begin, vector_size, place)
                utils.inline_ptx(code, address, *found, has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    inline(write)(row, ref)


def receive(
    mail: Sequence[Any], slot: Array, senders: Sequence[Array], index: Array
) -> list[Array]:
    """A row of each sender, once it is there; their slots are empty then, and it is the others' turn."""
    rows_ref, turns_ref = mail
    refs = [rows_ref.at[slot, sender, index] for sender in senders]
    found: list[Array] = []
    for first in range(0, len(refs), _TOGETHER):
        some = refs[first : first + _TOGETHER]
        found += _await(some)
        for ref in some:
            clear(ref)

    def wait(_: Any) -> None:
        utils.warpgroup_barrier()

    # Only now has every warp read whose turn it was.
    plgpu.inline_mgpu()(wait)()
    turns_ref[index] = 1 - slot
    return found


def clear(ref: Any) -> None:
    """Empties a slot, ref[D], by all threads of a warpgroup."""
    width = ref.shape[-1]

    def write(_: Any, ref: Any) -> None:
        vector_size = _vector_size(width)
        words = _words(vector_size)
        empty = utils.c(_signed(_EMPTY), ir.IntegerType.get_signless(32))
        code = f"st.relaxed.sys.global{_suffix(words)} [$0], {_group([1] * words)};"
        for place in range(width // (_THREADS * vector_size)):
            address = _address(utils.memref_ptr(ref), vector_size, place)
            utils.inline_ptx(code, address, empty, has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    inline(write)(ref)


def _await(refs: list[Any]) -> list[Array]:
    width, count = refs[0].shape[-1], len(refs)
    layout = row_layout(width)

    def read(_: Any, *refs: Any) -> Any:
        vector_size = _vector_size(width)
        words, places = _words(vector_size), width // (_THREADS * vector_size)
        i32 = ir.IntegerType.get_signless(32)
        addresses = [_address(utils.memref_ptr(ref), vector_size, 0) for ref in refs]
        total = count * places * words
        found = utils.inline_ptx(
            _poll(count, places, words), *addresses, result_types=[i32] * total,
            has_side_effects=True,
        )  # fmt: skip
        kind = ir.VectorType.get((vector_size,), ir.BF16Type.get())
        rows = []
        for start in range(0, total, places * words):
            registers = np.empty((places,), dtype=object)
            for place in range(places):
                begin = start + place * words
                packed = vector.from_elements(
                    ir.VectorType.get((words,), i32), list(found[begin : begin + words])
                )
                registers[place] = vector.bitcast(kind, packed)
            strided = fa.WGStridedFragLayout((width,), vector_size)
            rows.append(fa.FragmentedArray(_registers=registers, _layout=strided, _is_signed=None))
        return rows

    answer = plgpu.ShapeDtypeStruct((width,), jnp.dtype(jnp.bfloat16), layout)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * count, return_type=[answer] * count
    )
    return list(inline(read)(*refs))


def _poll(count: int, places: int, words: int) -> str:
    """Code that reads so many slots until nothing in them is empty."""
    total, step = count * places * words, _THREADS * words * 4
    # The answers are written after the last read of the addresses, which may be in the same registers.
    names = [f"w{word}" for word in range(total)]
    loads = []
    for vector_at, first in enumerate(range(0, total, words)):
        index, place = divmod(vector_at, places)
        target = ", ".join(names[first : first + words])
        target = target if words == 1 else f"{{{target}}}"
        address = f"[${total + index}+{place * step}]"
        loads.append(f"ld.relaxed.sys.global{_suffix(words)} {target}, {address};")
    checks = ["mov.b32 most, w0;", *(f"max.u32 most, most, {name};" for name in names[1:])]
    answers = [f"mov.b32 ${word}, {name};" for word, name in enumerate(names)]
    return "\n".join(
        [
            "{",
            ".reg .pred is_early;",
            f".reg .b32 most, {', '.join(names)};",
            "again:",
            *loads,
            *checks,
            f"setp.eq.u32 is_early, most, {_EMPTY:#x};",
            "@is_early bra again;",
            *answers,
            "}",
        ]
    )


def _touch(ref: Any) -> None:
    """Says to XLA that a kernel uses ref."""
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    inline(lambda _, ref: None)(ref)


def _address(begin: Any, vector_size: int, place: int) -> Any:
    """Of a thread's part of a row that begins there, as row_layout deals them."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
    size = 2 * vector_size
    offset = arith.addi(
        arith.muli(arith.extui(i64, thread), utils.c(size, i64)),
        utils.c(place * _THREADS * size, i64),
    )
    return arith.addi(llvm.ptrtoint(i64, begin), offset)


def _vector_size(width: int) -> int:
    """Numbers that a thread holds side by side, as row_layout has it."""
    return next(size for size in (8, 4, 2) if width % (_THREADS * size) == 0)


def _words(vector_size: int) -> int:
    """Words of 32 bits in so many numbers of bfloat16."""
    return vector_size // 2


def _group(operands: Sequence[int]) -> str:
    """Operands of one instruction that moves so many words."""
    names = ", ".join(f"${operand}" for operand in operands)
    return names if len(operands) == 1 else f"{{{names}}}"


def _suffix(words: int) -> str:
    return ".b32" if words == 1 else f".v{words}.b32"


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


__all__ = ["Inbox", "clear", "make_inbox", "receive", "send"]
