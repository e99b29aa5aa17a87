"""Picks and what they ask for in one kernel: each token's experts, then the tokens sorted by expert.

Knows neither the experts' weights nor other devices. First every CTA picks for its share of the tokens;
when all have, each finds and copies the tokens of its own tiles. The interpreter has no barrier for
that: the same two bodies run there as router.route and dispatch.stage.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import dispatch, grid, router
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch, Sizes, default_tile, max_tiles
from glm_jax.pallas.router import Choice

# The most tokens that are counted by every CTA for itself.
MAX_TOKENS = 256
_LANES = 128


class Local(NamedTuple):
    """Experts of this device: the first, and how many follow."""

    first: Int32[Array, ""]
    number: int


def route_and_stage(
    x: BFloat16[Array, "T D"],
    quantized: tuple[Float8e4m3fn[Array, "T D"], Float32[Array, "T 1"]],
    weight: BFloat16[Array, "L E D"],
    bias: Float32[Array, "L E"],
    layer: Int32[Array, ""],
    choice: Choice,
    local: Local,
    counter: Any,
    *,
    chip: Chip,
    shift: int = 0,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"], Dispatch]:
    """What router.route and then dispatch.stage return, to the bit.

    Args:
      quantized: the tokens' values and scales, to be copied.
      layer, shift: their sum is the place in the stacks.
      counter: of grid.make_counter.

    Raises:
      NotImplementedError: more tokens than MAX_TOKENS, or shapes that router.route or dispatch.stage
        refuses.
    """
    num_tokens, width = x.shape
    values, scale = quantized
    if num_tokens > MAX_TOKENS or width % _LANES:
        raise NotImplementedError(
            f"{x.shape=}: up to {MAX_TOKENS} tokens whose width is a multiple of {_LANES}"
        )
    products = router.multiply(x, weight, layer, choice, chip=chip, shift=shift)
    tile = default_tile(num_tokens, chip)
    tiles = max_tiles(num_tokens, choice.num_picks, local.number, tile)
    sizes = Sizes(
        num_tokens, choice.num_picks, choice.padded_picks, local.number, tile, tiles, width
    )
    num_ctas = min(max(tiles, num_tokens), chip.num_cores)

    def body(*refs: Any, **scratch: Any) -> None:
        products_ref, bias_ref, layer_ref, first_ref, counter_ref, *others = refs
        x_ref, x_scale_ref, experts, weights, picks_ref, *outs = others
        rows_ref = outs[3]
        cta = lax.axis_index("cta")
        router.fetch_biases(bias_ref.at[layer_ref[0] + shift], choice, scratch)

        def pick(number: jax.Array, _: None) -> None:
            token = cta + number * num_ctas
            router.pick(products_ref, token, choice, scratch, experts, weights)
            # Whoever sorts a tile writes the rows of local choices, and no one else does.
            for index in range(choice.num_picks):
                picks_ref[index, token] = scratch["picked"][index]
                rows_ref[token, index] = tiles * tile

        mine = lax.div(num_tokens - cta + num_ctas - 1, num_ctas)
        lax.fori_loop(0, mine, pick, None)
        grid.wait_for_all(counter_ref, num_ctas)
        dispatch.sort_and_copy(
            sizes, (x_ref, x_scale_ref), picks_ref, first_ref, outs, num_ctas, scratch
        )

    out_types = [*router.pick_types(num_tokens, choice), sizes.picks_type()]
    experts, weights, _, copied, copied_scale, *fields = plgpu.kernel(
        body,
        out_type=out_types + sizes.row_types() + sizes.plan_types(),
        scratch_types=router.pick_scratch(choice) | sizes.scratch(is_sorting=True),
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="router_picks_dispatch",
    )(
        products,
        bias,
        layer.reshape(1),
        local.first.reshape(1),
        counter,
        *sizes.tokens(values, scale),
    )
    asked = slice(None, choice.num_picks)
    plan = Dispatch(*fields)._replace(values=copied.reshape(-1, width), scale=copied_scale[:, None])
    if choice.num_picks < choice.padded_picks:
        plan = plan._replace(rows=plan.rows[:, asked])
        experts, weights = experts[:, asked], weights[:, asked]
    return experts, weights, plan
