"""The two products of decode attention, in which every warp meets keys and values of its own.

Knows neither pages nor softmax.

A warp multiplies 16 queries with its share of a tile's keys, and what softmax makes of those scores with
the same keys' values: between the two products and from tile to tile, warps have nothing to tell each
other, and no barrier holds them. Both are mma.sync's (m16n8k16), whose operands are registers. They come
from memory as TMA swizzled it, 16 bytes a lane: eight keys by 128 bytes for scores, eight keys by 16
bytes, transposed, for values. A product's sum may run over its terms in any order as long as both
operands agree on it, so that a lane keeps the bytes it got, and FP8 ones are widened, exactly, to float16.

For the rest of a kernel a warpgroup's arrays are as tall as its warps: rows 16 w to 16 w + 15 are warp
w's, its queries against its keys. Where there are more than 16 queries, fewer warps share the keys.

Several tokens' queries may meet the same tile, a list of arrays for all of them: each token's numbers are
what they would be without the others, while what is loaded and widened serves all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fragmented
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float32

from glm_jax.pallas.widen import WIDEN

ROWS = 64
WARP_ROWS = 16
_WARPS = 4
_HEAD_DIM = 128
_FP8 = jnp.float8_e4m3fn
_LANE_BYTES = 16
_LINE = 128
# Products along a head, whose left operands are 16 bytes a lane.
_KEPT = 8
# Eight rows of 128 bytes, which TMA swizzles among themselves.
_ATOM = 8 * _LINE
# From two keys' neighbors in the head to two neighbors' pairs of keys.
_WIDEN_PAIRS = """{
.reg .b16 low, high;
.reg .b32 pairs;
prmt.b32 pairs, $2, 0, 0x3120;
mov.b32 {low, high}, pairs;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}"""
_LOAD_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
_ZERO = "@$1 st.shared.v4.b32 [$0], {0, 0, 0, 0};"
_STORES = {
    8: "@$1 st.shared.v2.f32 [$0+{}], {{$2, $3}};",
    16: "@$1 st.shared.v4.f32 [$0+{}], {{$2, $3, $4, $5}};",
}
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)


@dataclass(frozen=True, slots=True)
class WarpProducts:
    """The products of one tile after another.

    Attributes:
      num_queries: of a token, at most 64.
      num_tokens: whose queries meet the same keys.
      tile_size: keys of a tile, a multiple of 64.
      cache_dtype: of keys and values, bfloat16 or FP8.
      interpret: computes the same in plain operations, which the interpreter knows.
    """

    num_queries: int
    num_tokens: int
    tile_size: int
    cache_dtype: Any
    interpret: bool

    @property
    def operand(self) -> Any:
        """What is multiplied: FP8 numbers are exact in float16, and widen two at a time."""
        return jnp.float16 if self._is_fp8 else jnp.bfloat16

    @property
    def query_rows(self) -> int:
        """Queries with what pads them: rows of as many warps, which meet the same keys."""
        warps = pl.cdiv(self.num_queries, WARP_ROWS)
        return WARP_ROWS * next(count for count in (1, 2, 4) if warps <= count)

    @property
    def num_parts(self) -> int:
        """How many times the queries fill the rows, each time against another part of the keys."""
        return ROWS // self.query_rows

    @property
    def keys_per_warp(self) -> int:
        return self.tile_size // self.num_parts

    @property
    def transforms(self) -> tuple[Any, ...]:
        """How keys and values lie in shared memory."""
        columns = _LINE // jnp.dtype(self.cache_dtype).itemsize
        tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
        return tiling, plgpu.SwizzleTransform(_LINE)  # pyright: ignore[reportAbstractUsage]

    @property
    def query_layout(self) -> Any:
        """Of queries: a lane has what meets the bytes of a key that it loads."""
        line = self._lane_elements * 8
        # A tile as wide as the one around it would say nothing, and is refused.
        lines = () if line == _HEAD_DIM else ((line,),)
        tiles = ((16, _HEAD_DIM), (8, _HEAD_DIM), *lines, (line // 4,), (4,))
        warps: tuple[Any, ...] = (plgpu.Replicated(self.num_parts),)
        if self.query_rows > WARP_ROWS:
            tiles = ((self.query_rows, _HEAD_DIM), *tiles)
            warps = (*warps, -8 - len(lines)) if self.num_parts > 1 else (-8 - len(lines),)
        return plgpu.Layout.TILED(
            plgpu.Tiling(tiles), warp_dims=warps, lane_dims=(-4 - len(lines), -3), vector_dim=-1
        )

    @property
    def score_layout(self) -> Any:
        """Of scores and shares."""
        return plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=_WARPS)

    @property
    def out_layout(self) -> Any:
        """Of answers: in FP8, what two products made of even and odd places in the head."""
        if not self._is_fp8:
            return self.score_layout
        tiling = plgpu.Tiling(((ROWS, 16), (16, 16), (8, 16), (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)

    def keep(self, queries: Array, memory: Any) -> None:
        """Puts a token's queries, in query_layout, where scores reads them: operand[query_rows, 128]."""
        queries = queries.astype(jnp.float32).astype(self.operand)
        if self.interpret:
            memory[...] = queries
            return
        inline: Any = plgpu.inline_mgpu(arg_types=(self.query_layout, plgpu.RefType()))
        inline(lambda _, queries, memory: self._emit_keep(queries, memory))(queries, memory)

    def scores(self, queries: Any, keys: Any) -> list[Float32[Array, "rows keys_per_warp"]]:
        """Each warp's queries times its keys, token by token.

        Args:
          queries: as `keep` left them, operand[num_tokens * query_rows, 128].
        """
        if self.interpret:
            parts = keys[...].astype(jnp.float32).reshape(self.num_parts, -1, _HEAD_DIM)
            tokens = queries[...].astype(jnp.float32).reshape(self.num_tokens, -1, _HEAD_DIM)
            return [jnp.einsum("qd,pkd->pqk", x, parts).reshape(ROWS, -1) for x in tokens]
        shape = (ROWS, self.keys_per_warp)
        inline: Any = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(self.transforms)),
            return_type=[_float32(shape, self.score_layout)] * self.num_tokens,
        )
        return inline(lambda _, queries, keys: self._emit_scores(queries, keys))(queries, keys)

    def add(
        self, outs: list[Array], shares: list[Array], values: Any
    ) -> list[Float32[Array, "rows head"]]:
        """Tokens' outs, in out_layout, plus each warp's shares, in score_layout, times its values."""
        if self.interpret:
            parts = values[...].astype(jnp.float32).reshape(self.num_parts, -1, _HEAD_DIM)
            tokens = [
                x.astype(jnp.float32).reshape(*parts.shape[:1], -1, parts.shape[1]) for x in shares
            ]
            more = [jnp.einsum("pqk,pkd->pqd", x, parts).reshape(ROWS, -1) for x in tokens]
            return [out + x for out, x in zip(outs, more, strict=True)]
        outs_layouts, share_layouts = (
            [layout] * self.num_tokens for layout in (self.out_layout, self.score_layout)
        )
        inline: Any = plgpu.inline_mgpu(
            arg_types=(outs_layouts, share_layouts, plgpu.RefType(self.transforms)),
            return_type=[_float32((ROWS, _HEAD_DIM), self.out_layout)] * self.num_tokens,
        )
        return inline(lambda _, *operands: self._emit_add(*operands))(outs, shares, values)

    def store(self, out: Array, rows: int, memory: Any) -> None:
        """Stores the first rows of each part of a token's answers: float32[num_parts * rows, 128]."""
        if self.interpret:
            parts = out.reshape(self.num_parts, self.query_rows, _HEAD_DIM)
            memory[...] = parts[:, :rows].reshape(-1, _HEAD_DIM)
            return
        inline: Any = plgpu.inline_mgpu(arg_types=(self.out_layout, plgpu.RefType()))
        inline(lambda _, out, memory: self._emit_store(out, rows, memory))(out, memory)

    def silence(self, values: Any, first: Array) -> None:
        """Zeros in place of a tile's values from key `first` on; who reads them commits them first."""
        if self.interpret:
            is_there = jnp.arange(self.tile_size)[:, None] < first
            values[...] = jnp.where(is_there, values[...].astype(jnp.float32), 0.0).astype(
                self.cache_dtype
            )
            return
        inline: Any = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(self.transforms), plgpu.Layout.WG_SPLAT)
        )
        inline(lambda _, *operands: self._emit_silence(*operands))(values, first)

    @property
    def _is_fp8(self) -> bool:
        return self.cache_dtype == _FP8

    @property
    def _lane_elements(self) -> int:
        return _LANE_BYTES // jnp.dtype(self.cache_dtype).itemsize

    @property
    def _lines(self) -> int:
        """Lines of 128 bytes that a head fills."""
        return _HEAD_DIM // (8 * self._lane_elements)

    def _warp_and_lane(self) -> tuple[ir.Value, ir.Value]:
        i32 = ir.IntegerType.get_signless(32)
        warp = arith.remui(utils.warp_idx(), utils.c(_WARPS, i32))
        return warp, arith.remui(utils.thread_idx(), utils.c(32, i32))

    def _part_of_warp(self, memory: Any) -> tuple[ir.Value, ir.Value]:
        """Where this warp's part of a tile begins, and the lane."""
        i32 = ir.IntegerType.get_signless(32)
        warp, lane = self._warp_and_lane()
        part = arith.divui(warp, utils.c(self.query_rows // WARP_ROWS, i32))
        bytes_of_part = self.keys_per_warp // 8 * self._lines * _ATOM
        start = arith.muli(part, utils.c(bytes_of_part, i32))
        return _at(utils.memref_ptr(memory), start), lane

    def _kept(self, memory: Any) -> ir.Value:
        """Where this lane's queries are, the first 16 of _KEPT times 16 bytes."""
        i32 = ir.IntegerType.get_signless(32)
        warp, lane = self._warp_and_lane()
        block = arith.remui(warp, utils.c(self.query_rows // WARP_ROWS, i32))
        start = arith.muli(block, utils.c(_KEPT * 32 * _LANE_BYTES, i32))
        offset = arith.addi(start, arith.muli(lane, utils.c(_LANE_BYTES, i32)))
        return _at(utils.memref_ptr(memory), offset)

    def _emit_keep(self, queries: Any, memory: Any) -> None:
        """Emits stores of the left operands as the lane will use them, four words a product."""
        # It may be where they came from.
        utils.warpgroup_barrier()
        place = self._kept(memory)
        upper, lower = ([_words(x) for x in half] for half in queries.registers.reshape(2, -1))
        for step, (a, b) in enumerate(zip(upper, lower, strict=True)):
            words = _vector([a[0], b[0], a[1], b[1]])
            llvm.store(words, _at(place, step * 32 * _LANE_BYTES), alignment=_LANE_BYTES)
        utils.warpgroup_barrier()

    def _emit_scores(self, queries: Any, keys: Any) -> Any:
        """Emits scores of this warp; its lane 4 g + t has 32 bytes of each line of key g."""
        i32 = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((4,), i32)
        start, lane = self._part_of_warp(keys)
        g, t = arith.divui(lane, utils.c(4, i32)), arith.remui(lane, utils.c(4, i32))
        row = _at(start, arith.muli(g, utils.c(_LINE, i32)))
        chunks = []
        for i in range(2):
            chunk = arith.addi(arith.muli(t, utils.c(2, i32)), utils.c(i, i32))
            place = arith.muli(arith.xori(chunk, g), utils.c(_LANE_BYTES, i32))
            chunks.append(_at(row, place))
        kept = self._kept(queries)
        zero = utils.c(0.0, ir.F32Type.get())
        num_eights = self.keys_per_warp // 8
        sums = [[[zero] * 4 for _ in range(num_eights)] for _ in range(self.num_tokens)]
        step = 0
        for line in range(self._lines):
            for chunk in chunks:
                rhs = []
                for eight in range(num_eights):
                    at = _at(chunk, (eight * self._lines + line) * _ATOM)
                    rhs.append(
                        self._as_pairs(_elements(llvm.load(words, at, alignment=_LANE_BYTES)))
                    )
                for pairs in zip(*rhs, strict=True):
                    for token, of_token in enumerate(sums):
                        place = token * self.query_rows * _HEAD_DIM * 2 + step * 32 * _LANE_BYTES
                        at = _at(kept, place)
                        lhs = _elements(llvm.load(words, at, alignment=_LANE_BYTES))
                        of_token[:] = [
                            self._mma(s, lhs, pair) for s, pair in zip(of_token, pairs, strict=True)
                        ]
                    step += 1
        layout = self.score_layout.to_mgpu()
        shape = layout.registers_shape((ROWS, self.keys_per_warp))
        return [
            _fragmented([_vector(s[i : i + 2]) for s in of_token for i in (0, 2)], shape, layout)
            for of_token in sums
        ]

    def _as_pairs(self, words: list[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Registers of two elements, two at a time, of the elements as they lay, widened one by one."""
        if not self._is_fp8:
            yield from zip(words[::2], words[1::2], strict=True)
            return
        i32 = ir.IntegerType.get_signless(32)
        for word in words:
            first, second = utils.inline_ptx(WIDEN, word, result_types=(i32, i32))
            yield first, second

    def _emit_add(self, outs: list[Any], shares: list[Any], values: Any) -> list[Any]:
        """Emits answers of this warp; its lanes address 16 keys by 32 bytes at a time."""
        i32 = ir.IntegerType.get_signless(32)
        start, lane = self._part_of_warp(values)
        key = arith.remui(lane, utils.c(8, i32))
        is_later = arith.remui(arith.divui(lane, utils.c(8, i32)), utils.c(2, i32))
        column = arith.xori(arith.divui(lane, utils.c(16, i32)), key)
        offset = arith.addi(
            arith.muli(is_later, utils.c(self._lines * _ATOM, i32)),
            arith.muli(key, utils.c(_LINE, i32)),
        )
        # Columns two apart differ in bits that neither the row nor the pair has.
        places = [
            _at(
                start,
                arith.addi(
                    offset,
                    arith.muli(
                        arith.xori(column, utils.c(2 * pair, i32)), utils.c(_LANE_BYTES, i32)
                    ),
                ),
            )
            for pair in range(4)
        ]
        lhs = [[utils.bitcast(word, i32) for word in x.registers.flatten()] for x in shares]
        answers = [self._unpack(out) for out in outs]
        for step in range(self.keys_per_warp // 16):
            for line in range(self._lines):
                for pair, place in enumerate(places):
                    at = _at(place, (2 * step * self._lines + line) * _ATOM)
                    blocks = self._values(at)
                    for of_token, left in zip(answers, lhs, strict=True):
                        for i, block in enumerate(blocks):
                            index = (line * 4 + pair) * len(blocks) + i
                            of_token[index] = self._mma(
                                of_token[index], left[4 * step : 4 * step + 4], block
                            )
        return [
            _fragmented(self._pack(of_token), out.registers.shape, out.layout)
            for of_token, out in zip(answers, outs, strict=True)
        ]

    def _emit_store(self, out: Any, rows: int, memory: Any) -> None:
        """Emits stores of this warp's rows; its lane 4 g + t has rows g and g + 8."""
        i32 = ir.IntegerType.get_signless(32)
        warp, lane = self._warp_and_lane()
        warps = utils.c(self.query_rows // WARP_ROWS, i32)
        g, t = arith.divui(lane, utils.c(4, i32)), arith.remui(lane, utils.c(4, i32))
        block = arith.muli(arith.remui(warp, warps), utils.c(WARP_ROWS, i32))
        row = arith.addi(block, g)
        first = arith.muli(arith.divui(warp, warps), utils.c(rows, i32))
        registers = out.registers.reshape(-1, 2)
        size = 4 * ir.VectorType(registers[0, 0].type).shape[0]
        start = arith.addi(
            arith.muli(arith.addi(first, row), utils.c(4 * _HEAD_DIM, i32)),
            arith.muli(t, utils.c(size, i32)),
        )
        address = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(memory)), start)
        for half in range(2):
            below = utils.c(rows - 8 * half, i32)
            is_there = arith.cmpi(arith.CmpIPredicate.slt, row, below)
            for column, register in enumerate(registers[:, half]):
                offset = 8 * half * 4 * _HEAD_DIM + column * 4 * size
                code = _STORES[size].format(offset)
                utils.inline_ptx(
                    code, address, is_there, *_elements(register), has_side_effects=True
                )

    def _emit_silence(self, values: Any, first: Any) -> None:
        """Emits stores of zeros; a thread has a key, whose lines are whole whatever the swizzle."""
        i32 = ir.IntegerType.get_signless(32)
        key = arith.remui(utils.thread_idx(), utils.c(_WARPS * 32, i32))
        is_in = arith.cmpi(arith.CmpIPredicate.ult, key, utils.c(self.tile_size, i32))
        is_late = arith.cmpi(arith.CmpIPredicate.sge, key, first.registers.item())
        is_mine = arith.andi(is_in, is_late)
        atom = arith.muli(arith.divui(key, utils.c(8, i32)), utils.c(self._lines * _ATOM, i32))
        line = arith.muli(arith.remui(key, utils.c(8, i32)), utils.c(_LINE, i32))
        place = _at(utils.memref_ptr(values), arith.addi(atom, line))
        address = llvm.ptrtoint(i32, place)
        for number in range(self._lines):
            for chunk in range(0, _LINE, _LANE_BYTES):
                offset = utils.c(number * _ATOM + chunk, i32)
                at = arith.addi(address, offset)
                utils.inline_ptx(_ZERO, at, is_mine, has_side_effects=True)

    def _values(self, place: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Operands of 16 keys by eight places in the head each, from 16 keys by 32 bytes."""
        i32 = ir.IntegerType.get_signless(32)
        address = llvm.ptrtoint(i32, place)
        loaded = utils.inline_ptx(
            _LOAD_TRANSPOSED, address, result_types=(i32,) * 4, has_side_effects=True
        )
        if not self._is_fp8:
            return [(loaded[0], loaded[1]), (loaded[2], loaded[3])]
        wide = [utils.inline_ptx(_WIDEN_PAIRS, word, result_types=(i32, i32)) for word in loaded]
        return [
            (wide[first][parity], wide[first + 1][parity])
            for first in (0, 2)
            for parity in range(2)
        ]

    def _unpack(self, out: Any) -> list[list[ir.Value]]:
        """The sums of each product of eight places in the head, in the order of _values' operands."""
        upper, lower = out.registers.reshape(-1, 2).T
        if not self._is_fp8:
            return [_elements(a) + _elements(b) for a, b in zip(upper, lower, strict=True)]
        answers = []
        for a, b in zip(upper, lower, strict=True):
            a, b = _elements(a), _elements(b)
            answers += [a[parity::2] + b[parity::2] for parity in range(2)]
        return answers

    def _pack(self, answers: list[list[ir.Value]]) -> list[ir.Value]:
        """Registers of what _unpack took from them."""
        if not self._is_fp8:
            return [_vector(sums[half : half + 2]) for sums in answers for half in (0, 2)]
        return [
            _vector([even[half], odd[half], even[half + 1], odd[half + 1]])
            for even, odd in zip(answers[::2], answers[1::2], strict=True)
            for half in (0, 2)
        ]

    def _mma(self, sums: list[ir.Value], lhs: list[ir.Value], rhs: tuple[ir.Value, ...]) -> Any:
        code = _MMA.format("f16" if self._is_fp8 else "bf16")
        operands = (*lhs, *rhs, *sums)
        return list(utils.inline_ptx(code, *operands, result_types=(ir.F32Type.get(),) * 4))


def _at(pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _elements(vector: ir.Value) -> list[ir.Value]:
    i32 = ir.IntegerType.get_signless(32)
    length = ir.VectorType(vector.type).shape[0]
    return [llvm.extractelement(vector, utils.c(i, i32)) for i in range(length)]


def _words(vector: ir.Value) -> list[ir.Value]:
    """A register of four narrow elements as two words."""
    words = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
    return _elements(llvm.bitcast(words, vector))


def _vector(elements: list[ir.Value]) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    vector = llvm.mlir_undef(ir.VectorType.get((len(elements),), elements[0].type))
    for i, element in enumerate(elements):
        vector = llvm.insertelement(vector, element, position=utils.c(i, i32))
    return vector


def _fragmented(registers: list[ir.Value], shape: tuple[int, ...], layout: Any) -> Any:
    array = np.asarray(registers, dtype=object).reshape(shape)
    return fragmented.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)


def _float32(shape: tuple[int, ...], layout: Any) -> Any:
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=layout)
