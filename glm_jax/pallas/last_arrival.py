"""Who comes last of some CTAs that make one thing together, and so has all of it to read.

Knows no kernel. No CTA waits for another: the last one to say that its part is written goes on with all
parts, the others end. What counts them starts from zero again by itself, so counters are made once,
outside of every loop, and each call finds them ready. The interpreter has none: there, what follows the
last arrival is a kernel of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# Words in shared memory: how many come before the last one, and which counter counts them; then only
# whether this was the last one.
WORDS = 2

# One that is alone has nobody to tell.
_ARRIVE = """{
.reg .pred is_alone, is_last;
.reg .b32 last, place, arrived, told;
.reg .b64 counter;
ld.shared.u32 last, [$1];
ld.shared.u32 place, [$1+4];
mov.u32 arrived, last;
setp.eq.u32 is_alone, last, 0;
@is_alone bra done;
mad.wide.u32 counter, place, 4, $0;
atom.acq_rel.gpu.global.inc.u32 arrived, [counter], last;
done:
setp.eq.u32 is_last, arrived, last;
selp.u32 told, 1, 0, is_last;
st.shared.u32 [$1], told;
}"""


def make_counters(*shape: int) -> jax.Ref:
    """Counters for one kernel, int32[shape], for all its calls while they are in scope."""
    return jax.new_ref(jnp.zeros(shape, jnp.int32))


def prepare(words: Any, place: jax.Array, num_ctas: jax.Array) -> None:
    """Says who counts, before anything else that a CTA does, which so need not keep it in registers.

    Args:
      words: int32[WORDS], or more, in shared memory.
      place: of the counter, as if they were one row; num_ctas is the same for all that share it.
    """
    words[0] = num_ctas - 1
    words[1] = place


def is_last(counters: Any, words: Any) -> jax.Array:
    """Whether the other CTAs that share a counter have all been here.

    What their threads stored before they were, the threads of the last one read after.

    Args:
      counters: what make_counters makes, in the kernel; at rest they are 0.
      words: as `prepare` left them.
    """

    def arrive(_: Any, counters: Any, words: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        # Whoever speaks for the CTA does it after all of its threads have stored.
        utils.warpgroup_barrier()
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            address = llvm.ptrtoint(i32, utils.memref_ptr(words))
            utils.inline_ptx(_ARRIVE, utils.memref_ptr(counters), address, has_side_effects=True)
        utils.warpgroup_barrier()

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    inline(arrive)(counters, words)
    return words[0] == 1
