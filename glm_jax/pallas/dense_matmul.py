"""A linear layer on quantized tokens: FP8 x FP8, scaled, biased and rounded once to bfloat16.

Knows neither quantization of tokens nor partial sums over devices.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import fp8_product
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.fp8_product import SCALE_SLOTS
from glm_jax.pallas.tiling import LINE, TuningConfig, fitting_stages

# Tokens up to which tiles are so few that each may have CTAs of its own.
_MOST_SPREAD = 128


class _Place(NamedTuple):
    row: jax.Array
    token: jax.Array


def default_config(chip: Chip, num_tokens: int, num_rows: int) -> TuningConfig:
    """Small tiles while weights are all the traffic; square ones once the products are the work."""
    rows = 128 if chip.architecture == "sm100" else 64
    if num_tokens > 512:
        stages = fitting_stages(128, 2 * rows)
        return TuningConfig(tokens=128, rows=rows, warpgroups=2, stages=stages)
    tokens = next((size for size in (16, 32, 64) if num_tokens <= size), 64)
    # The projections have 1792 and 5120 rows: in tiles of 32 or 64 most SMs have some to read.
    fill = 32 if num_rows < 64 * chip.num_cores // 2 else 64
    return TuningConfig(tokens=tokens, rows=rows, stages=fitting_stages(tokens, rows), fill=fill)


def config_in_parts(chip: Chip, num_tokens: int, num_rows: int, width: int) -> TuningConfig:
    """K in parts, by CTAs of a cluster in a decode step: every SM has a share, and a short one.

    Parts depend on the weight alone, so that steps of any number of tokens make the same bits: either
    all of a deployment's steps are cut this way or none. On sm100 nothing is cut, since the sums of
    several parts would not fit into tensor memory in prefill.
    """
    steps, tiles = pl.cdiv(width, LINE), pl.cdiv(num_rows, 2 * 64)
    fitting = (n for n in (4, 3, 2) if steps % n == 0 and tiles * n <= chip.num_cores)
    parts = next(fitting, 1) if chip.architecture == "sm90" and steps >= 8 else 1
    config = default_config(chip, num_tokens, num_rows)
    if parts == 1 or num_tokens > _MOST_SPREAD:
        return replace(config, parts=parts)
    # As many CTAs as there are SMs, or nearly: more rows a tile where rows alone are enough.
    warpgroups = 2 if num_rows * parts > 64 * chip.num_cores else 1
    return replace(
        config,
        warpgroups=warpgroups,
        fill=None,
        stages=fitting_stages(config.tokens, warpgroups * config.rows, num_spread=parts),
        parts=parts,
        is_spread=True,
    )


def matmul(
    x: Float8e4m3fn[Array, "T K"],
    x_scale: Float32[Array, "T 1"],
    values: Float8e4m3fn[Array, "L N K"],
    scale: Float32[Array, "L N"],
    bias: BFloat16[Array, "L N"] | None,
    layer: Int32[Array, ""],
    *,
    chip: Chip,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "T N"]:
    """bfloat16(x @ values[layer].T * x_scale * scale[layer] + bias[layer]), for any T.

    Raises:
      NotImplementedError: K or N is no multiple of 64.
    """
    num_tokens, width = x.shape
    _, num_rows, _ = values.shape
    if width % 64 or num_rows % 64:
        raise NotImplementedError(f"{values.shape=}: K and N must be multiples of 64")
    if padding := fp8_product.padding(num_tokens):
        x, x_scale = (jnp.pad(operand, ((0, padding), (0, 0))) for operand in (x, x_scale))
    config = config or default_config(chip, num_tokens, num_rows)
    if chip.architecture == "sm100" and (config.parts > 1 or config.takes_turns):
        raise NotImplementedError(f"{config.parts=}, {config.takes_turns=}: not on sm100")
    num_steps = pl.cdiv(width, config.step)
    if config.parts > 1 and width % config.step:
        raise NotImplementedError(f"{width=} in parts is no multiple of {config.step=}")
    if num_steps % config.parts:
        raise NotImplementedError(f"{width=}: {num_steps} steps are not {config.parts=}")
    if interpret:
        # The interpreter knows no shared memory of other CTAs.
        config = replace(config, is_spread=False)
    row_tiles = pl.cdiv(num_rows, config.tile_rows)
    num_tiles = row_tiles * pl.cdiv(num_tokens, config.tokens)
    num_ctas = num_tiles if config.is_spread else min(num_tiles, chip.num_cores)
    num_steps //= config.num_spread
    operands = [x, x_scale.reshape(-1), values, scale, layer.reshape(1)]
    if bias is not None:
        operands.append(bias)

    def body(*refs: Any, **scratch: Any) -> None:
        x_ref, x_scale_ref, values_ref, scale_ref, layer_ref, *biases, out_ref = refs
        layer_index = layer_ref[0]
        first_step = lax.axis_index("part") * num_steps if config.num_spread > 1 else 0

        def locate(tile: jax.Array) -> _Place:
            # Row tiles vary fastest: CTAs side by side share their tokens, and weights stay in L2.
            tiles = jnp.int32(row_tiles)
            return _Place(
                lax.rem(tile, tiles) * config.tile_rows, lax.div(tile, tiles) * config.tokens
            )

        def fetch(place: _Place, step: jax.Array, weights: Any, tokens: Any, barrier: Any) -> None:
            columns = pl.ds((first_step + step) * config.step, config.step)
            rows = pl.ds(place.row, config.tile_rows)
            plgpu.copy_gmem_to_smem(
                values_ref.at[layer_index, rows, columns],
                weights.at[0, pl.ds(0, config.tile_rows)],
                barrier,
            )
            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(place.token, config.tokens), columns], tokens, barrier
            )

        def fetch_scales(place: _Place, slot: jax.Array, barrier: Any) -> None:
            rows = pl.ds(place.row, config.cta_rows)
            plgpu.copy_gmem_to_smem(
                x_scale_ref.at[pl.ds(place.token, config.tokens)],
                scratch["x_scales"].at[slot, pl.ds(0, config.tokens)],
                barrier,
            )
            plgpu.copy_gmem_to_smem(
                scale_ref.at[layer_index, rows], scratch["row_scales"].at[slot], barrier
            )
            for bias_ref in biases:
                plgpu.copy_gmem_to_smem(
                    bias_ref.at[layer_index, rows], scratch["biases"].at[slot], barrier
                )

        def finish(
            slot: jax.Array, row: jax.Array | int, first: int, products: list[jax.Array]
        ) -> jax.Array:
            [out] = products
            mine = pl.ds(row, out.shape[0])
            x_scales = scratch["x_scales"][slot, pl.ds(first, out.shape[1])]
            row_scales = scratch["row_scales"][slot, mine]
            out = out * lax.broadcast_in_dim(x_scales, out.shape, (1,))
            out = out * lax.broadcast_in_dim(row_scales, out.shape, (0,))
            if biases:
                added = scratch["biases"][slot, mine].astype(jnp.float32)
                out = out + lax.broadcast_in_dim(added, out.shape, (0,))
            return out

        def send(place: _Place, warpgroup: jax.Array, staged: Any) -> None:
            row = place.row + config.first_row(warpgroup)
            fp8_product.send(config, staged, out_ref, place.token, row)

        streams = fp8_product.Streams(
            num_tiles=num_tiles,
            locate=locate,
            num_steps=lambda place: num_steps,
            fetch=fetch,
            fetch_scales=fetch_scales,
            finish=finish,
            send=send,
        )
        fp8_product.stream(chip, config, num_ctas, streams, scratch)

    scratch = fp8_product.scratch_types(
        chip,
        config,
        [width],
        halves=1,
        num_copies=2,
        num_scale_copies=2 + (bias is not None),
    )
    scratch["x_scales"] = fp8_product.token_scales(config)
    rows = config.cta_rows
    scratch["row_scales"] = plgpu.SMEM((SCALE_SLOTS, rows), jnp.float32)
    if bias is not None:
        scratch["biases"] = plgpu.SMEM((SCALE_SLOTS, rows), jnp.bfloat16)
    kernel = fp8_product.launch(
        body,
        name="dense_matmul",
        chip=chip,
        config=config,
        out_type=jax.ShapeDtypeStruct((num_tokens + padding, num_rows), jnp.bfloat16),
        scratch=scratch,
        num_ctas=num_ctas,
        interpret=interpret,
    )
    return kernel(*operands)[:num_tokens]
