"""Numbers that CTAs of a kernel hand to others that run already: a number is its own flag.

Knows no kernel. An empty place holds bits that no sum has, and whoever waits reads until there are
others; then it empties the place for the next call. So numbers take one way through the L2 cache, with
no fence and no counter. Each place has one writer and one reader a call; memory is made once, outside
of every loop. The interpreter has none of that.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector
from jaxtyping import Array, Float32

# A NaN that arithmetic does not make: its own is 0x7fffffff.
_EMPTY = "0xffffffff"
_THREADS = 128


def make_empty(num_parts: int, num_rows: int, num_columns: int) -> jax.Ref:
    """Empty memory of float32[parts, rows, columns], columns a multiple of 128."""
    shape = num_parts, num_rows, num_columns

    def empty_products(ref: Any) -> None:
        clear(ref.at[:, lax.axis_index("row")], num_columns)

    empty = plgpu.kernel(
        empty_products,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(num_rows,),
        grid_names=("row",),
        kernel_name="empty_products",
    )()
    return jax.new_ref(empty)


def sum_of(ref: Any, num_columns: int, *, is_one_of_many: bool) -> list[Float32[Array, "128"]]:
    """The sum of all parts, in order, of the first columns of a row, once they are there.

    By all threads of a warpgroup, each column by one; columns past the last are anything.

    Args:
      ref: float32[parts, columns].
      is_one_of_many: whether so many wait at once that reading all places over and over would be in the
        way of those who write: the last part is waited for first.
    """
    num_pieces = -(-num_columns // _THREADS)

    def wait(_: Any, ref: Any) -> Any:
        num_parts, stride = _parts(ref)
        kinds = [ir.F32Type.get()] * num_pieces
        code = "\n".join(_sum_code(num_parts, stride, num_columns, is_one_of_many))
        sums = utils.inline_ptx(
            code, utils.memref_ptr(ref), result_types=kinds, has_side_effects=True, convergent=True
        )
        return [_spread(each) for each in sums]

    kind = plgpu.ShapeDtypeStruct(
        (_THREADS,), jnp.dtype(jnp.float32), plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)
    )
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[kind] * num_pieces)
    return list(inline(wait)(ref))


def clear(ref: Any, num_columns: int) -> None:
    """Empties a row of all parts, after the same threads have read it."""

    def write(_: Any, ref: Any) -> None:
        num_parts, stride = _parts(ref)
        code = "\n".join(_clear_code(num_parts, stride, num_columns))
        utils.inline_ptx(code, utils.memref_ptr(ref), has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    inline(write)(ref)


def _parts(ref: Any) -> tuple[int, int]:
    """How many parts, and bytes from one to the next."""
    kind = ir.MemRefType(ref.type)
    strides, _ = kind.get_strides_and_offset()
    return kind.shape[0], 4 * strides[0]


def _offsets(num_parts: int, stride: int, num_columns: int) -> list[tuple[int, int]]:
    pieces = range(-(-num_columns // _THREADS))
    return [
        (piece, part * stride + 4 * _THREADS * piece)
        for piece in pieces
        for part in range(num_parts)
    ]


def _begin(ref: str, num_columns: int) -> Iterator[str]:
    """A thread's first place, and which pieces have a column for it."""
    pieces = range(-(-num_columns // _THREADS))
    yield f".reg .pred is_early, {', '.join(f'in{piece}' for piece in pieces)};"
    yield ".reg .b32 thread;"
    yield ".reg .b64 at;"
    yield "mov.u32 thread, %tid.x;"
    yield f"mad.wide.u32 at, thread, 4, {ref};"
    for piece in pieces:
        yield f"setp.lt.u32 in{piece}, thread, {num_columns - _THREADS * piece};"


def _clear_code(num_parts: int, stride: int, num_columns: int) -> Iterator[str]:
    yield "{"
    yield from _begin("$0", num_columns)
    for piece, offset in _offsets(num_parts, stride, num_columns):
        yield f"@in{piece} st.relaxed.gpu.global.b32 [at+{offset}], {_EMPTY};"
    yield "}"


def _sum_code(num_parts: int, stride: int, num_columns: int, is_one_of_many: bool) -> Iterator[str]:
    offsets = _offsets(num_parts, stride, num_columns)
    num_pieces = len(offsets) // num_parts
    words = [f"w{number}" for number in range(len(offsets))]
    yield "{"
    yield from _begin(f"${num_pieces}", num_columns)
    yield f".reg .b32 {', '.join(words)};"
    for word, (piece, _) in zip(words, offsets, strict=True):
        yield f"selp.b32 {word}, {_EMPTY}, 0, in{piece};"
    if is_one_of_many:
        last, (_, offset) = words[num_parts - 1], offsets[num_parts - 1]
        yield "not_yet:"
        yield f"@in0 ld.relaxed.gpu.global.b32 {last}, [at+{offset}];"
        yield f"setp.eq.u32 is_early, {last}, {_EMPTY};"
        yield "vote.sync.any.pred is_early, is_early, 0xffffffff;"
        yield "@is_early bra not_yet;"
    yield "again:"
    for word, (_, offset) in zip(words, offsets, strict=True):
        yield f"setp.eq.u32 is_early, {word}, {_EMPTY};"
        yield f"@is_early ld.relaxed.gpu.global.b32 {word}, [at+{offset}];"
    yield f"setp.eq.u32 is_early, {words[0]}, {_EMPTY};"
    for word in words[1:]:
        yield f"setp.eq.or.u32 is_early, {word}, {_EMPTY}, is_early;"
    yield "vote.sync.any.pred is_early, is_early, 0xffffffff;"
    yield "@is_early bra again;"
    for piece in range(num_pieces):
        first, *others = words[piece * num_parts : (piece + 1) * num_parts]
        for word in others:
            yield f"add.rn.f32 {first}, {first}, {word};"
        yield f"mov.b32 ${piece}, {first};"
    yield "}"


def _spread(value: Any) -> Any:
    """A number of each thread as an array."""
    registers = np.empty((1,), dtype=object)
    kind = ir.VectorType.get((1,), ir.F32Type.get())
    registers[0] = vector.from_elements(kind, [value])
    layout = fa.WGStridedFragLayout((_THREADS,), 1)
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
