"""Rows that devices write into each other's memory, and how a kernel waits for them.

Knows no kernel. A device has a slot for each row of each other device, twice: a row's first exchange of
a step uses one, the second the other, and so on by turns. A row is its own flag: an empty slot holds a
word that no row contains, and whoever waits reads until there is none of it. So a row takes one way over
NVLink, with no fence, no counter and no answer.

Why a slot is empty when a row comes:
- A CTA that has read a row empties its slot, so a kernel that ends leaves the slots of its turn empty.
- Slots of exchange n are written again in exchange n + 2. A device gets there after it has read, in
  exchange n + 1, rows of all others, or a sum of such; those were sent after the senders' exchange n
  had ended.
- A step's first rows: `make_inbox` empties all slots, then holds XLA's barrier between the devices. That
  also keeps a device that is ahead out of memory that another's earlier kernels still use.
- Kernels change the slots in place, so XLA leaves them where they are, through loops too.
- After a step's last exchange nobody writes: what was written to a device is what it waited for.
A device may so be ahead of another by one exchange, and what runs between makes no difference. All
devices make the same exchanges in the same order; none ends before its rows have come, and since
each row's CTA sends before it waits, all CTAs need not even run at once if devices begin them in order.

Where launches overlap, as launch_order says: a kernel touches no slot before all kernels ahead of it have
ended. What follows a sum begins when all of the sum's CTAs run, and what began early waits for kernels of
its own device alone, so neither takes room from a CTA that a peer waits for: the first exchange that has
not ended everywhere can go on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, BFloat16, Int32

from glm_jax.pallas.row_words import UNIT, RowWords

_SLOTS = 2
# Two NaNs of bfloat16 that arithmetic does not make: a conversion's are 0x7fff.
_EMPTY = 0xFFFFFFFF
# Rows that a thread waits for together, in registers.
_TOGETHER = 3


class Inbox(NamedTuple):
    """Where a device's peers write, while a step lasts.

    Attributes:
      rows: bfloat16[2, num_devices, T, D], the second dimension by sender.
      turns: int32[T], which half is next for a row; the same on all devices.
      places: int32[2 * num_devices + 1], where rows lie on this device and those after it, in two words
        each; and which device this is. Were kernels to ask XLA, the host would tell each in every step.
    """

    rows: jax.Ref
    turns: jax.Ref
    places: Int32[Array, " words"]


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
    rows, turns = jax.new_ref(rows), jax.new_ref(turns)

    # A kernel that knows its peers is one before which XLA holds the barrier.
    def meet(rows_ref: Any, places_ref: Any) -> None:
        _tell_places(rows_ref, places_ref, num_devices)
        places_ref[2 * num_devices] = lax.axis_index(axis_name)

    (places,) = plgpu.kernel(
        meet,
        out_type=[jax.ShapeDtypeStruct((2 * num_devices + 1,), jnp.int32)],
        grid=(1,),
        grid_names=("cta",),
        kernel_name="meet",
    )(rows)
    return Inbox(rows, turns, places)


def _tell_places(rows_ref: Any, places_ref: Any, num_devices: int) -> None:
    def tell(context: Any, rows_ref: Any, places_ref: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        begin, places = utils.memref_ptr(rows_ref), utils.memref_ptr(places_ref)
        for distance in range(num_devices):
            after = arith.addi(context.device_id(), utils.c(distance, i32))
            device = arith.remui(after, utils.c(num_devices, i32))
            # The rows are the kernel's first operand.
            found = context.to_remote(begin, device, _kernel_arg_idx=0)
            code = f"st.global.b64 [$0+{8 * distance}], $1;"
            place = llvm.ptrtoint(i64, found)
            utils.inline_ptx(code, places, place, has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    inline(tell)(rows_ref, places_ref)


def this_device(inbox: Sequence[Any]) -> Array:
    """Which device this is, in a kernel that has the refs of an inbox."""
    places_ref = inbox[2]
    return places_ref[places_ref.shape[0] - 1]


def send(
    row: BFloat16[Array, " D"],
    inbox: Sequence[Any],
    slot: Array,
    index: Array,
    distances: Sequence[Array | int],
) -> None:
    """Writes a row to devices so far after this one, whose slot must be empty.

    Args:
      inbox: its refs, in the kernel.
      index: of the row.
    """
    cut = RowWords(row.shape[0])
    rows_ref, _, places_ref = inbox

    def write(_: Any, row: Any, own_ref: Any, places_ref: Any, *distances: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        places = utils.memref_ptr(places_ref)
        own = llvm.load(i64, places)
        # As far into a peer's rows as on this device.
        offset = arith.subi(cut.address(utils.memref_ptr(own_ref)), own)
        # No row may have the word that says that a slot is empty.
        largest = _word(_EMPTY - 1)
        pieces = [[arith.minui(word, largest) for word in piece] for piece in cut.split(row)]
        for distance in distances:
            place = utils.getelementptr(places, [distance.registers.item()], i64)
            address = arith.addi(llvm.load(i64, place), offset)
            for number, piece in enumerate(pieces):
                code = f"st.relaxed.sys.global{cut.suffix} [$0+{number * cut.step}], {cut.numbered(1)};"
                utils.inline_ptx(code, address, *piece, has_side_effects=True)

    numbers = [plgpu.Layout.WG_SPLAT] * len(distances)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(cut.layout, plgpu.RefType(), plgpu.RefType(), *numbers)
    )
    own_ref = rows_ref.at[slot, this_device(inbox), index]
    inline(write)(row, own_ref, places_ref, *(jnp.int32(distance) for distance in distances))


def receive(
    inbox: Sequence[Any], slot: Array, senders: Sequence[Array], index: Array
) -> list[Array]:
    """A row of each sender, once it is there; their slots are empty then, and it is the others' turn."""
    rows_ref, turns_ref, _ = inbox
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
    cut = RowWords(ref.shape[-1])

    def write(_: Any, ref: Any) -> None:
        address, empty = cut.address(utils.memref_ptr(ref)), _word(_EMPTY)
        words = cut.operands(["$1"] * cut.words)
        for piece in range(cut.pieces):
            code = f"st.relaxed.sys.global{cut.suffix} [$0+{piece * cut.step}], {words};"
            utils.inline_ptx(code, address, empty, has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    inline(write)(ref)


def _await(refs: list[Any]) -> list[Array]:
    cut, count = RowWords(refs[0].shape[-1]), len(refs)

    def read(_: Any, *refs: Any) -> Any:
        size = cut.pieces * cut.words
        addresses = [cut.address(utils.memref_ptr(ref)) for ref in refs]
        kinds = [ir.IntegerType.get_signless(32)] * (count * size)
        words = utils.inline_ptx(
            _poll(cut, count), *addresses, result_types=kinds, has_side_effects=True
        )
        return [cut.join(words[first : first + size]) for first in range(0, count * size, size)]

    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * count, return_type=cut.answers(count)
    )
    return list(inline(read)(*refs))


def _poll(cut: RowWords, count: int) -> str:
    """Code that reads so many slots until nothing in them is empty."""
    total = count * cut.pieces * cut.words
    # The answers are written after the last read of the addresses, which may be in the same registers.
    names, loads = [f"w{word}" for word in range(total)], []
    for piece in range(count * cut.pieces):
        slot, place = divmod(piece, cut.pieces)
        words = cut.operands(names[piece * cut.words : (piece + 1) * cut.words])
        address = f"[${total + slot}+{place * cut.step}]"
        loads.append(f"ld.relaxed.sys.global{cut.suffix} {words}, {address};")
    return "\n".join(
        [
            "{",
            ".reg .pred is_early;",
            f".reg .b32 most, {', '.join(names)};",
            "again:",
            *loads,
            "mov.b32 most, w0;",
            *(f"max.u32 most, most, {name};" for name in names[1:]),
            f"setp.eq.u32 is_early, most, {_EMPTY:#x};",
            "@is_early bra again;",
            *(f"mov.b32 ${word}, {name};" for word, name in enumerate(names)),
            "}",
        ]
    )


def _word(bits: int) -> Any:
    signed = bits - (1 << 32) if bits >> 31 else bits
    return utils.c(signed, ir.IntegerType.get_signless(32))
