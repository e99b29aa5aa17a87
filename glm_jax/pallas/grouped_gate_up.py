"""The first half of an expert: gate and up multiplied side by side, silu(gate) * up on the way out.

Knows neither routing nor quantization of what it makes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import grouped
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch
from glm_jax.pallas.grouped import Tokens, Weights
from glm_jax.pallas.tiling import LINE, TuningConfig, fitting_stages


def default_config(chip: Chip, tile: int, width: int, num_tokens: int) -> TuningConfig:
    """64 gate rows and their 64 up rows a tile while weights are the traffic, then 128 and 128.

    At batch 64 on one H100, of a copy's bandwidth: 91 % in tiles of 64 rows, 88 % of 128; on one H200
    80.3 us in steps of 128, 78.2 of 256. Of 8192 tokens, 281 us where all of a tile's products are stored
    at once, 250 where 32 tokens' are: that leaves room for a fourth stage.
    """
    if width % 128 == 0 and tile > 32:
        if chip.architecture == "sm100":
            return TuningConfig(tokens=tile, rows=128, stages=fitting_stages(tile, 128, halves=2))
        stages = fitting_stages(tile, 128, halves=2, store=32)
        return TuningConfig(
            tokens=tile, rows=64, warpgroups=2, stages=stages, store=32, is_fed_by_warp=True
        )
    rows = 128 if chip.architecture == "sm100" else 64
    step = LINE if chip.architecture == "sm100" else 2 * LINE
    if tile == 8 and rows == 64:
        # On one H200, 8.1, 19.2, 45.3 and 75.2 us for 1, 4, 16 and 64 tokens; 10.2, 20.8, 47.9 where halves
        # lie side by side, 10.1, 21.0, 45.3 where the last round is not cut.
        step = 4 * LINE
        return TuningConfig(
            tokens=tile, rows=rows, stages=fitting_stages(tile, rows, step=step), step=step,
            fill=32, is_stacked=True, last_cuts=2, is_fed_by_warp=True,
        )  # fmt: skip
    # A step of few tokens has few experts in use, and smaller tiles give more SMs a share of them.
    # On one H200, 8 and 16 tokens take 43.4 us in tiles of 32, 44.9 of 64; 32 and 64 do not gain.
    fill = 32 if num_tokens <= 16 else 64
    stages = fitting_stages(tile, rows, halves=2, step=step)
    return TuningConfig(tokens=tile, rows=rows, stages=stages, step=step, fill=fill)


def grouped_gate_up(
    x: Float8e4m3fn[Array, "T D"],
    x_scale: Float32[Array, "T 1"],
    dispatch: Dispatch,
    values: Float8e4m3fn[Array, "L E 2 F D"],
    scale: Float32[Array, "L E 2 F"],
    layer: Int32[Array, ""],
    *,
    shared_values: Float8e4m3fn[Array, "L 2 S D"] | None = None,
    shared_scale: Float32[Array, "L 2 S"] | None = None,
    chip: Chip,
    config: TuningConfig | None = None,
    shift: int = 0,
    counter: Any = None,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "R F"], BFloat16[Array, "passed S"] | None]:
    """silu(x @ gate.T) * (x @ up.T) for each row of dispatch, and for each token where shared.

    gate, up, silu(gate) and the answer are each rounded to bfloat16. Rows of tiles that are not in
    use are not written.

    Args:
      layer, shift: their sum is the place in the stacks.
      counter: of grid.make_counter, where grouped_down quantizes the answers: made ready for it. Not
        for interpretation.

    Returns:
      The rows' answers, in the order of dispatch, and the tokens' with the shared expert's weights: T of
      them, with a counter up to 7 more.

    Raises:
      ValueError: the tile of dispatch is not the tokens of config.
      NotImplementedError: D, F or S is no multiple of 64.
    """
    config = config or default_config(chip, dispatch.tile, values.shape[3], x.shape[0])
    if dispatch.values is None or dispatch.scale is None:
        rows = Tokens(
            x.at[dispatch.tokens].get(mode="promise_in_bounds"),
            x_scale.at[dispatch.tokens].get(mode="promise_in_bounds"),
        )
    else:
        rows = Tokens(dispatch.values, dispatch.scale)
    shared = None
    if shared_values is not None and shared_scale is not None:
        shared = Tokens(x, x_scale), Weights(shared_values[:, None], shared_scale[:, None])
    return grouped.product(
        "grouped_gate_up",
        rows,
        Weights(values, scale),
        shared,
        dispatch,
        layer,
        _gated_silu,
        chip=chip,
        config=config,
        shift=shift,
        counter=counter,
        interpret=interpret,
    )


def _gated_silu(products: list[jax.Array]) -> jax.Array:
    gate, up = (_rounded(product) for product in products)
    return _rounded(gate / (1 + jnp.exp(-gate))) * up


def _rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)
