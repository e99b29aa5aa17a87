"""Picks and what they ask for: each token's experts, then the tokens sorted by expert.

Knows neither the experts' weights nor other devices. Each token's CTA picks for it, learns from all
others what they picked, and brings its token to its places. Where few tokens leave room for them, the
CTAs that multiply tokens with the router's weights are of the same kernel. The interpreter has none of
that: there, router.route and dispatch.stage do the same.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

from glm_jax.pallas import handover, launch_order, places, router
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch, Sizes, default_tile, max_tiles
from glm_jax.pallas.places import MAX_PICKS, Inputs, Outputs
from glm_jax.pallas.router import Choice, Cut

# The most tokens that are counted by every CTA for itself.
MAX_TOKENS = 256
# A token's CTA waits for those of all others: so many are surely running on an SM at once.
_CTAS_PER_SM = 2
# Of an SM, and what a CTA takes of it beside products' and a token: scores, counts, the system's own.
_SHARED_MEMORY = 228 * 1024
_OTHERS = 8 * 1024
# Tokens up to which their CTAs may look for all products over and over.
_FEW_TOKENS = 128
# Whose products are handed over.
_MOST_EXPERTS = 256
_LANES = 128


class Local(NamedTuple):
    """Experts of this device: the first, and how many follow."""

    first: Int32[Array, ""]
    number: int


class Memory(NamedTuple):
    """What the CTAs of calls with so many tokens tell each other by, made once, outside of every loop.

    Attributes:
      words: of places.make_words.
      products: float32[parts, tokens, experts] of handover.make_empty, experts up to _MOST_EXPERTS.
    """

    words: jax.Ref
    products: jax.Ref


def make_memory(num_tokens: int, width: int, num_local: int, chip: Chip) -> Memory:
    """The memory for so many tokens of that width, and experts of this device."""
    rows = router.tile_rows(chip)
    padded_tokens = -(-num_tokens // rows) * rows
    products = handover.make_empty(router.num_chunks(width), padded_tokens, _MOST_EXPERTS)
    return Memory(places.make_words(num_tokens, num_local), products)


class _Parts(NamedTuple):
    """What the kernel is made for.

    Attributes:
      cut: of the products.
      num_makers: CTAs that multiply, before those of tokens; none where products are made before.
    """

    sizes: Sizes
    choice: Choice
    cut: Cut
    shift: int
    num_makers: int


def route_and_stage(
    x: BFloat16[Array, "T D"],
    quantized: tuple[Float8e4m3fn[Array, "T D"], Float32[Array, "T 1"]],
    weight: BFloat16[Array, "L E D"],
    bias: Float32[Array, "L E"],
    layer: Int32[Array, ""],
    choice: Choice,
    local: Local,
    memory: Memory,
    *,
    chip: Chip,
    shift: int = 0,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"], Dispatch]:
    """What router.route and then dispatch.stage return, to the bit.

    But for rows that only fill a tile: nothing is written to them.

    Args:
      quantized: the tokens' values and scales, to be copied.
      layer, shift: their sum is the place in the stacks.
      memory: of make_memory, for as many tokens and local experts.

    Raises:
      NotImplementedError: more tokens than MAX_TOKENS or than the chip takes at once, more picks than
        MAX_PICKS, or shapes that router.route or dispatch.stage refuses.
      ValueError: the memory is for other numbers.
    """
    num_tokens, width = x.shape
    values, scale = quantized
    limit = min(MAX_TOKENS, _CTAS_PER_SM * chip.num_cores)
    if num_tokens > limit or width % _LANES or choice.num_picks > MAX_PICKS:
        raise NotImplementedError(
            f"{x.shape=}, {choice.num_picks} picks: up to {limit} tokens whose width is a multiple of "
            f"{_LANES}, {MAX_PICKS} picks"
        )
    words, products = memory
    if words.shape != (places.num_words(num_tokens, local.number),):
        raise ValueError(f"{words.shape=}: of {num_tokens} tokens, {local.number} local experts?")
    cut = router.cut_of(num_tokens, width, choice, chip)
    # Those that multiply wait for nobody: it is enough that one finds room beside all tokens' CTAs.
    most_running = _SHARED_MEMORY // (cut.shared_memory + width + _OTHERS) * chip.num_cores
    is_whole = num_tokens < most_running and choice.num_experts <= _MOST_EXPERTS
    num_makers = math.prod(cut.grid) if is_whole else 0
    sizes = _sizes(num_tokens, width, choice, local.number, chip)
    parts = _Parts(sizes, choice, cut, shift, num_makers)
    operands = [layer.reshape(1), words, bias, local.first.reshape(1), values, scale.reshape(-1)]
    if num_makers:
        if products.shape != (cut.grid[2], cut.grid[0] * cut.rows, _MOST_EXPERTS):
            raise ValueError(f"{products.shape=}: of {x.shape=}?")
        operands += [products, router.whole_eights(x), weight]
    else:
        operands.append(router.multiply(x, weight, layer, choice, chip=chip, shift=shift))
    is_exact = choice.num_picks == choice.padded_picks
    # What XLA cuts off next must be there.
    with nullcontext() if is_exact else launch_order.overlapping(False):
        experts, weights, copied, copied_scale, *fields = _launch(parts, operands)
    plan = Dispatch(*fields)._replace(values=copied, scale=copied_scale[:, None])
    asked = slice(None, choice.num_picks)
    if not is_exact:
        plan = plan._replace(rows=plan.rows[:, asked])
        experts, weights = experts[:, asked], weights[:, asked]
    return experts, weights, plan


def _sizes(num_tokens: int, width: int, choice: Choice, num_local: int, chip: Chip) -> Sizes:
    tile = default_tile(num_tokens, chip)
    tiles = max_tiles(num_tokens, choice.num_picks, num_local, tile)
    return Sizes(num_tokens, choice.num_picks, choice.padded_picks, num_local, tile, tiles, width)


def _launch(parts: _Parts, operands: Sequence[Any]) -> Sequence[Array]:
    sizes, num_makers = parts.sizes, parts.num_makers
    rows, rows_scale = sizes.row_types()
    out_types = [
        *router.pick_types(sizes.num_tokens, parts.choice),
        jax.ShapeDtypeStruct((rows.shape[0], sizes.width), rows.dtype),
        rows_scale,
        *sizes.plan_types(),
    ]
    smem = places.scratch(sizes, parts.choice) | {"arrived": plgpu.Barrier()}
    if num_makers:
        smem |= router.sum_scratch(parts.cut)

    def body(*refs: Any, **scratch: Any) -> None:
        inputs, products_ref, others = refs[:6], refs[6], refs[7:]
        if not num_makers:
            _route(parts, inputs, products_ref, others, scratch)
            return
        x_ref, weight_ref, *outs = others
        cta = lax.axis_index("cta")

        @pl.when(cta < num_makers)
        def _make() -> None:
            rest, tokens = lax.div(cta, parts.cut.grid[0]), lax.rem(cta, parts.cut.grid[0])
            place = tokens, lax.rem(rest, parts.cut.grid[1]), lax.div(rest, parts.cut.grid[1])
            product_refs = x_ref, weight_ref, inputs[0]
            sums = router.sum_part(parts.cut, place, product_refs, parts.shift, scratch)
            _store(products_ref.at[parts.cut.part_of(place)], sums)

        @pl.when(cta >= num_makers)
        def _pick() -> None:
            launch_order.wait(interpret=False)
            _route(parts, inputs, products_ref, outs, scratch)

    kernel = launch_order.kernel(
        body,
        out_type=out_types,
        scratch_types=smem,
        grid=(num_makers + sizes.num_tokens,),
        grid_names=("cta",),
        waits=not num_makers,
        kernel_name="router_picks_dispatch",
    )
    return kernel(*operands)


def _route(
    parts: _Parts, refs: Sequence[Any], products_ref: Any, outs: Sequence[Any], smem: dict[str, Any]
) -> None:
    """Picks for a token and brings it to its places: a CTA's work."""
    layer_ref, words_ref, bias_ref, first_ref, x_ref, x_scale_ref = refs
    experts, weights, copied, copied_scale, tokens, rows, tile_experts, num_tiles = outs
    choice, num_makers = parts.choice, parts.num_makers
    token = lax.axis_index("cta") - num_makers
    plgpu.copy_gmem_to_smem(
        x_ref.at[token],
        smem["row"],
        smem["arrived"],
        # What is known to lie within is copied in bulk, without a descriptor.
        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
    )
    inputs = Inputs(bias_ref.at[layer_ref[0] + parts.shift], first_ref, words_ref, x_scale_ref)
    if num_makers:
        places.ask(inputs, smem, choice.num_experts)
        logits = handover.sum_of(
            products_ref.at[:, token],
            choice.num_experts,
            is_one_of_many=parts.sizes.num_tokens > _FEW_TOKENS,
        )
        for number, piece in enumerate(logits):
            smem["scores"][pl.ds(number * _LANES, _LANES)] = router.score([piece])
        handover.clear(products_ref.at[:, token], choice.num_experts)
    else:
        pieces = _pieces(choice)
        products = [router.load_products(products_ref, token, piece) for piece in pieces]
        # What is asked for begins with the layer, which takes its time: after the products.
        places.ask(inputs, smem, choice.num_experts)
        for piece, summands in zip(pieces, products, strict=True):
            smem["scores"][piece] = router.score(summands)
    plgpu.barrier_wait(smem["arrived"])
    outputs = Outputs(
        experts.at[token], weights.at[token], rows.at[token],
        copied, copied_scale, tokens, tile_experts, num_tiles,
    )  # fmt: skip
    places.place(inputs, outputs, smem, parts.sizes, choice, num_makers)


def _store(ref: Any, sums: jax.Array) -> None:
    """Stores sums as the tensor cores leave them, which the compiler takes for an oversight."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, sums, optimized=False)
    else:
        # jax before 0.12 does not look, and knows no such word.
        ref[...] = sums


def _pieces(choice: Choice) -> list[Any]:
    """A row of products in pieces of a number a thread, which overlap where it is no multiple of them."""
    last = max(choice.num_experts - _LANES, 0)
    return [pl.ds(min(first, last), _LANES) for first in range(0, choice.num_experts, _LANES)]
