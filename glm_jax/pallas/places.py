"""A token's experts, and its rows among those of all tokens, found by the CTA of each token.

Knows neither scores nor weights. A CTA picks for its token and tells all others by one word: which of
this device's experts it takes, and by the number of the call that the word is of this call. Whoever has
seen all words knows how many tokens each expert has, and how many of them come before its own: so each
CTA brings its own token to its places, and nobody waits for more than words. In PTX, since a warp picks
and counts in a hundred instructions what the compiler makes of arrays in thousands; the interpreter
runs none of this.
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from glm_jax.pallas.dispatch import Sizes
from glm_jax.pallas.router import Choice

_WARP, _WARPGROUP = 32, 128
# A warp's lanes are picks of a token, which are added up eight at a time.
MAX_PICKS = 8
# Of the words' memory, what the number of the last call has for itself: a line.
_HEADER = 128
_ALL = "0xffffffff"
_TRANSPOSED = {16: 0x0000FFFF, 8: 0x00FF00FF, 4: 0x0F0F0F0F, 2: 0x33333333, 1: 0x55555555}


def make_words(num_tokens: int, num_local: int) -> jax.Ref:
    """What the CTAs of calls with so many tokens and local experts tell each other by, while in scope."""
    return jax.new_ref(jnp.zeros(num_words(num_tokens, num_local), jnp.int32))


def num_words(num_tokens: int, num_local: int) -> int:
    """Of 32 bits, with those of tokens that a warpgroup looks at besides."""
    rounds, masks = -(-num_tokens // _WARPGROUP), -(-num_local // _WARP)
    return _HEADER // 4 + 2 * masks * rounds * _WARPGROUP


class Inputs(NamedTuple):
    """Refs that a CTA reads: biases of the layer, first local expert, words, scales of all tokens."""

    biases: Any
    first: Any
    words: Any
    x_scale: Any


class Outputs(NamedTuple):
    """Refs of a token's experts, weights and rows, and of what all tokens share: see Dispatch."""

    experts: Any
    weights: Any
    rows: Any
    values: Any
    scale: Any
    tokens: Any
    tile_experts: Any
    num_tiles: Any


def scratch(sizes: Sizes, choice: Choice) -> dict[str, Any]:
    """The shared memory of ask and place; whoever calls place fills scores, and row, its token."""
    masks = -(-sizes.num_local // _WARP)
    per_expert = plgpu.SMEM((choice.padded_experts,), jnp.float32)
    return {
        "scores": per_expert,
        "biases": per_expert,
        "known": plgpu.SMEM((4,), jnp.int32),
        "parts": plgpu.SMEM((masks * _WARPGROUP,), jnp.int32),
        "row": plgpu.SMEM((sizes.width,), jnp.float8_e4m3fn),
    }


def ask(inputs: Inputs, smem: dict[str, Any], num_experts: int) -> None:
    """Asks for what place needs of device memory besides words, and waits for nothing."""
    copies = "\n".join(
        f"setp.lt.u32 is_in, thread, {num_experts - first};\n"
        f"@is_in cp.async.ca.shared.global [to+{4 * first}], [from+{4 * first}], 4;"
        for first in range(0, num_experts, _WARP)
    )
    code = f"""{{
.reg .pred is_in;
.reg .b32 thread, to;
.reg .b64 from;
mov.u32 thread, %tid.x;
setp.ge.u32 is_in, thread, {_WARP};
@is_in bra done;
mad.lo.u32 to, thread, 4, $3;
mad.wide.u32 from, thread, 4, $0;
{copies}
setp.eq.u32 is_in, thread, 0;
@is_in cp.async.ca.shared.global [$4], [$1], 4;
@is_in cp.async.ca.shared.global [$4+4], [$2], 4;
done:
}}"""
    _inline(code, [*inputs[:3]], [smem["biases"], smem["known"]])


def place(
    inputs: Inputs,
    outputs: Outputs,
    smem: dict[str, Any],
    sizes: Sizes,
    choice: Choice,
    first_cta: int = 0,
) -> None:
    """Picks the experts of this CTA's token, and copies the token to its rows: the work of 128 threads.

    From first_cta on there is one CTA a token, all of them running at once. Rows that only fill a tile
    are not written.
    """
    shared = [smem[name] for name in ("scores", "biases", "known", "parts", "row")]
    names = ["words", "x_scale", *outputs._fields, "scores", "biases", "known", "parts", "row"]
    code = _place_code(sizes, choice, first_cta)
    for operand, name in enumerate(names):
        code = code.replace(f"<{name}>", f"${operand}")
    _inline(code, [inputs.words, inputs.x_scale, *outputs], shared)


def _inline(code: str, device_refs: list[Any], shared_refs: list[Any]) -> None:
    """Runs PTX on every thread; its operands are the refs' addresses."""

    def emit(_: Any, *refs: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        pointers = [utils.memref_ptr(ref) for ref in refs]
        of_shared = [llvm.ptrtoint(i32, pointer) for pointer in pointers[len(device_refs) :]]
        operands = [*pointers[: len(device_refs)], *of_shared]
        utils.inline_ptx(code, *operands, has_side_effects=True, convergent=True)

    refs = [*device_refs, *shared_refs]
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    inline(emit)(*refs)


def _place_code(sizes: Sizes, choice: Choice, first_cta: int) -> str:
    slots, masks = -(-choice.num_experts // _WARP), -(-sizes.num_local // _WARP)
    lines = [
        "{",
        ".reg .pred p, q, is_leader, is_pick, is_padded, is_local, is_token;",
        ".reg .b32 thread, lane, token, first, number, one, at, top, win, mine, local, bit, t, u;",
        ".reg .b32 index, x, seen, below, count, total, before, tiles, begin, end, carry, row;",
        ".reg .f32 share, sum, other, x_scale;",
        ".reg .b64 word, here, to;",
        *(
            f".reg .b32 key{slot}, expert{slot};\n.reg .f32 score{slot}, bias{slot};"
            for slot in range(slots)
        ),
        *(f".reg .b32 mask{mask}, part{mask}, row{mask};" for mask in range(masks)),
        "mov.u32 thread, %tid.x;",
        "mov.u32 token, %ctaid.x;",
        f"sub.u32 token, token, {first_cta};",
        "and.b32 lane, thread, 31;",
        "mov.b32 one, 1;",
        f"setp.ge.u32 p, thread, {_WARP};",
        "@p bra told;",
        *_pick(choice, slots),
        *_tell(sizes, choice, masks),
        *_weigh(choice),
        "told:",
        "bar.sync 0;",
        *_count(sizes, masks),
        "bar.sync 0;",
        f"setp.ge.u32 p, thread, {_WARP};",
        "@p bra done;",
        *_bring(sizes, masks),
        "done:",
        "}",
    ]
    return "\n".join(lines)


def _pick(choice: Choice, slots: int) -> Iterator[str]:
    """Lane n comes to hold the expert of rank n: of equal keys the lower index comes first."""
    yield from (
        "mul.wide.u32 to, token, 4;",
        "add.u64 to, to, <x_scale>;",
        "ld.global.f32 x_scale, [to];",
        "cp.async.wait_all;",
        f"bar.warp.sync {_ALL};",
        "ld.shared.b32 first, [<known>];",
        "ld.shared.b32 number, [<known>+4];",
        "add.u32 number, number, 1;",
        "mad.lo.u32 at, lane, 4, <scores>;",
        "mad.lo.u32 t, lane, 4, <biases>;",
    )
    for slot in range(slots):
        yield f"ld.shared.f32 score{slot}, [at+{128 * slot}];"
        yield f"ld.shared.f32 bias{slot}, [t+{128 * slot}];"
    for slot in range(slots):
        # Floats as integers of the same order, all above 0.
        yield f"add.rn.f32 score{slot}, score{slot}, bias{slot};"
        yield f"mov.b32 key{slot}, score{slot};"
        yield f"shr.s32 u, key{slot}, 31;"
        yield "or.b32 u, u, 0x80000000;"
        yield f"xor.b32 key{slot}, key{slot}, u;"
        if _WARP * (slot + 1) > choice.num_experts:
            yield f"setp.lt.u32 p, lane, {choice.num_experts - _WARP * slot};"
            yield f"selp.b32 key{slot}, key{slot}, 0, p;"
        yield f"add.u32 expert{slot}, lane, {_WARP * slot};"
    yield from _sort(slots)
    yield "mov.b32 mine, 0;"
    for rank in range(choice.num_picks):
        yield from (
            f"redux.sync.max.u32 top, key0, {_ALL};",
            "setp.eq.u32 p, key0, top;",
            f"selp.b32 win, expert0, {_ALL}, p;",
            f"redux.sync.min.u32 win, win, {_ALL};",
            f"setp.eq.u32 p, lane, {rank};",
            "selp.b32 mine, win, mine, p;",
            "setp.eq.u32 p, expert0, win;",
        )
        for slot in range(slots - 1):
            yield f"@p mov.b32 key{slot}, key{slot + 1};"
            yield f"@p mov.b32 expert{slot}, expert{slot + 1};"
        yield f"@p mov.b32 key{slots - 1}, 0;"


def _sort(slots: int) -> Iterator[str]:
    """Each lane's keys fall; equal ones stay in order."""
    for phase in range(slots):
        for slot in range(phase % 2, slots - 1, 2):
            yield f"setp.lt.u32 p, key{slot}, key{slot + 1};"
            for name in ("key", "expert"):
                one, other = f"{name}{slot}", f"{name}{slot + 1}"
                yield from (
                    f"selp.b32 t, {other}, {one}, p;",
                    f"selp.b32 {other}, {one}, {other}, p;",
                    f"mov.b32 {one}, t;",
                )


def _tell(sizes: Sizes, choice: Choice, masks: int) -> Iterator[str]:
    yield from (
        f"setp.lt.u32 is_pick, lane, {choice.num_picks};",
        f"setp.lt.u32 is_padded, lane, {choice.padded_picks};",
        "setp.eq.u32 is_leader, lane, 0;",
        "sub.u32 local, mine, first;",
        f"setp.lt.and.u32 is_local, local, {sizes.num_local}, is_pick;",
        f"mad.wide.u32 here, token, {8 * masks}, <words>;",
    )
    for mask in range(masks):
        # A shift by more than 31, or by less than 0, leaves nothing.
        yield f"sub.u32 bit, local, {_WARP * mask};"
        yield "shl.b32 bit, one, bit;"
        yield "selp.b32 bit, bit, 0, is_local;"
        yield f"redux.sync.or.b32 mask{mask}, bit, {_ALL};"
        yield f"mov.b64 word, {{mask{mask}, number}};"
        yield f"@is_leader st.relaxed.gpu.global.b64 [here+{_HEADER + 8 * mask}], word;"


def _weigh(choice: Choice) -> Iterator[str]:
    """Weights in the order of additions of router.pick."""
    yield from (
        "mad.lo.u32 at, mine, 4, <scores>;",
        "ld.shared.f32 share, [at];",
        "selp.f32 share, share, 0f00000000, is_pick;",
    )
    if choice.norm_topk_prob:
        yield "mov.f32 sum, share;"
        for distance in (1, 2, 4):
            yield f"shfl.sync.bfly.b32 other, sum, {distance}, 31, {_ALL};"
            yield "add.rn.f32 sum, sum, other;"
        yield f"add.rn.f32 sum, sum, {_float(1e-20)};"
        yield "div.full.f32 share, share, sum;"
    yield from (
        f"mul.rn.f32 share, share, {_float(choice.routed_scaling_factor)};",
        "mad.wide.u32 to, lane, 4, <experts>;",
        "@is_padded st.global.b32 [to], mine;",
        "mad.wide.u32 to, lane, 4, <weights>;",
        "@is_padded st.global.f32 [to], share;",
    )


def _count(sizes: Sizes, masks: int) -> Iterator[str]:
    """Lane n of each warp counts, for each mask, its expert's tokens, and those before this CTA's."""
    yield from ("ld.shared.b32 number, [<known>+4];", "add.u32 number, number, 1;")
    yield from (f"mov.b32 part{mask}, 0;" for mask in range(masks))
    for first in range(0, sizes.num_tokens, _WARPGROUP):
        yield from (
            f"add.u32 index, thread, {first};",
            f"setp.lt.u32 is_token, index, {sizes.num_tokens};",
            f"mad.wide.u32 here, index, {8 * masks}, <words>;",
            f"and.b32 below, index, {_hex(~31)};",
            "sub.s32 below, token, below;",
            "max.s32 below, below, 0;",
            "shl.b32 below, one, below;",
            "sub.u32 below, below, 1;",
        )
        for mask in range(masks):
            yield from (
                f"wait{first}_{mask}:",
                f"ld.relaxed.gpu.global.b64 word, [here+{_HEADER + 8 * mask}];",
                "mov.b64 {x, seen}, word;",
                "setp.ne.and.u32 p, seen, number, is_token;",
                f"vote.sync.any.pred p, p, {_ALL};",
                f"@p bra wait{first}_{mask};",
                "selp.b32 x, x, 0, is_token;",
                *_transpose(),
                "popc.b32 count, x;",
                "and.b32 x, x, below;",
                "popc.b32 x, x;",
                "shl.b32 x, x, 16;",
                "add.u32 x, x, count;",
                f"add.u32 part{mask}, part{mask}, x;",
            )
    yield "mad.lo.u32 at, thread, 4, <parts>;"
    for mask in range(masks):
        yield f"st.shared.b32 [at+{4 * _WARPGROUP * mask}], part{mask};"


def _transpose() -> Iterator[str]:
    """Bit m of lane n becomes bit n of lane m: tokens' experts, experts' tokens."""
    for distance, kept in _TRANSPOSED.items():
        yield from (
            f"shfl.sync.bfly.b32 t, x, {distance}, 31, {_ALL};",
            f"and.b32 u, lane, {distance};",
            "setp.eq.u32 p, u, 0;",
            f"@p shl.b32 t, t, {distance};",
            f"@!p shr.b32 t, t, {distance};",
            f"selp.b32 u, {_hex(kept)}, {_hex(~kept)}, p;",
            # x where u has a bit, t elsewhere.
            "lop3.b32 x, x, t, u, 0xe4;",
        )


def _bring(sizes: Sizes, masks: int) -> Iterator[str]:
    """Adds the warps' counts up, and copies the token to its row of each expert that it takes."""
    tile = sizes.tile
    yield "mad.lo.u32 at, lane, 4, <parts>;"
    yield "mov.b32 carry, 0;"
    for mask in range(masks):
        yield "mov.b32 count, 0;"
        for warp in range(_WARPGROUP // _WARP):
            yield f"ld.shared.b32 t, [at+{4 * (_WARPGROUP * mask + _WARP * warp)}];"
            yield "add.u32 count, count, t;"
        yield from (
            "and.b32 total, count, 0xffff;",
            "shr.b32 before, count, 16;",
            f"add.u32 tiles, total, {tile - 1};",
            f"div.u32 tiles, tiles, {tile};",
            "mov.b32 end, tiles;",
        )
        for distance in (1, 2, 4, 8, 16):
            yield f"shfl.sync.up.b32 t|p, end, {distance}, 0, {_ALL};"
            yield "@p add.u32 end, end, t;"
        yield from (
            "sub.u32 begin, end, tiles;",
            "add.u32 begin, begin, carry;",
            f"shfl.sync.idx.b32 t, end, 31, 31, {_ALL};",
            "add.u32 carry, carry, t;",
            f"mad.lo.u32 row{mask}, begin, {tile}, before;",
            f"shr.b32 t, mask{mask}, lane;",
            "and.b32 t, t, 1;",
            "setp.ne.u32 p, t, 0;",
            f"mad.wide.u32 to, row{mask}, {sizes.width}, <values>;",
            f"@p cp.async.bulk.global.shared::cta.bulk_group [to], [<row>], {sizes.width};",
            f"mad.wide.u32 to, row{mask}, 4, <scale>;",
            "@p st.global.f32 [to], x_scale;",
            f"mad.wide.u32 to, row{mask}, 4, <tokens>;",
            "@p st.global.b32 [to], token;",
            # The first token of a tile names the tile's expert.
            f"rem.u32 t, before, {tile};",
            "setp.eq.and.u32 p, t, 0, p;",
            f"div.u32 t, row{mask}, {tile};",
            "mad.wide.u32 to, t, 4, <tile_experts>;",
            f"add.u32 t, lane, {_WARP * mask};",
            "@p st.global.b32 [to], t;",
        )
    yield "cp.async.bulk.commit_group;"
    # Choice n's expert is known to lane n, the expert's row to another lane.
    yield f"mov.b32 row, {sizes.tiles * tile};"
    yield "and.b32 index, local, 31;"
    yield "shr.b32 u, local, 5;"
    for mask in range(masks):
        yield f"shfl.sync.idx.b32 t, row{mask}, index, 31, {_ALL};"
        yield f"setp.eq.and.u32 p, u, {mask}, is_local;"
        yield "@p mov.b32 row, t;"
    yield from (
        "mad.wide.u32 to, lane, 4, <rows>;",
        "@is_padded st.global.b32 [to], row;",
        # All have told this call's number, so all have read the last one's.
        "setp.eq.and.u32 p, token, 0, is_leader;",
        "@p st.global.b32 [<num_tiles>], carry;",
        "@p st.relaxed.gpu.global.b32 [<words>], number;",
        "cp.async.bulk.wait_group.read 0;",
    )


def _float(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()


def _hex(bits: int) -> str:
    return f"0x{bits & 0xFFFFFFFF:08x}"
