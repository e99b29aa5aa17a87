"""The sum over devices fused with what follows it: residual add, RMSNorm, quantization.

Knows no layer. Devices write their rows into each other's memory over NVLink, and each sums them itself:
one exchange instead of two, right while rows are few. No multicast takes part. What experts made is
first added up here, row by row, before the peers get it. A row is one CTA's, the same on every device;
how it waits for its peers, and why that ends, inbox says.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from glm_jax.pallas import launch_order
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.inbox import Inbox, receive, send, this_device
from glm_jax.pallas.norm import (
    NormedRows,
    check_width,
    load_row,
    normed_types,
    row_layout,
    store_normed,
)
from glm_jax.pallas.row_words import UNIT, load_rows

# Of more rows the sum is XLA's: not all CTAs would run at once on 132 multiprocessors.
MAX_ROWS = 256
# Experts' rows that a thread loads before it adds them up.
_TOGETHER = 4
# Of 5120 numbers, what NVLink moves while a row is on its way: 1.2 us at 310 GB/s, on two H200s.
_ROWS_IN_A_WAY = 36
# CTAs of 128 threads and up to 255 registers that a multiprocessor runs at once.
_CTAS_A_CORE = 2
# A thread needs nothing that others have stored but in a row's reductions, and where a row is received:
# both have barriers of their own.
_NO_BARRIERS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


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
    inbox: Inbox | None = None,
    tells: int | None = None,
    interpret: bool = False,
) -> NormedRows:
    """residual + the sum of all devices' partial, its RMSNorm, and the quantized form of that.

    For use inside shard_map over a mesh whose only axis is axis_name. Partials are added in float32,
    device 0 first, rounded once to bfloat16 and then added to the residual; every device gets the
    same bits, whatever T is. The partial of Summands is each token's rows, weighed and added in the
    order of its choices, and its shared row last, in float32, rounded to bfloat16. In interpret mode
    XLA gathers the rows, since the interpreter has no peers; what is made of them is
    the kernel's own.

    Args:
      layer, shift: their sum is the norm's place among the weights.
      inbox: as make_inbox makes it, for at least T rows of D; needed where there are peers.
      residual: not of the kernel right ahead, nor are weight, layer, and a Summands' places and weights:
        they are read before that one has ended.
      tells: what layer and this make is told too, as a later layer's kernels take it: an addition by
        XLA would be one more launch.

    Raises:
      NotImplementedError: T is over 256 or over what the device runs at once, D no multiple of 128, or
        there are peers and no inbox.
    """
    num_rows, width = residual.shape
    check_width(width)
    is_exchanged = num_devices > 1 and not interpret
    # Every row's CTA must be running where it waits for peers.
    limit = min(MAX_ROWS, _CTAS_A_CORE * chip.num_cores) if is_exchanged else MAX_ROWS
    if num_rows > limit:
        raise NotImplementedError(f"{residual.shape=}: one exchange is for up to {limit} rows")
    is_gathered = num_devices > 1 and interpret
    if is_exchanged and inbox is None:
        raise NotImplementedError("devices that have no inbox cannot be sent rows")
    mail = [*inbox] if inbox is not None and is_exchanged else []
    if is_gathered:
        if isinstance(partial, Summands):
            partial = add_up(partial, interpret=interpret)
        partial = lax.all_gather(partial, axis_name)
    has_summands = isinstance(partial, Summands)
    operands = [*partial] if isinstance(partial, Summands) else [partial]
    outputs = [jax.ShapeDtypeStruct(residual.shape, residual.dtype), *normed_types(num_rows, width)]
    if tells is not None:
        outputs.append(jax.ShapeDtypeStruct((1,), jnp.int32))

    def all_reduce_add_norm_kernel(*refs: Any) -> None:
        own, others = refs[: len(operands)], refs[len(operands) :]
        residual_ref, weight_ref, layer_ref, *rest = others
        mail_refs, outs = rest[: len(mail)], rest[len(mail) :]
        total_ref, normed_ref, values_ref, scale_ref, *place_refs = outs
        row, layer_index = lax.axis_index("row"), layer_ref[0]

        before = load_row(residual_ref, row)
        weight_row = load_row(weight_ref, layer_index + shift)
        choices = load_choices(own, row) if has_summands else None
        launch_order.wait(interpret=interpret)
        summed = load_summed(own, row, choices, interpret=interpret) if choices else None
        if is_exchanged:
            mine = load_row(own[0], row) if summed is None else summed
            addends = _exchange(mine, mail_refs, row, num_rows, num_devices)
        elif is_gathered:
            addends = [load_row(own[0].at[device], row) for device in range(num_devices)]
        else:
            addends = [load_row(own[0], row) if summed is None else summed]
        total = before + _sum(addends)
        total_ref[row] = total
        made_refs = normed_ref, values_ref, scale_ref
        store_normed(total, weight_row, eps, row, *made_refs, interpret=interpret)
        for place_ref in place_refs:

            @pl.when(row == 0)
            def _tell(place_ref: Any = place_ref) -> None:
                place_ref[0] = layer_index + (tells or 0)

    found = launch_order.kernel(
        all_reduce_add_norm_kernel,
        out_type=outputs,
        grid=(num_rows,),
        grid_names=("row",),
        compiler_params=_NO_BARRIERS,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        waits=False,
        kernel_name="all_reduce_add_norm",
    )(*operands, residual, weight, layer.reshape(1), *mail)
    normed = NormedRows(*found[:4])
    return normed if tells is None else normed._replace(place=found[-1].reshape(()))


def _exchange(
    own: BFloat16[Array, " D"],
    inbox: Sequence[Any],
    row: Array,
    num_rows: int,
    num_devices: int,
) -> list[Array]:
    """A row of every device, device 0's first, or their sum."""
    mine, slot = this_device(inbox), inbox[1][row]
    write = partial(send, inbox=inbox, slot=slot, index=row)
    read = partial(receive, inbox, slot, index=row)
    everyone = [jnp.int32(device) for device in range(num_devices)]
    if takes_two_steps(num_rows, num_devices):
        owner = lax.rem(row, jnp.int32(num_devices))

        def add_and_tell() -> Array:
            total = _sum(read(senders=everyone))
            write(total, distances=range(1, num_devices))
            return total

        def be_told() -> Array:
            return read(senders=[owner])[0]

        write(own, distances=[lax.rem(owner - mine + num_devices, jnp.int32(num_devices))])
        return [lax.cond(owner == mine, add_and_tell, be_told)]
    if num_devices == 2:
        # Of two addends the order does not matter.
        write(own, distances=[1])
        return [own, *read(senders=[1 - mine])]
    # Its own takes its place among them.
    write(own, distances=range(num_devices))
    return read(senders=everyone)


def takes_two_steps(num_rows: int, num_devices: int) -> bool:
    """Whether a row goes to one device, which adds it up and sends the sum to all, or to all at once.

    The second takes one way over NVLink; the first two, but moves only 2 / devices of the bytes into and
    out of each device: it pays where a way lasts less than moving the rest.
    """
    saved_rows = num_rows * (num_devices - 1) * (num_devices - 2) / num_devices
    return saved_rows > _ROWS_IN_A_WAY


def _sum(addends: Sequence[Array]) -> BFloat16[Array, " D"]:
    summed = addends[0].astype(jnp.float32)
    for addend in addends[1:]:
        summed = summed + addend.astype(jnp.float32)
    return summed.astype(jnp.bfloat16)


def load_choices(refs: Sequence[Any], row: Array) -> tuple[list[Array], list[Array]]:
    """A token's places and their weights, from the refs of Summands."""
    _, _, places_ref, weights_ref = refs
    choices = range(places_ref.shape[1])
    # All of them ahead of the rows: one latency, not one a choice.
    places = [places_ref[row, choice] for choice in choices]
    return places, [weights_ref[row, choice] for choice in choices]


def load_summed(
    refs: Sequence[Any],
    row: Array,
    choices: tuple[list[Array], list[Array]],
    *,
    interpret: bool = False,
) -> BFloat16[Array, " D"]:
    """A token's partial, from the refs of Summands, in registers like a row that load_row reads."""
    rows_ref, shared_ref, *_ = refs
    places, weights = choices
    num_rows, width = rows_ref.shape
    is_plain = interpret or width % UNIT > 0
    shared = load_row(shared_ref, row).astype(jnp.float32)
    total = plgpu.layout_cast(jnp.zeros(shared.shape, jnp.float32), row_layout(shared.shape[0]))
    # Some rows ahead of their sum.
    for first in range(0, len(places), _TOGETHER):
        some = places[first : first + _TOGETHER]
        loaded_rows = [None] * len(some) if is_plain else load_rows(rows_ref, some)
        for place, weight, loaded in zip(some, weights[first:], loaded_rows, strict=False):

            def add(total: Array, place: Any = place, weight: Any = weight, loaded: Any = loaded):
                found = load_row(rows_ref, place) if loaded is None else loaded
                return total + found.astype(jnp.float32) * weight

            total = lax.cond(place < num_rows, add, lambda total: total, total)
    return (total + shared).astype(jnp.bfloat16)


def add_up(summands: Summands, *, interpret: bool = False) -> BFloat16[Array, "T D"]:
    """The partial of Summands by a kernel of its own, of as many tokens as there are.

    XLA's form would have other bits: it makes one rounding of a product and a sum.
    """

    def body(*refs: Any) -> None:
        row = lax.axis_index("row")
        summands = refs[:-1]
        choices = load_choices(summands, row)
        refs[-1][row] = load_summed(summands, row, choices, interpret=interpret)

    num_tokens, width = summands.places.shape[0], summands.rows.shape[1]
    check_width(width)
    return launch_order.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_tokens, width), jnp.bfloat16),
        grid=(num_tokens,),
        grid_names=("row",),
        compiler_params=_NO_BARRIERS,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="add_up",
    )(*summands)
