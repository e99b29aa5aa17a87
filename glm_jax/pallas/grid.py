"""Counters in device memory, by which the CTAs of a kernel wait for each other.

Knows no kernel. What a counter counts is over when its kernel ends, so the next kernel and the next
layer find it ready: counters are made once, outside of every loop, and nothing ever clears them. The
interpreter has none: where kernels are interpreted, what a barrier would part is several kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

# How often all have met, beside how many have arrived.
WORDS = 2

# Generic writes of this CTA come before the copies by TMA of those that wait for it, and theirs after.
_PUBLISH = "fence.proxy.async; bar.sync 0;"
_ARRIVE = "fence.acq_rel.gpu; atom.acq_rel.gpu.global.inc.u32 arrived, [$0], {last};"
_WAIT = """{{
.reg .pred is_last, is_early;
.reg .b32 arrived, before, now;
ld.relaxed.gpu.global.u32 before, [$0+4];
{arrive}
setp.eq.u32 is_last, arrived, {last};
@is_last red.release.gpu.global.add.u32 [$0+4], 1;
@is_last bra met;
again:
ld.acquire.gpu.global.u32 now, [$0+4];
setp.eq.u32 is_early, now, before;
@is_early bra again;
met:
fence.acq_rel.gpu;
}}"""


def make_counter() -> jax.Ref:
    """A counter for one kernel, int32[2], for all its calls while it is in scope."""
    return jax.new_ref(jnp.zeros(WORDS, jnp.int32))


def wait_for_all(counter: Any, num_ctas: int) -> None:
    """Holds every thread of a CTA until all num_ctas CTAs of the kernel are here.

    What any of them wrote before, all of them read after, by loads and by TMA. They must all be running
    at once: no more of them than the device has multiprocessors.

    Args:
      counter: what make_counter makes, in the kernel.
    """
    if num_ctas == 1:
        return

    def wait(_: Any, ref: Any) -> None:
        utils.inline_ptx(_PUBLISH, has_side_effects=True, convergent=True)
        with utils.single_thread(utils.ThreadSubset.BLOCK):
            arrive = _ARRIVE.format(last=num_ctas - 1)
            code = _WAIT.format(arrive=arrive, last=num_ctas - 1)
            utils.inline_ptx(code, utils.memref_ptr(ref), has_side_effects=True)
        utils.inline_ptx("bar.sync 0; fence.proxy.async;", has_side_effects=True, convergent=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    inline(wait)(counter)
