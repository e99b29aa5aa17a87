"""Tiles that CTAs come for one by one: memory does not serve all SMs alike, and some do a third more.

Knows no product. A CTA's first tile is its own number's; each further one is what a counter in device
memory says, which starts anew when every tile has been asked for once. Who feeds asks, and passes the
tile on to those who read through shared memory. The interpreter has no counter: there, tiles go round.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

# Of a place's tile: its number, how many tiles this CTA had before, and how many steps.
Visit = Callable[[jax.Array, Any, jax.Array], None]
_Carry = tuple[jax.Array, jax.Array, jax.Array]

_FIRST = "mov.u32 thread, %tid.x; and.b32 thread, thread, 127; setp.eq.u32 is_first, thread, 0;"
_ASK = (
    "{ .reg .pred is_first; .reg .b32 thread, got; "
    f"{_FIRST} mov.u32 got, 0; "
    "@is_first atom.relaxed.gpu.global.inc.u32 got, [$1], $2; mov.u32 $0, got; }"
)
_TELL = f"{{ .reg .pred is_first; .reg .b32 thread; {_FIRST} @is_first st.shared.u32 [$0], $1; }}"
_HEAR = "ld.shared.u32 $0, [$1];"


def scratch_types(slots: int) -> dict[str, Any]:
    """The shared memory and barriers of feed_tiles and read_tiles, for so many tiles under way."""
    return {
        "dealt": plgpu.SMEM((slots,), jnp.int32),
        "dealt_full": plgpu.Barrier(num_arrivals=1, num_barriers=slots),
        "told": plgpu.SMEM((1,), jnp.int32),
    }


def feed_tiles(streams: Any, num_ctas: int, scratch: Any, feed: Visit) -> None:
    """Calls feed(number, place, steps before) for each tile, and asks for the next one meanwhile.

    A warpgroup's work, which must meet (at a copy, say) in each call of feed.

    Args:
      streams: fp8_product.Streams.
    """
    num_tiles, counter = jnp.int32(streams.num_tiles), streams.counter

    def step(carry: _Carry) -> _Carry:
        tile, number, first_step = carry
        asked = None if counter is None else _ask(counter, num_tiles)
        place = streams.locate(tile, streams.look_up(tile))
        _tell_readers(scratch, number, tile)
        feed(number, place, first_step)
        following = tile if asked is None else _tell(asked, scratch["told"])
        return following + num_ctas, number + 1, first_step + streams.num_steps(place)

    zero = jnp.int32(0)
    start = jnp.int32(lax.axis_index("cta")), zero, zero
    tile, number, _ = lax.while_loop(lambda carry: carry[0] < num_tiles, step, start)
    _tell_readers(scratch, number, tile)


def read_tiles(streams: Any, scratch: Any, visit: Visit) -> None:
    """The same for those who read what is fed; they free a slot where they arrive at scales_empty."""
    num_tiles = jnp.int32(streams.num_tiles)

    def hear(number: jax.Array) -> jax.Array:
        slot = _slot(scratch, number)
        plgpu.barrier_wait(scratch["dealt_full"].at[slot])
        return scratch["dealt"][slot]

    def step(carry: _Carry) -> _Carry:
        tile, number, first_step = carry
        place = streams.locate(tile, jnp.int32(0))
        visit(number, place, first_step)
        return hear(number + 1), number + 1, first_step + streams.num_steps(place)

    zero = jnp.int32(0)
    lax.while_loop(lambda carry: carry[0] < num_tiles, step, (hear(zero), zero, zero))


def _slot(scratch: Any, number: jax.Array) -> jax.Array:
    return lax.rem(number, jnp.int32(scratch["dealt"].shape[0]))


def _tell_readers(scratch: Any, number: jax.Array, tile: jax.Array) -> None:
    """Lets those who read know which tile their next one is, or that there is none."""
    slot = _slot(scratch, number)

    @pl.when(number >= scratch["dealt"].shape[0])
    def _():
        plgpu.barrier_wait(scratch["scales_empty"].at[slot])

    scratch["dealt"][slot] = tile
    plgpu.barrier_arrive(scratch["dealt_full"].at[slot])


def _ask(counter: Any, num_tiles: jax.Array) -> jax.Array:
    """Asks for a number below num_tiles: what it is, only the warpgroup's first thread knows."""

    def ask(_: Any, ref: Any, last: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        limit = last.registers.item()
        pointer = utils.memref_ptr(ref)
        got = utils.inline_ptx(_ASK, pointer, limit, result_types=i32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(got, (), is_signed=True)

    return _inline(ask)(counter, num_tiles - 1)


def _tell(asked: jax.Array, told: Any) -> jax.Array:
    """What the first thread was answered, for all: between two calls, all must have met."""

    def tell(_: Any, ref: Any, answer: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        pointer = utils.memref_ptr(ref)
        utils.inline_ptx(_TELL, pointer, answer.registers.item(), has_side_effects=True)
        utils.warpgroup_barrier()
        heard = utils.inline_ptx(_HEAR, pointer, result_types=i32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(heard, (), is_signed=True)

    return _inline(tell)(told, asked)


def _inline(function: Any) -> Any:
    types = plgpu.RefType(), plgpu.Layout.WG_SPLAT
    result = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT)
    inline: Any = plgpu.inline_mgpu(arg_types=types, return_type=result)
    return inline(function)
