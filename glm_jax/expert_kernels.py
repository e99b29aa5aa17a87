"""Experts on a GPU, from a token's picks to rows that wait to be summed: which kernels, in which order.

Knows no layer and no reference.
"""

from jaxtyping import Array, Float, Float32, Int32

from glm_jax.operands import ExpertRows, Layer, Staged, Weight, Workspace, index, quantized
from glm_jax.ops import Rows
from glm_jax.pallas import dispatch, route_stage
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.grouped_down import grouped_down, quantizes
from glm_jax.pallas.grouped_gate_up import grouped_gate_up
from glm_jax.pallas.quantize import quantize_hidden
from glm_jax.pallas.router import Choice


def stage(
    chip: Chip,
    rows: Rows,
    weight: Float[Array, "L E D"],
    bias: Float32[Array, "L E"],
    layer: Layer,
    choice: Choice,
    num_local: int,
    workspace: Workspace,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"], Staged]:
    """Each token's experts and their weights, and the tokens sorted by this device's num_local ones."""
    assert rows.plain is not None, "the router reads rows that are not quantized"
    at, shift = index(layer)
    local = route_stage.Local(workspace.first_expert, num_local)
    experts, weights, plan = route_stage.route_and_stage(
        rows.plain, quantized(rows, weight), weight, bias, at, choice, local, workspace.routing,
        chip=chip, shift=shift,
    )  # fmt: skip
    return experts, weights, Staged(plan, workspace)


def products(
    chip: Chip,
    rows: Rows,
    chosen: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
    staged: Staged | None,
    first: Int32[Array, ""],
    experts: tuple[Weight, Weight],
    shared: tuple[Weight, Weight],
    layer: Layer,
    *,
    interpret: bool,
) -> ExpertRows:
    """Products of the chosen experts alone, the shared expert's tiles among them.

    Args:
      staged: the tokens sorted already; None where they are to be.
      first: the first expert of this device.
      experts, shared: gate_up and down projections.
    """
    on = {"chip": chip, "interpret": interpret}
    (gate_up, gate_up_scale), (down, down_scale) = experts
    (shared_gate_up, shared_gate_up_scale), (shared_down, shared_down_scale) = shared
    x, x_scale = quantized(rows, gate_up)
    assert gate_up_scale is not None and down_scale is not None, "quantized like the rows"
    at, shift = index(layer)
    if staged is None:
        plan = dispatch.stage(x, x_scale, chosen, first, down.shape[1], **on)
    else:
        plan = staged.plan
    counter = staged.workspace.gate_up if staged and quantizes(plan) else None
    routed, passed = grouped_gate_up(
        x, x_scale, plan, gate_up, gate_up_scale, at, shift=shift,
        shared_values=shared_gate_up, shared_scale=shared_gate_up_scale, counter=counter, **on,
    )  # fmt: skip
    (hidden, hidden_scale), pair = (
        quantize_hidden(routed, passed, plan, interpret=interpret)
        if counter is None
        else ((routed, None), (passed, None))
    )
    assert pair is not None, "the shared expert's"
    shared_hidden, shared_hidden_scale = pair
    out, shared_out = grouped_down(
        hidden, hidden_scale, plan, down, down_scale, at, shift=shift,
        shared_hidden=shared_hidden, shared_hidden_scale=shared_hidden_scale,
        shared_values=shared_down, shared_scale=shared_down_scale, counter=counter, **on,
    )  # fmt: skip
    assert shared_out is not None
    return ExpertRows(out, shared_out, plan.rows, weights)
