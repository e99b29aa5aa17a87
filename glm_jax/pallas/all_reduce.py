"""The sum over devices fused with what follows it: residual add, RMSNorm, quantization.

Knows no layer. Each device gets its peers' rows over NVLink and sums them itself: one exchange instead
of two, right while rows are few. No multicast takes part. What experts made is first added up here, row
by row, before the peers may have it.

With an inbox, each device writes its rows into its peers' memory; see there. Without one, it copies
theirs from where they lie. There a row is one CTA's, the same on every device, and has two counters there, which start and end at zero:

  ready: the peer's CTA has begun, and has added up its row if there was something to add;
  done: every peer has copied this device's row. Only then may this kernel end, since XLA may give
    the rows' memory to whatever comes next.

A CTA waits only for the CTAs of the same row, and all rows' CTAs fit the device at once, so the wait
ends. That counters are zero on all devices before any of them counts is XLA's doing: it holds a
barrier between the devices before a kernel that reaches into peers is launched. Since counters end as
they start, calls can share them, and XLA need not clear them for each.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from glm_jax.pallas import ahead
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.inbox import Inbox, receive, send
from glm_jax.pallas.norm import (
    NormedRows,
    check_width,
    load_row,
    normed_types,
    row_layout,
    store_normed,
)

# From here on an exchange in two steps, of sums instead of summands, has less to carry: beyond
# 256 rows of 5120 the one step moves 18 MB into each of eight devices.
MAX_ROWS = 256
_WARPS = 4
_LEAST_ASKING = 64
_SHARED_MEMORY = 220 * 1024


class Summands(NamedTuple):
    """What a device's experts made of each token: their rows, and the shared expert's.

    Attributes:
      rows: in any order; only those that places name are read.
      shared: a row for each token, first of all.
      places: the row of each choice of each token; R where another device has it.
      weights: what each choice's row is multiplied with.
    """

    rows: BFloat16[Array, "R D"]
    shared: BFloat16[Array, "shared_rows D"]
    places: Int32[Array, "T k"]
    weights: Float32[Array, "T k"]


def make_semaphores(num_rows: int) -> jax.Ref | None:
    """Counters for every call on up to so many rows; None where each call must have its own."""
    # jax before 0.12 has no counters that outlive a kernel.
    if not hasattr(plgpu, "alloc_semaphore"):
        return None
    zeros = jax.freeze(plgpu.alloc_semaphore((2, num_rows)))
    # What XLA knows to be zeros it would make anew in every layer.
    return jax.new_ref(lax.optimization_barrier(zeros), memory_space=plgpu.GMEM)


def all_reduce_add_norm(
    partial: BFloat16[Array, "T D"] | Summands,
    residual: BFloat16[Array, "T D"],
    weight: BFloat16[Array, "L D"],
    layer: Int32[Array, ""],
    *,
    eps: float,
    axis_name: str = "tensor",
    num_devices: int,
    chip: Chip,
    shift: int = 0,
    semaphores: jax.Ref | None = None,
    inbox: Inbox | None = None,
    tells_place: bool = False,
    later: Sequence[ahead.Later] = (),
    interpret: bool = False,
) -> NormedRows:
    """residual + the sum of all devices' partial, its RMSNorm, and the quantized form of that.

    For use inside shard_map over a mesh whose only axis is axis_name. Partials are added in float32,
    device 0 first, rounded once to bfloat16 and then added to the residual; every device gets the
    same bits, whatever T is. The partial of Summands is each token's rows, weighed and added in the
    order of its choices, and its shared row last, in float32, rounded to bfloat16. In interpret mode
    XLA gathers the rows, since the interpreter has neither peers nor counters; what is made of them is
    the kernel's own.

    Args:
      layer, shift: their sum is the norm's place among the weights.
      semaphores: as make_semaphores makes them, for at least T rows.
      inbox: as make_inbox makes it, for at least T rows of D; semaphores have no use then.
      tells_place: whether the answer has that sum too, as the kernels of the layer that begins there
        take it: an addition by XLA would be one more launch.
      later: asked for on the way; its shifts are from the norm's place.

    Raises:
      NotImplementedError: T is over 256 or over what the device holds at once, or D no multiple of
        128.
    """
    num_rows, width = residual.shape
    check_width(width)
    # Every row's CTA must be running, with a row of each device in its shared memory.
    limit = min(MAX_ROWS, _SHARED_MEMORY // (2 * num_devices * width + 4096) * chip.num_cores)
    if num_rows > limit:
        raise NotImplementedError(f"{residual.shape=}: one exchange is for up to {limit} rows")
    is_exchanged = num_devices > 1 and not interpret
    is_gathered = num_devices > 1 and interpret
    is_sent = is_exchanged and inbox is not None
    is_copied = is_exchanged and inbox is None
    if is_gathered:
        if isinstance(partial, Summands):
            partial = add_up(partial, interpret=interpret)
        partial = lax.all_gather(partial, axis_name)
    has_summands = isinstance(partial, Summands)
    operands = [*partial] if isinstance(partial, Summands) else [partial]
    outputs = [jax.ShapeDtypeStruct(residual.shape, residual.dtype), *normed_types(num_rows, width)]
    if has_summands and is_copied:
        outputs.append(jax.ShapeDtypeStruct(residual.shape, residual.dtype))
    if tells_place:
        outputs.append(jax.ShapeDtypeStruct((1,), jnp.int32))
    shared = [*inbox] if inbox is not None and is_sent else []
    if is_copied and semaphores is not None:
        shared = [semaphores]
    asked = [each.weights for each in later]
    # Few rows' CTAs alone could not ask for much.
    num_ctas = max(num_rows, _LEAST_ASKING) if later else num_rows

    def all_reduce_add_norm_kernel(*refs: Any, **scratch: Any) -> None:
        own, others = refs[: len(operands)], refs[len(operands) :]
        asked_refs, others = others[: len(asked)], others[len(asked) :]
        residual_ref, weight_ref, layer_ref, *rest = others
        shared_refs, outs = rest[: len(shared)], rest[len(shared) :]
        place_refs = [outs.pop()] if tells_place else []
        (total_ref, normed_ref, values_ref, scale_ref), mine_ref = outs[:4], outs[4:]
        row, place = lax.axis_index("row"), layer_ref[0] + shift

        def ask() -> None:
            if later:
                ahead.ask(asked_refs, later, place, row, num_ctas, scratch["sink"])

        def reduce_row() -> None:
            summed = load_summed(own, row) if has_summands else None
            before, weight_row = load_row(residual_ref, row), load_row(weight_ref, place)
            if is_sent:
                mine = load_row(own[0], row) if summed is None else summed
                mail_at = len(operands) + len(asked) + 3
                addends = _exchange(mine, shared_refs, mail_at, row, axis_name, num_devices, ask)
            elif is_copied:
                if shared:
                    names = enumerate(("ready", "done"))
                    scratch.update({name: shared_refs[0].at[at, row] for at, name in names})
                copied = own[0]
                if summed is not None:
                    copied = mine_ref[0]
                    scratch["mine"][...] = summed
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(scratch["mine"], copied.at[row])
                    plgpu.wait_smem_to_gmem(0)
                _copy_from_peers(copied, row, scratch, axis_name, num_devices)
                ask()
                addends = [load_row(scratch["addends"], device) for device in range(num_devices)]
            elif is_gathered:
                addends = [load_row(own[0].at[device], row) for device in range(num_devices)]
            else:
                addends = [load_row(own[0], row) if summed is None else summed]
                ask()
            total = before + _sum(addends)
            total_ref[row] = total
            store_normed(total, weight_row, eps, row, normed_ref, values_ref, scale_ref)
            if is_copied:
                pl.semaphore_wait(scratch["done"], num_devices - 1)

        if num_ctas == num_rows:
            reduce_row()
        else:
            pl.when(row < num_rows)(reduce_row)
            pl.when(row >= num_rows)(ask)
        for place_ref in place_refs:

            @pl.when(row == 0)
            def _tell(place_ref: Any = place_ref) -> None:
                place_ref[0] = place

    scratch = {"sink": ahead.sink()} if later else {}
    if is_copied:
        scratch["addends"] = plgpu.SMEM((num_devices, width), residual.dtype)
        scratch["arrived"] = plgpu.Barrier(num_arrivals=num_devices)
        if has_summands:
            scratch["mine"] = plgpu.SMEM((width,), residual.dtype)
        if not shared:
            scratch["ready"] = scratch["done"] = plgpu.SemaphoreType.REGULAR
    found = plgpu.kernel(
        all_reduce_add_norm_kernel,
        out_type=outputs,
        scratch_types=scratch,
        grid=(num_ctas,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(skip_device_barrier=is_sent),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="all_reduce_add_norm",
    )(*operands, *asked, residual, weight, layer.reshape(1), *shared)
    normed = NormedRows(*found[:4])
    return normed._replace(place=found[-1].reshape(())) if tells_place else normed


def _exchange(
    own: BFloat16[Array, " D"],
    mail: Sequence[Any],
    operand: int,
    row: Array,
    axis_name: str,
    num_devices: int,
    meanwhile: Callable[[], None],
) -> list[Array]:
    """A row of every device, device 0's first."""
    rows_ref, turns_ref = mail
    mine, slot = lax.axis_index(axis_name), turns_ref[row]
    # Of two addends the order does not matter; of more, this device's own takes its place among them.
    is_pair = num_devices == 2
    distances = range(1, num_devices + (not is_pair))
    slot_ref = rows_ref.at[slot, mine, row]
    send(own, slot_ref, operand=operand, distances=distances, num_devices=num_devices)
    meanwhile()
    senders = [1 - mine] if is_pair else [jnp.int32(sender) for sender in range(num_devices)]
    received = receive(mail, slot, senders, row)
    return [own, *received] if is_pair else received


def _sum(addends: Sequence[Array]) -> BFloat16[Array, " D"]:
    summed = addends[0].astype(jnp.float32)
    for addend in addends[1:]:
        summed = summed + addend.astype(jnp.float32)
    return summed.astype(jnp.bfloat16)


def load_summed(refs: Sequence[Any], row: Array) -> BFloat16[Array, " D"]:
    """A token's partial, from the refs of Summands, in registers like a row that load_row reads."""
    rows_ref, shared_ref, places_ref, weights_ref = refs
    num_rows = rows_ref.shape[0]
    shared = load_row(shared_ref, row).astype(jnp.float32)
    total = plgpu.layout_cast(jnp.zeros(shared.shape, jnp.float32), row_layout(shared.shape[0]))
    choices = range(places_ref.shape[1])
    # All of them ahead of the rows: one latency instead of one a choice.
    places = [places_ref[row, choice] for choice in choices]
    weights = [weights_ref[row, choice] for choice in choices]
    for place, weight in zip(places, weights, strict=True):

        def add(total: Array, place: Array = place, weight: Array = weight) -> Array:
            return total + load_row(rows_ref, place).astype(jnp.float32) * weight

        total = lax.cond(place < num_rows, add, lambda total: total, total)
    return (total + shared).astype(jnp.bfloat16)


def add_up(summands: Summands, *, interpret: bool = False) -> BFloat16[Array, "T D"]:
    """The partial of Summands by a kernel of its own, of as many tokens as there are.

    XLA's form would have other bits: it makes one rounding of a product and a sum.
    """

    def body(*refs: Any) -> None:
        row = lax.axis_index("row")
        refs[-1][row] = load_summed(refs[:-1], row)

    num_tokens, width = summands.places.shape[0], summands.rows.shape[1]
    check_width(width)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_tokens, width), jnp.bfloat16),
        grid=(num_tokens,),
        grid_names=("row",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="add_up",
    )(*summands)


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
