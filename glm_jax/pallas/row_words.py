"""Rows of bfloat16 as words of a warpgroup's registers, for what Pallas has no operation for.

Knows no kernel. Threads hold a row as norm.row_layout deals it: pieces of up to 16 bytes, one thread
after the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array

from glm_jax.pallas.norm import row_layout

_THREADS = 128
# Widths are multiples of this: a thread's part of a row is whole words.
UNIT = 2 * _THREADS


@dataclass(frozen=True, slots=True)
class RowWords:
    """A row of so many numbers, a multiple of UNIT, in words of 32 bits."""

    width: int

    @property
    def layout(self) -> Any:
        """As Pallas has it."""
        return row_layout(self.width)

    @property
    def words(self) -> int:
        """Of a piece: what one thread holds side by side, and one instruction moves."""
        return next(words for words in (4, 2, 1) if self.width % (UNIT * words) == 0)

    @property
    def pieces(self) -> int:
        """Of a thread."""
        return self.width // (UNIT * self.words)

    @property
    def step(self) -> int:
        """Bytes from a thread's piece to its next."""
        return 4 * self.words * _THREADS

    @property
    def suffix(self) -> str:
        """Of an instruction that moves a piece."""
        return ".b32" if self.words == 1 else f".v{self.words}.b32"

    def operands(self, names: Iterable[str]) -> str:
        """The words of a piece as such an instruction names them."""
        joined = ", ".join(names)
        return joined if self.words == 1 else f"{{{joined}}}"

    def numbered(self, first: int) -> str:
        """The same for operands of the code, from the first on."""
        return self.operands(f"${operand}" for operand in range(first, first + self.words))

    def address(self, begin: Any) -> Any:
        """Of a thread's first piece of a row that begins there; a pointer and an integer."""
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
        offset = arith.muli(arith.extui(i64, thread), utils.c(4 * self.words, i64))
        return arith.addi(llvm.ptrtoint(i64, begin), offset)

    def split(self, row: Any) -> list[list[Any]]:
        """The words of each piece of a row in registers."""
        kind = ir.VectorType.get((self.words,), ir.IntegerType.get_signless(32))
        return [
            [
                vector.extract(
                    vector.bitcast(kind, piece), dynamic_position=[], static_position=[word]
                )
                for word in range(self.words)
            ]
            for piece in row.registers.flat
        ]

    def join(self, words: Sequence[Any]) -> Any:
        """A row in registers, from all its words."""
        packed = ir.VectorType.get((self.words,), ir.IntegerType.get_signless(32))
        kind = ir.VectorType.get((2 * self.words,), ir.BF16Type.get())
        registers = np.empty((self.pieces,), dtype=object)
        for piece in range(self.pieces):
            some = words[piece * self.words : (piece + 1) * self.words]
            registers[piece] = vector.bitcast(kind, vector.from_elements(packed, list(some)))
        layout = fa.WGStridedFragLayout((self.width,), 2 * self.words)
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    def answers(self, count: int) -> list[Any]:
        """The return type of code that makes so many rows."""
        row = plgpu.ShapeDtypeStruct((self.width,), jnp.dtype(jnp.bfloat16), self.layout)
        return [row] * count


def load_rows(ref: Any, places: Sequence[Array]) -> list[Array]:
    """Rows ref[place], on their way at once; zeros, and nothing read, where place is beyond the last one.

    A branch a row would make each wait for the one before it.
    """
    num_rows, width = ref.shape
    row = RowWords(width)

    def load(_: Any, ref: Any, *places: Any) -> Any:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        begin, size = row.address(utils.memref_ptr(ref)), utils.c(2 * width, i64)
        kinds, code = [i32] * (row.pieces * row.words), _load_if(row, num_rows)
        rows = []
        for place in (place.registers.item() for place in places):
            address = arith.addi(begin, arith.muli(arith.extui(i64, place), size))
            words = utils.inline_ptx(
                code, address, place, result_types=kinds, has_side_effects=True
            )
            rows.append(row.join(words))
        return rows

    numbers = [plgpu.Layout.WG_SPLAT] * len(places)
    inline: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *numbers), return_type=row.answers(len(places))
    )
    return list(inline(load)(ref, *places))


def _load_if(row: RowWords, num_rows: int) -> str:
    """Code that loads a row if its place, the last operand, is below num_rows."""
    total = row.pieces * row.words
    zeros = [f"mov.b32 ${word}, 0;" for word in range(total)]
    loads = [
        f"@is_here ld.global{row.suffix} {row.numbered(piece * row.words)}, [${total}+{piece * row.step}];"
        for piece in range(row.pieces)
    ]
    is_here = f"setp.lt.u32 is_here, ${total + 1}, {num_rows};"
    return "\n".join(["{", ".reg .pred is_here;", is_here, *zeros, *loads, "}"])
