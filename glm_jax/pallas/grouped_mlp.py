"""Both halves of an expert in one kernel, for decode steps on sm90: the second finds its weights there.

Knows neither routing nor the sum of a token's rows. Between the two products all CTAs meet twice, for a
row is quantized when all of it is known and then read by every CTA. Meanwhile the ring, 27 MB on all
multiprocessors, fills with the weights of the second product. Its tiles are cut otherwise: a stage, two
halves of 64 rows in the first, has 64 rows and twice the columns in the second. Every bit is that of
grouped_gate_up and then grouped_down.
"""

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import fp8_product, grid, grouped, grouped_gate_up
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch
from glm_jax.pallas.grouped import Inputs, Loads, Side, Tokens, Walk, Weights
from glm_jax.pallas.product_loop import SCALE_SLOTS
from glm_jax.pallas.quantize import GROUP, quantize_groups, quantized_types
from glm_jax.pallas.tiling import LINE, TuningConfig

_HALVES = 2
# Of the 227 KiB of a CTA, without what scales and barriers take.
_SHARED_MEMORY = 221 * 1024


def serves(chip: Chip, dispatch: Dispatch) -> bool:
    """Whether the kernel is for such tiles: of 8 tokens, of which a part of a stage is contiguous."""
    return chip.architecture == "sm90" and dispatch.tile == 8


def default_configs(tile: int, num_tokens: int) -> tuple[TuningConfig, TuningConfig]:
    """Tiles of 64 gate rows and their 64 up rows, then of 64 rows; with few experts in use, first of 32."""
    step = 2 * LINE
    stage = (_HALVES * 64 + 2 * tile) * step
    config = TuningConfig(
        tokens=tile, rows=64, stages=(_SHARED_MEMORY - tile * 64 * 2) // stage, step=step, fill=64
    )
    return replace(config, fill=32) if num_tokens <= 4 else config, config


def grouped_mlp(
    x: Float8e4m3fn[Array, "T D"],
    x_scale: Float32[Array, "T 1"],
    dispatch: Dispatch,
    gate_up: tuple[Float8e4m3fn[Array, "L E 2 F D"], Float32[Array, "L E 2 F"]],
    down: tuple[Float8e4m3fn[Array, "L E D F"], Float32[Array, "L E D"]],
    shared_gate_up: tuple[Float8e4m3fn[Array, "L 2 S D"], Float32[Array, "L 2 S"]],
    shared_down: tuple[Float8e4m3fn[Array, "L D S"], Float32[Array, "L D"]],
    layer: Int32[Array, ""],
    counter: Any,
    *,
    chip: Chip,
    configs: tuple[TuningConfig, TuningConfig] | None = None,
    shift: int = 0,
) -> tuple[BFloat16[Array, "R D"], BFloat16[Array, "shared_rows D"]]:
    """down @ quantized(silu(gate @ x) * (up @ x)) for each row of dispatch, and for each token where shared.

    Not for interpretation.

    Args:
      dispatch: with the rows' values and scale.
      layer, shift: their sum is the place in the stacks.
      counter: of grid.make_counter.

    Returns:
      Rows in the order of dispatch, of tiles in use; and tokens' rows, of which there may be up to 7 more.

    Raises:
      NotImplementedError: a width that is no multiple of 64.
    """
    assert dispatch.values is not None and dispatch.scale is not None
    configs = configs or default_configs(dispatch.tile, x.shape[0])
    if padding := fp8_product.padding(x.shape[0]):
        x, x_scale = (jnp.pad(operand, ((0, padding), (0, 0))) for operand in (x, x_scale))
    tokens = Tokens(dispatch.values, dispatch.scale), Tokens(x, x_scale)
    weights = (
        (Weights(*gate_up), Weights(*(operand[:, None] for operand in shared_gate_up))),
        (
            Weights(*(operand[:, :, None] for operand in down)),
            Weights(*(operand[:, None, None] for operand in shared_down)),
        ),
    )
    num_rows = [-(-side.values.shape[0] // GROUP) * GROUP for side in tokens]
    widths = [[side.values.shape[-1] for side in sides] for sides in weights]
    if any(width % 64 for each in widths for width in each):
        raise NotImplementedError(f"{widths=}: multiples of 64")
    row_tiles = [
        [pl.cdiv(side.values.shape[-2], config.tile_rows) for side in sides]
        for config, sides in zip(configs, weights, strict=True)
    ]
    tile = configs[0].tokens
    num_shared = [tiles[1] * pl.cdiv(num_rows[1], tile) for tiles in row_tiles]
    most = (dispatch.tile_experts.shape[0] * tiles[0] for tiles in row_tiles)
    num_ctas = min(max(most) + max(num_shared), chip.num_cores)
    hidden = [
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
        for rows, width in zip(num_rows, widths[1], strict=True)
    ]
    quantized = [out for each in hidden for out in quantized_types(*each.shape)]
    outs = [jax.ShapeDtypeStruct((rows, x.shape[1]), jnp.bfloat16) for rows in num_rows]
    operands = [
        *(part for side in tokens for part in (side.values, side.scale.reshape(-1))),
        *(part for sides in weights for side in sides for part in grouped.flat(side)),
    ]

    def body(*refs: Any, **scratch: Any) -> None:
        layer_ref, tile_experts_ref, num_tiles_ref, counter_ref, *others = refs
        inputs, made = others[: len(operands)], others[len(operands) :]
        hidden_refs, quantized_refs, out_refs = made[:2], made[2:6], made[6:]
        halves = (inputs[:4], inputs[4:8], hidden_refs), (quantized_refs, inputs[8:], out_refs)
        streams = []
        for number, (rows, values, results) in enumerate(halves):
            sides = []
            for i, side in enumerate(weights[number]):
                inputs_of = cast(Inputs, [*rows[2 * i : 2 * i + 2], *values[2 * i : 2 * i + 2]])
                sides.append(Side(*inputs_of, results[i], side.values.shape[1]))
            walk = Walk(
                configs[number], row_tiles[number], num_shared[number], tile_experts_ref,
                num_tiles_ref,
            )  # fmt: skip
            parts = 1 if number == 0 else _HALVES
            loads = Loads(configs[number], sides, layer_ref[0] + shift, scratch, parts)
            finish = grouped_gate_up.gated_silu if number == 0 else lambda products: products[0]
            streams.append(grouped.streams_of(walk, loads, finish))

        def quantize() -> None:
            plgpu.wait_smem_to_gmem(0)
            grid.wait_for_all(counter_ref, num_ctas)
            warpgroups = configs[0].warpgroups + 1
            first = lax.axis_index("cta") * warpgroups + lax.axis_index("warpgroup")
            in_use = num_tiles_ref[0] * (tile // GROUP)
            quantize_groups(in_use, hidden_refs, quantized_refs, first, num_ctas * warpgroups)
            grid.wait_for_all(counter_ref, num_ctas)

        steps = pl.cdiv(x.shape[1], configs[0].step)
        fp8_product.stream_two(chip, configs, num_ctas, tuple(streams), scratch, steps, quantize)

    copies = {"num_copies": _HALVES + 1, "num_scale_copies": _HALVES + 1, "parts": _HALVES}
    scratch = fp8_product.scratch_types(
        chip, configs[0], [width for each in widths for width in each], halves=_HALVES, **copies
    )
    scratch["token_scales"] = fp8_product.token_scales(configs[0])
    rows = configs[0].cta_rows
    scratch["row_scales"] = plgpu.SMEM((SCALE_SLOTS, _HALVES, rows), jnp.float32)
    kernel = fp8_product.launch(
        body,
        name="grouped_mlp",
        chip=chip,
        config=configs[0],
        out_type=[*hidden, *quantized, *outs],
        scratch=scratch,
        num_ctas=num_ctas,
        interpret=False,
    )
    found = kernel(layer.reshape(1), dispatch.tile_experts, dispatch.num_tiles, counter, *operands)
    return found[-2], found[-1]
