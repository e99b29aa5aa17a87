"""A count in device memory, by which some CTAs of a kernel tell others what they have done.

Knows no kernel. Nobody who counts waits, so nothing depends on which CTAs run at once. The counter is
made once, outside of every loop; a kernel that is over before counting begins sets it to zero. The
interpreter has none: where kernels are interpreted, what is counted is a kernel of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

# Generic writes come before the copies by TMA of those that wait.
_PUBLISH = "fence.proxy.async;"
_ADD = "fence.acq_rel.gpu; red.release.gpu.global.add.u32 [$0], 1;"
_WAIT = """{
.reg .pred is_early;
.reg .b32 now;
again:
ld.acquire.gpu.global.u32 now, [$0];
setp.lt.s32 is_early, now, $1;
@is_early bra again;
fence.proxy.async;
}"""


def make_counter() -> jax.Ref:
    """A counter for one kernel, int32[1], for all its calls while it is in scope."""
    return jax.new_ref(jnp.zeros(1, jnp.int32))


def reset(counter: Any) -> None:
    """Sets the counter to zero, for the next kernel: by a warpgroup."""

    def store(_: Any, ref: Any) -> None:
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            utils.inline_ptx("st.global.u32 [$0], 0;", utils.memref_ptr(ref), has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    inline(store)(counter)


def add_one(counter: Any) -> None:
    """Counts one, by a warpgroup: whoever waits for it finds all that these threads wrote before."""

    def add(_: Any, ref: Any) -> None:
        utils.inline_ptx(_PUBLISH, has_side_effects=True)
        utils.warpgroup_barrier()
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            utils.inline_ptx(_ADD, utils.memref_ptr(ref), has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    inline(add)(counter)


def wait_for(counter: Any, count: jax.Array) -> None:
    """Holds a warp until there are so many; then it may copy by TMA what was counted."""

    def wait(_: Any, ref: Any, count: Any) -> None:
        operands = utils.memref_ptr(ref), count.registers.item()
        utils.inline_ptx(_WAIT, *operands, has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    inline(wait)(counter, count)
