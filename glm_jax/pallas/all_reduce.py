"""The sum over devices fused with what follows it: residual add, RMSNorm, quantization.

Knows no layer. Each device copies its peers' rows from where they lie, over NVLink, and sums them
itself: one exchange instead of two, right while rows are few. No multicast takes part.

A row is one CTA's, the same on every device, and has two counters there, which start and end at zero:

  ready: every peer's kernel has begun, so the kernel before it has written the peer's rows;
  done: every peer has copied this device's row. Only then may this kernel end, since XLA may give
    the rows' memory to whatever comes next.

A CTA waits only for the CTAs of the same row, and all rows' CTAs fit the device at once, so the wait
ends. That counters are zero on all devices before any of them counts is XLA's doing: it passes them
zeroed and holds a barrier between the devices before a kernel that reaches into peers is launched.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int32

from glm_jax.pallas.chip import Chip
from glm_jax.pallas.norm import NormedRows, check_width, load_row, normed_types, store_normed

# From here on an exchange in two steps, of sums instead of summands, has less to carry: beyond
# 256 rows of 5120 the one step moves 18 MB into each of eight devices.
MAX_ROWS = 256
_WARPS = 4
_SHARED_MEMORY = 220 * 1024


def all_reduce_add_norm(
    partial: BFloat16[Array, "T D"],
    residual: BFloat16[Array, "T D"],
    weight: BFloat16[Array, "L D"],
    layer: Int32[Array, ""],
    *,
    eps: float,
    axis_name: str = "tensor",
    num_devices: int,
    chip: Chip,
    interpret: bool = False,
) -> NormedRows:
    """residual + the sum of all devices' partial, its RMSNorm, and the quantized form of that.

    For use inside shard_map over a mesh whose only axis is axis_name. Partials are added in float32,
    device 0 first, rounded once to bfloat16 and then added to the residual; every device gets the
    same bits, whatever T is. In interpret mode XLA gathers the rows, since the interpreter has
    neither peers nor counters; what is made of them is the kernel's own.

    Raises:
      NotImplementedError: T is over 256 or over what the device holds at once, or D no multiple of
        128.
    """
    num_rows, width = partial.shape
    check_width(width)
    # Every row's CTA must be running, with a row of each device in its shared memory.
    limit = min(MAX_ROWS, _SHARED_MEMORY // (2 * num_devices * width + 4096) * chip.num_cores)
    if num_rows > limit:
        raise NotImplementedError(f"{partial.shape=}: one exchange is for up to {limit} rows")
    is_exchanged = num_devices > 1 and not interpret
    is_gathered = num_devices > 1 and interpret
    if is_gathered:
        partial = lax.all_gather(partial, axis_name)

    def all_reduce_add_norm_kernel(*refs: Any, **scratch: Any) -> None:
        partial_ref, residual_ref, weight_ref, layer_ref, *outputs = refs
        row = lax.axis_index("row")
        if is_exchanged:
            _copy_from_peers(partial_ref, row, scratch, axis_name, num_devices)
            addends = [load_row(scratch["addends"], device) for device in range(num_devices)]
        elif is_gathered:
            addends = [load_row(partial_ref.at[device], row) for device in range(num_devices)]
        else:
            addends = [load_row(partial_ref, row)]
        summed = addends[0].astype(jnp.float32)
        for addend in addends[1:]:
            summed = summed + addend.astype(jnp.float32)
        total = load_row(residual_ref, row) + summed.astype(jnp.bfloat16)
        total_ref, normed_ref, values_ref, scale_ref = outputs
        total_ref[row] = total
        store_normed(
            total, load_row(weight_ref, layer_ref[0]), eps, row, normed_ref, values_ref, scale_ref
        )
        if is_exchanged:
            pl.semaphore_wait(scratch["done"], num_devices - 1)

    scratch = {}
    if is_exchanged:
        scratch["addends"] = plgpu.SMEM((num_devices, width), partial.dtype)
        scratch["arrived"] = plgpu.Barrier(num_arrivals=num_devices)
        scratch["ready"] = scratch["done"] = plgpu.SemaphoreType.REGULAR
    outputs = plgpu.kernel(
        all_reduce_add_norm_kernel,
        out_type=[
            jax.ShapeDtypeStruct(residual.shape, residual.dtype),
            *normed_types(num_rows, width),
        ],
        scratch_types=scratch,
        grid=(num_rows,),
        grid_names=("row",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="all_reduce_add_norm",
    )(partial, residual, weight, layer.reshape(1))
    return NormedRows(*outputs)


def _copy_from_peers(
    ref: Any, row: Array, scratch: dict[str, Any], axis_name: str, num_devices: int
) -> None:
    """Copies a row of every device, once it is there, and tells its device when it was copied."""
    _tell_peers(scratch["ready"], axis_name, num_devices)
    pl.semaphore_wait(scratch["ready"], num_devices - 1)
    for device in range(num_devices):
        plgpu.copy_gmem_to_smem(
            plgpu.remote_ref(ref.at[row], jnp.int32(device)),
            scratch["addends"].at[device],
            scratch["arrived"],
            # What is known to lie within is copied in bulk, without a descriptor for every peer.
            oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )
    plgpu.barrier_wait(scratch["arrived"])
    _tell_peers(scratch["done"], axis_name, num_devices)


def _tell_peers(counter: Any, axis_name: str, num_devices: int) -> None:
    """Adds one to each peer's counter of this row, after everything this CTA did before."""
    mine = lax.axis_index(axis_name)

    # A count is a write and a fence that waits for it, so the warps share the peers.
    @plgpu.warp_map
    def _(warp: Array) -> None:
        for first in range(1, num_devices, _WARPS):
            distance = warp + first
            peer = lax.rem(mine + distance, jnp.int32(num_devices))

            @pl.when(distance < num_devices)
            def _():
                pl.semaphore_signal(counter, device_id=peer)
