"""Widens FP8 numbers to float16, exactly, for the tensor cores: a tile in shared memory, or pages.

Knows no attention.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float16, Int32

from glm_jax.pallas import launch_order

ROWS = 32

_WIDTH = 128
_WARPS = 4
_CHUNK = 16
_LINE = 128
# Eight rows of 128 bytes, which are swizzled among themselves.
_ATOM = 8 * _LINE
# Four numbers in one register to two pairs.
WIDEN = """{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}"""


def transforms(dtype: Any) -> tuple[Any, ...]:
    """How a tile of 128 columns lies in shared memory: lines of 128 bytes, swizzled by eight."""
    columns = _LINE // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(_LINE)  # pyright: ignore[reportAbstractUsage]


def widen(narrow: Any, wide: Any, *, interpret: bool) -> None:
    """wide float16[rows, 128] = narrow float8_e4m3fn[rows, 128]; rows are a multiple of ROWS.

    For a warpgroup, whose threads have yet to be told that all of it is done.
    """
    if interpret:
        wide[...] = narrow[...].astype(jnp.float16)
        return
    inline: Any = plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(transforms(jnp.float8_e4m3fn)),
            plgpu.RefType(transforms(jnp.float16)),
        )
    )
    rows = narrow.shape[0]
    inline(lambda _, narrow, wide: _emit(narrow, wide, rows))(narrow, wide)


def widen_pages(
    k_pages: Any,
    v_pages: Any,
    layer: Int32[Array, "1"],
    page_table: Int32[Array, "B P"],
    last: Int32[Array, " B"],
    *,
    interpret: bool,
) -> tuple[Float16[Array, "1 pages K page_size 128"], Float16[Array, "1 pages K page_size 128"]]:
    """Pages of a layer as one layer of pages of their own, in the order of the page table.

    Those past a row's last position are left as they are, whatever that is.

    Args:
      k_pages, v_pages: float8_e4m3fn[L, pages, K, page_size, 128], arrays or Refs.
    """
    num_rows, num_places = page_table.shape
    _, _, kv_heads, page_size, _ = k_pages.shape

    def body(layer_gmem, table_gmem, last_gmem, k_gmem, v_gmem, *scratch):
        *outs, narrow, wide, landed = scratch
        row, place, head = (lax.axis_index(name) for name in ("row", "place", "head"))

        @pl.when(place * page_size <= last_gmem[row])
        def _():
            page = table_gmem[row, place]
            for i, pages in enumerate((k_gmem, v_gmem)):
                source = pages.at[layer_gmem[0], page, head]
                plgpu.copy_gmem_to_smem(source, narrow.at[i], landed.at[i])
            for i, out in enumerate(outs):
                plgpu.barrier_wait(landed.at[i])
                widen(narrow.at[i], wide.at[i], interpret=interpret)
                plgpu.commit_smem()
                target = out.at[0, row * num_places + place, head]
                plgpu.copy_smem_to_gmem(wide.at[i], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shape = (1, num_rows * num_places, kv_heads, page_size, _WIDTH)
    pair = (2, page_size, _WIDTH)
    kernel = launch_order.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(shape, jnp.float16),) * 2,
        grid=(num_places, kv_heads, num_rows),
        grid_names=("place", "head", "row"),
        scratch_types=(
            plgpu.SMEM(pair, jnp.float8_e4m3fn, transforms=transforms(jnp.float8_e4m3fn)),
            plgpu.SMEM(pair, jnp.float16, transforms=transforms(jnp.float16)),
            plgpu.Barrier(num_barriers=2),
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="widen_pages",
    )
    return kernel(layer, page_table, last, k_pages, v_pages)


def _emit(narrow: Any, wide: Any, rows: int) -> None:
    """A lane takes 16 bytes at a time, those of a warp being half a line of each of eight rows.

    Of the eight lanes that go to the banks together, four have a row and four the row whose number
    differs in two bits: one keeps them apart where they load, one where they store.
    """
    i32 = ir.IntegerType.get_signless(32)
    words = ir.VectorType.get((4,), i32)

    def const(value: int) -> ir.Value:
        return utils.c(value, i32)

    warp = arith.remui(utils.warp_idx(), const(_WARPS))
    lane = arith.remui(utils.thread_idx(), const(32))
    column = arith.remui(lane, const(4))
    is_other = arith.remui(arith.divui(lane, const(4)), const(2))
    row = arith.xori(arith.divui(lane, const(8)), arith.muli(is_other, const(5)))
    line = arith.muli(row, const(_LINE))

    def place(ref: Any, atoms: int, chunk: ir.Value) -> ir.Value:
        start = arith.addi(arith.muli(warp, const(atoms * _ATOM)), line)
        offset = arith.addi(start, arith.muli(arith.xori(chunk, row), const(_CHUNK)))
        return _at(utils.memref_ptr(ref), offset)

    twice = arith.muli(column, const(2))
    sources = [place(narrow, 1, arith.addi(column, const(4 * half))) for half in range(2)]
    targets = [place(wide, 2, arith.addi(twice, const(i))) for i in range(2)]
    for eight in range(0, rows // 8, _WARPS):
        for half, source in enumerate(sources):
            loaded = llvm.load(words, _at(source, eight * _ATOM), alignment=_CHUNK)
            pairs = []
            for i in range(4):
                word = llvm.extractelement(loaded, const(i))
                pairs += utils.inline_ptx(WIDEN, word, result_types=(i32, i32))
            for i, target in enumerate(targets):
                vector = llvm.mlir_undef(words)
                for j, pair in enumerate(pairs[4 * i : 4 * i + 4]):
                    vector = llvm.insertelement(vector, pair, position=const(j))
                llvm.store(vector, _at(target, (2 * eight + half) * _ATOM), alignment=_CHUNK)


def _at(pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))
