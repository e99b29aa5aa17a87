"""The second half of an expert: each row back to the model's width, and the sum of a token's rows.

Knows neither routing nor activations. Routing weights are applied by combine, in float32, to rows
already rounded to bfloat16.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import grouped
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch
from glm_jax.pallas.grouped import Tokens, Weights
from glm_jax.pallas.tiling import LINE, TuningConfig, fitting_stages


def default_config(chip: Chip, tile: int) -> TuningConfig:
    """256 rows a tile on sm100, and on sm90 in prefill; 64 in decode, where eight tiles too many for the
    SMs are a round of small ones.

    On one H200, for 64 tokens: 44.7 us in tiles of 64 rows and steps of 256 columns, 46.6 in tiles of 128
    and steps of 128; 44.0 where two CTAs share an SM, and 43.7 in tiles of 8 tokens besides. For 8192
    tokens: 184 us in tiles of 256 rows, 203 of 128; 178 where 32 tokens' products are stored at once.
    """
    if chip.architecture == "sm100":
        stages = min(6, fitting_stages(tile, 2 * 128))
        return TuningConfig(tokens=tile, rows=128, warpgroups=2, stages=stages)
    if tile <= 32:
        step, ctas = 2 * LINE, 2 if tile <= 16 else 1
        stages = fitting_stages(tile, 64, step=step, ctas_per_sm=ctas)
        return TuningConfig(
            tokens=tile, rows=64, stages=stages, step=step, fill=64, is_fed_by_warp=True, ctas_per_sm=ctas
        )  # fmt: skip
    stages = fitting_stages(tile, 2 * 128, store=32)
    return TuningConfig(
        tokens=tile, rows=128, warpgroups=2, stages=stages, store=32, is_fed_by_warp=True
    )


def grouped_down(
    hidden: Float8e4m3fn[Array, "R F"] | BFloat16[Array, "R F"],
    hidden_scale: Float32[Array, "R 1"] | None,
    dispatch: Dispatch,
    values: Float8e4m3fn[Array, "L E D F"],
    scale: Float32[Array, "L E D"],
    layer: Int32[Array, ""],
    *,
    shared_hidden: Float8e4m3fn[Array, "T S"] | BFloat16[Array, "T S"] | None = None,
    shared_hidden_scale: Float32[Array, "T 1"] | None = None,
    shared_values: Float8e4m3fn[Array, "L D S"] | None = None,
    shared_scale: Float32[Array, "L D"] | None = None,
    chip: Chip,
    config: TuningConfig | None = None,
    shift: int = 0,
    counter: Any = None,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "R D"], BFloat16[Array, "T D"] | None]:
    """hidden @ down.T for each row of dispatch, and for each token where shared.

    Rows of tiles that are not in use are not written.

    Args:
      dispatch, layer: where rows are to be quantized, not of the kernel right ahead, nor are weights: they
        are read before that one has ended.
      hidden_scale: None where rows, and tokens' rows, are bfloat16 in whole groups, which the kernel
        quantizes as quantize_hidden does while its first weights are under way.
      counter: for that, as grouped_gate_up has left it.

    Raises:
      ValueError: the tile of dispatch is not the tokens of config.
      NotImplementedError: D, F or S is no multiple of 64.
    """
    config = config or default_config(chip, dispatch.tile)
    shared = None
    if shared_hidden is not None:
        assert shared_values is not None and shared_scale is not None
        shared = (
            Tokens(shared_hidden, shared_hidden_scale),
            Weights(shared_values[:, None, None], shared_scale[:, None, None]),
        )
    return grouped.product(
        "grouped_down",
        Tokens(hidden, hidden_scale),
        Weights(values[:, :, None], scale[:, :, None]),
        shared,
        dispatch,
        layer,
        lambda products: products[0],
        chip=chip,
        config=config,
        shift=shift,
        counter=counter,
        interpret=interpret,
    )


def quantizes(dispatch: Dispatch) -> bool:
    """Whether the kernel is to quantize such tiles: in larger ones there are more rows than a ring of
    weights takes time to fill."""
    return dispatch.tile <= 32


def combine(
    rows: BFloat16[Array, "R D"],
    shared: BFloat16[Array, "shared_rows D"] | None,
    places: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
) -> Float32[Array, "T D"]:
    """Each token's rows, weighed and added in the order of its choices, and its shared row last.

    The reference of all_reduce.add_up, which steps use. Choices whose expert lives elsewhere add
    nothing, whatever their rows would hold.

    Args:
      shared: a row for each token, first of all.
      places: the row of each choice, as Dispatch.rows.
    """
    num_rows = rows.shape[0]
    total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
    for choice in range(weights.shape[1]):
        index = places[:, choice]
        picked = rows.at[jnp.minimum(index, num_rows - 1)].get(mode="promise_in_bounds")
        weighed = picked.astype(jnp.float32) * weights[:, choice, None]
        total = total + jnp.where((index < num_rows)[:, None], weighed, 0.0)
    return total if shared is None else total + shared[: len(total)].astype(jnp.float32)
