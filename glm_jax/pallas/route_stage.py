"""Picks and what they ask for in one kernel: each token's experts, then the tokens sorted by expert.

Knows neither the experts' weights nor other devices. Each token's CTA picks for it, learns from all
others what they picked, and brings its token to its places. The interpreter has none of that: there,
router.route and dispatch.stage do the same.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import places, router
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch, Sizes, default_tile, max_tiles
from glm_jax.pallas.places import MAX_PICKS, Inputs, Outputs, make_words
from glm_jax.pallas.router import Choice

__all__ = ["MAX_TOKENS", "Local", "make_words", "route_and_stage"]

# The most tokens that are counted by every CTA for itself.
MAX_TOKENS = 256
# A token's CTA waits for those of all others: so many are surely running on an SM at once.
_CTAS_PER_SM = 2
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
    words: Any,
    *,
    chip: Chip,
    shift: int = 0,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"], Dispatch]:
    """What router.route and then dispatch.stage return, to the bit.

    But for rows that only fill a tile: nothing is written to them.

    Args:
      quantized: the tokens' values and scales, to be copied.
      layer, shift: their sum is the place in the stacks.
      words: of make_words, for as many tokens and local experts.

    Raises:
      NotImplementedError: more tokens than MAX_TOKENS or than the chip takes at once, more picks than
        MAX_PICKS, or shapes that router.route or dispatch.stage refuses.
      ValueError: the words are for other numbers.
    """
    num_tokens, width = x.shape
    values, scale = quantized
    limit = min(MAX_TOKENS, _CTAS_PER_SM * chip.num_cores)
    if num_tokens > limit or width % _LANES or choice.num_picks > MAX_PICKS:
        raise NotImplementedError(
            f"{x.shape=}, {choice.num_picks} picks: up to {limit} tokens whose width is a multiple of "
            f"{_LANES}, {MAX_PICKS} picks"
        )
    if words.shape != (places.num_words(num_tokens, local.number),):
        raise ValueError(f"{words.shape=}: of {num_tokens} tokens, {local.number} local experts?")
    products = router.multiply(x, weight, layer, choice, chip=chip, shift=shift)
    tile = default_tile(num_tokens, chip)
    tiles = max_tiles(num_tokens, choice.num_picks, local.number, tile)
    sizes = Sizes(
        num_tokens, choice.num_picks, choice.padded_picks, local.number, tile, tiles, width
    )

    def body(*refs: Any, **scratch: Any) -> None:
        products_ref, bias_ref, layer_ref, first_ref, words_ref, x_ref, x_scale_ref, *outs = refs
        experts, weights, copied, copied_scale, tokens, rows, tile_experts, num_tiles = outs
        token = lax.axis_index("token")
        arrived = scratch.pop("arrived")
        place = layer_ref[0] + shift
        plgpu.copy_gmem_to_smem(
            x_ref.at[token],
            scratch["staged"],
            arrived,
            # What is known to lie within is copied in bulk, without a descriptor.
            oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )
        pieces = _pieces(choice)
        products = [router.load_products(products_ref, token, piece) for piece in pieces]
        inputs = Inputs(bias_ref.at[place], first_ref, words_ref, x_scale_ref)
        places.ask(inputs, scratch, choice.num_experts)
        for piece, parts in zip(pieces, products, strict=True):
            scratch["scores"][piece] = router.score(parts)
        plgpu.barrier_wait(arrived)
        outputs = Outputs(
            experts.at[token], weights.at[token], rows.at[token],
            copied, copied_scale, tokens, tile_experts, num_tiles,
        )  # fmt: skip
        places.place(inputs, outputs, scratch, sizes, choice)

    rows, rows_scale = sizes.row_types()
    out_types = [
        *router.pick_types(num_tokens, choice),
        jax.ShapeDtypeStruct((rows.shape[0], width), values.dtype),
        rows_scale,
        *sizes.plan_types(),
    ]
    experts, weights, copied, copied_scale, *fields = plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=places.scratch(sizes, choice) | {"arrived": plgpu.Barrier()},
        grid=(num_tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="router_picks_dispatch",
    )(products, bias, layer.reshape(1), local.first.reshape(1), words, values, scale.reshape(-1))
    plan = Dispatch(*fields)._replace(values=copied, scale=copied_scale[:, None])
    asked = slice(None, choice.num_picks)
    if choice.num_picks < choice.padded_picks:
        plan = plan._replace(rows=plan.rows[:, asked])
        experts, weights = experts[:, asked], weights[:, asked]
    return experts, weights, plan


def _pieces(choice: Choice) -> list[Any]:
    """A row of products in pieces of a number a thread, which overlap where it is no multiple of them."""
    last = max(choice.num_experts - _LANES, 0)
    return [pl.ds(min(first, last), _LANES) for first in range(0, choice.num_experts, _LANES)]
