"""A linear layer on quantized tokens: FP8 x FP8, scaled, biased and rounded once to bfloat16.

Knows neither quantization of tokens nor partial sums over devices.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import fp8_product, launch_order
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.product_loop import SCALE_SLOTS, Streams
from glm_jax.pallas.tiling import LINE, TuningConfig, fitting_stages

# Ways to cut a step of few tokens on sm90: tokens of a tile, and weight rows of one. Three tiles of 88
# tokens are 256: o_proj's 120 CTAs then take in less, and multiply less, than 80 of 128 tokens.
_TOKENS, _ROWS = (8, 16, 32, 64, 88, 128), (32, 64, 128)
# A step of many lines costs as many arrivals as one of a line, but this many must be in flight.
_FEWEST_STAGES = 5
# Of a decode step.
_MOST_EARLY = 256


class _Place(NamedTuple):
    row: jax.Array
    token: jax.Array


def default_config(chip: Chip, num_tokens: int, num_rows: int, width: int) -> TuningConfig:
    """Small tiles while weights are all the traffic; square ones once the products are the work.

    On one H200, QKV of 64 tokens took 9.0 us in steps of 128, 7.1 in steps of 256 and 8.1 of 512. Of 8192
    tokens, QKV and o_proj took 105.3 and 100.6 us where two warpgroups share a tile, 102.7 and 95.0 where
    they take turns and have six stages: four made 115 and 108.
    """
    if num_tokens > 512 and chip.architecture == "sm100":
        stages = fitting_stages(128, 2 * 128)
        return TuningConfig(tokens=128, rows=128, warpgroups=2, stages=stages)
    if num_tokens > 512:
        stages = fitting_stages(128, 128, num_staged=2, store=32)
        return TuningConfig(
            tokens=128, rows=128, warpgroups=2, stages=stages, takes_turns=True, store=32,
            is_fed_by_warp=True,
        )  # fmt: skip
    if chip.architecture == "sm90":
        return _least_traffic(chip, num_tokens, num_rows, width)
    tokens = next((size for size in (16, 32, 64) if num_tokens <= size), 64)
    # The projections have 1792 and 5120 rows: in tiles of 32 or 64 most SMs have some to read.
    fill = 32 if num_rows < 64 * chip.num_cores // 2 else 64
    return TuningConfig(tokens=tokens, rows=128, stages=fitting_stages(tokens, 128), fill=fill)


def _least_traffic(chip: Chip, num_tokens: int, num_rows: int, width: int) -> TuningConfig:
    """The tiles for which the SM that gets most of them has fewest rows of K to take in."""

    def rows_taken_in(cut: tuple[int, int]) -> tuple[int, int, int]:
        tokens, rows = cut
        token_tiles = pl.cdiv(num_tokens, tokens)
        rounds = pl.cdiv(pl.cdiv(num_rows, rows) * token_tiles, chip.num_cores)
        # Tokens that only fill a tile are not in memory. Of equals, weights are read least often.
        return rounds * (rows + min(tokens, num_tokens)), token_tiles, tokens

    fitting = [t for t in _TOKENS if min(num_tokens, 16) <= t < 2 * max(num_tokens, 8)]
    tokens, rows = min(((t, r) for t in fitting for r in _ROWS), key=rows_taken_in)
    warpgroups = 2 if rows > 64 else 1
    # More in flight helps where few SMs read weights, or where tokens take most of the room.
    tiles = pl.cdiv(num_rows, rows) * pl.cdiv(num_tokens, tokens)
    is_compact = rows < 64 and (tiles < chip.num_cores // 2 or tokens >= 64)

    def stages(step: int) -> int:
        return fitting_stages(tokens, 64 * warpgroups, step=step, fill=rows if is_compact else None)

    # Four lines only where most of K is in flight: otherwise so few stages are free too late.
    is_wide = 4 * LINE * stages(4 * LINE) >= width or (is_compact and tokens <= 16)
    steps = [4 * LINE] if is_wide else []
    steps += [2 * LINE, LINE]
    step = next((step for step in steps if stages(step) >= _FEWEST_STAGES), LINE)
    return TuningConfig(
        tokens=tokens, rows=64, warpgroups=warpgroups, step=step,
        stages=stages(step),
        fill=None if warpgroups == 2 else rows,
        is_compact=is_compact,
    )  # fmt: skip


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

    Args:
      layer: not of the kernel right ahead, nor are weights: they are read before that one has ended.

    Raises:
      NotImplementedError: K or N is no multiple of 64.
    """
    num_tokens, width = x.shape
    _, num_rows, _ = values.shape
    if width % 64 or num_rows % 64:
        raise NotImplementedError(f"{values.shape=}: K and N must be multiples of 64")
    if padding := fp8_product.padding(num_tokens):
        x, x_scale = (jnp.pad(operand, ((0, padding), (0, 0))) for operand in (x, x_scale))
    config = config or default_config(chip, num_tokens, num_rows, width)
    if interpret:
        # It takes what products read beyond a stage for a race.
        config = replace(config, is_compact=False)
    if chip.architecture == "sm100" and config.takes_turns:
        raise NotImplementedError(f"{config.takes_turns=}: not on sm100")
    num_steps = pl.cdiv(width, config.step)
    row_tiles = pl.cdiv(num_rows, config.tile_rows)
    num_tiles = row_tiles * pl.cdiv(num_tokens, config.tokens)
    num_ctas = min(num_tiles, config.ctas_per_sm * chip.num_cores)
    operands = [x, x_scale.reshape(-1), values, scale, layer.reshape(1)]
    if bias is not None:
        operands.append(bias)

    # Weights first, and then a warp that waits for tokens; in prefill that is no part of the time.
    is_early = not interpret and num_tokens <= _MOST_EARLY
    wait = partial(launch_order.wait, interpret=interpret)

    def body(*refs: Any, **scratch: Any) -> None:
        if is_early:
            pl.when(lax.axis_index("warpgroup") < config.warpgroups)(wait)
        x_ref, x_scale_ref, values_ref, scale_ref, layer_ref, *biases, out_ref = refs
        layer_index = layer_ref[0]

        def locate(tile: jax.Array, _: tuple[()]) -> _Place:
            # Row tiles vary fastest: CTAs side by side share their tokens, and weights stay in L2.
            tiles = jnp.int32(row_tiles)
            return _Place(
                lax.rem(tile, tiles) * config.tile_rows, lax.div(tile, tiles) * config.tokens
            )

        def fetch_weights(place: _Place, step: jax.Array, weights: list[Any], barrier: Any) -> None:
            columns = pl.ds(step * config.step, config.step)
            rows = pl.ds(place.row, config.tile_rows)
            plgpu.copy_gmem_to_smem(
                values_ref.at[layer_index, rows, columns],
                weights[0].at[0, pl.ds(0, config.tile_rows)],
                barrier,
            )

        def fetch_tokens(place: _Place, step: jax.Array, tokens: list[Any], barrier: Any) -> None:
            columns = pl.ds(step * config.step, config.step)
            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(place.token, config.tokens), columns], tokens[0], barrier
            )

        def fetch_token_scales(place: _Place, slot: jax.Array, barrier: Any) -> None:
            plgpu.copy_gmem_to_smem(
                x_scale_ref.at[pl.ds(place.token, config.tokens)],
                scratch["x_scales"].at[slot, pl.ds(0, config.tokens)],
                barrier,
            )

        def fetch_row_scales(place: _Place, slot: jax.Array, barrier: Any) -> None:
            rows = pl.ds(place.row, config.cta_rows)
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

        def send(place: _Place, warpgroup: jax.Array, first: int, staged: Any) -> None:
            row = place.row + config.first_row(warpgroup)
            fp8_product.send(config, staged, out_ref, place.token + first, row)

        streams = Streams(
            num_tiles=num_tiles,
            look_up=lambda tile: (),
            locate=locate,
            num_steps=lambda place: num_steps,
            fetch_weights=fetch_weights,
            fetch_tokens=fetch_tokens,
            fetch_row_scales=fetch_row_scales,
            fetch_token_scales=fetch_token_scales,
            finish=finish,
            send=send,
            await_tokens=wait if is_early else None,
        )
        fp8_product.stream(chip, config, num_ctas, streams, scratch)

    scratch = fp8_product.scratch_types(
        chip,
        config,
        [width],
        halves=1,
        num_copies=2,
        num_scale_copies=2 + (bias is not None),
        interpret=interpret,
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
        waits=not is_early,
        interpret=interpret,
    )
    return kernel(*operands)[:num_tokens]
