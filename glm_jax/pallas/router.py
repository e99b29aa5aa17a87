"""The router: every expert's score for every token, and the few experts that each token goes to.

Knows neither the experts nor the devices that hold them. Two kernels: the products of tokens and
experts, cut along D in chunks of a fixed size; and, per token, their sum in order of the chunks, the
sigmoid, and the ranking. So a token's bits depend on the token alone.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from glm_jax.pallas import launch_order
from glm_jax.pallas.chip import Chip

# One row of the 128-byte swizzle, the widest that TMA and the tensor cores share.
_STEP = 64
_STEPS_PER_CHUNK = 4
_CHUNK = _STEP * _STEPS_PER_CHUNK
_WARPGROUP = 128
# Of a [64, n] array a warpgroup's thread holds two rows; the ranking compares in pieces of as many
# columns, so that a piece stays in registers.
_ROW_TILE = 64
_RANKED_COLUMNS = 32
# Tokens up to which the picks of a token are waited for, rather than an SM's turn to make them.
_MOST_WAITING = 1024


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """How the products are cut; none of it changes a bit of them.

    Attributes:
      experts: experts per tile, N of an instruction.
      is_split: whether each chunk of D is a CTA's own. Decode has too few tokens to give every SM
        work otherwise; prefill would write and read every chunk's products.
      stages: steps of 64 along D in flight.
    """

    experts: int
    is_split: bool
    stages: int

    def __post_init__(self) -> None:
        if self.experts % 16 or not 16 <= self.experts <= 256:
            raise ValueError(f"experts={self.experts} is no multiple of 16 up to 256")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: a ring needs at least 2")


def default_config(chip: Chip, num_tokens: int, num_experts: int) -> TuningConfig:
    """Split until the chunks' products outgrow what the L2 cache holds beside everything else."""
    if num_tokens <= 512:
        half = -(-num_experts // 32) * 16
        return TuningConfig(min(half, 256), is_split=True, stages=_STEPS_PER_CHUNK)
    # A tile of sm100 has twice the tokens.
    stages = 6 if chip.architecture == "sm90" and num_experts <= 160 else 4
    return TuningConfig(min(-(-num_experts // 16) * 16, 256), is_split=False, stages=stages)


def route(
    x: BFloat16[Array, "T D"],
    weight: BFloat16[Array, "L E D"],
    bias: Float32[Array, "L E"],
    layer: Int32[Array, ""],
    *,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    chip: Chip,
    config: TuningConfig | None = None,
    shift: int = 0,
    interpret: bool = False,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Each token's experts, by falling sigmoid(logit) + bias[layer + shift], and their weights.

    Equal scores go to the lower index first. Weights come of the scores without bias, divided by
    their sum if norm_topk_prob, times routed_scaling_factor. A token whose logits are not numbers
    gets experts within range and weights that are not numbers.

    Raises:
      NotImplementedError: D is no multiple of 256, E none of 8, or k is over 64.
    """
    choice = Choice(weight.shape[1], num_experts_per_tok, norm_topk_prob, routed_scaling_factor)
    products = multiply(x, weight, layer, choice, chip=chip, config=config, shift=shift,
                        interpret=interpret)  # fmt: skip
    return _pick(products, len(x), bias, layer, choice, shift, interpret)


class Choice(NamedTuple):
    """How many experts there are, how many of them a token gets, and what becomes of their scores."""

    num_experts: int
    num_picks: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def padded_picks(self) -> int:
        """Picks of a token as they lie in memory, in pieces of 32 bytes."""
        return -(-self.num_picks // 8) * 8

    @property
    def padded_experts(self) -> int:
        """Experts as the products of a token lie in memory."""
        return -(-self.num_experts // _WARPGROUP) * _WARPGROUP


def multiply(
    x: BFloat16[Array, "T D"],
    weight: BFloat16[Array, "L E D"],
    layer: Int32[Array, ""],
    choice: Choice,
    *,
    chip: Chip,
    config: TuningConfig | None = None,
    shift: int = 0,
    interpret: bool = False,
) -> Float32[Array, "S padded_T padded_E"]:
    """Sums of products, of each chunk of D or of all in order; what lies past E, or T, is undefined.

    Raises:
      NotImplementedError: D is no multiple of 256, E none of 8, or k is over 64.
      ValueError: more picks than experts.
    """
    cut = cut_of(len(x), x.shape[1], choice, chip, config)

    def router_products(*refs: Any, **scratch: Any) -> None:
        place = tuple(lax.axis_index(name) for name in ("tokens", "experts", "part"))
        *inputs, out_ref = refs
        sums = sum_part(cut, place, inputs, shift, scratch, interpret=interpret)
        scratch["staged"][...] = sums
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch["staged"], out_ref.at[cut.part_of(place)])
        plgpu.wait_smem_to_gmem(0)

    return launch_order.kernel(
        router_products,
        out_type=cut.products_type(),
        scratch_types=product_scratch(cut),
        grid=cut.grid,
        grid_names=("tokens", "experts", "part"),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        waits=False,
        kernel_name="router_products",
    )(whole_eights(x), weight, layer.reshape(1))


def whole_eights(x: BFloat16[Array, "T D"]) -> BFloat16[Array, "padded_T D"]:
    """TMA counts rows by eights, as it does for the FP8 products, but where they are few."""
    return jnp.pad(x, ((0, -len(x) % 8), (0, 0))) if len(x) > 8 and len(x) % 8 else x


class Cut(NamedTuple):
    """What the products of a step are made of, and how CTAs share them.

    Attributes:
      rows: tokens of a tile.
    """

    config: TuningConfig
    num_tokens: int
    width: int
    num_experts: int
    padded_experts: int
    rows: int
    is_sm100: bool

    @property
    def chunks_per_cta(self) -> int:
        """Chunks of D."""
        return 1 if self.config.is_split else self.width // _CHUNK

    @property
    def stages(self) -> int:
        """Steps in flight."""
        return min(self.config.stages, self.chunks_per_cta * _STEPS_PER_CHUNK)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tiles of tokens, tiles of experts, parts of D."""
        experts = pl.cdiv(self.num_experts, self.config.experts)
        parts = num_chunks(self.width) // self.chunks_per_cta
        return pl.cdiv(self.num_tokens, self.rows), experts, parts

    def part_of(self, place: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a CTA makes of the products."""
        token, expert, part = place[0] * self.rows, place[1] * self.config.experts, place[2]
        return part, pl.ds(token, self.rows), pl.ds(expert, self.config.experts)

    @property
    def shared_memory(self) -> int:
        """Bytes of sum_scratch, barriers aside."""
        return self.stages * (self.rows + self.config.experts) * _STEP * 2

    def products_type(self) -> jax.ShapeDtypeStruct:
        """Of the products of each part."""
        shape = self.grid[2], self.num_tokens, self.padded_experts
        return jax.ShapeDtypeStruct(shape, jnp.float32)


def num_chunks(width: int) -> int:
    """Of D: as many parts the products of few tokens have."""
    return pl.cdiv(width, _CHUNK)


def cut_of(
    num_tokens: int, width: int, choice: Choice, chip: Chip, config: TuningConfig | None = None
) -> Cut:
    """How the products of so many tokens are cut; see multiply."""
    num_experts, num_picks = choice.num_experts, choice.num_picks
    if width % _CHUNK or num_experts % 8 or not 1 <= num_picks <= 64:
        raise NotImplementedError(
            f"{width=}, {num_experts=}, {num_picks=}: D must be a multiple of {_CHUNK}, E of 8, k at "
            "most 64"
        )
    if num_picks > num_experts:
        raise ValueError(f"num_experts_per_tok={num_picks} of {num_experts=}")
    num_tokens += -num_tokens % 8 if num_tokens > 8 else 0
    config = config or default_config(chip, num_tokens, num_experts)
    is_sm100 = chip.architecture == "sm100"
    padded_experts, rows = choice.padded_experts, tile_rows(chip)
    return Cut(config, num_tokens, width, num_experts, padded_experts, rows, is_sm100)


def tile_rows(chip: Chip) -> int:
    """Tokens of a tile: what an instruction takes."""
    return 128 if chip.architecture == "sm100" else 64


def sum_part(
    cut: Cut,
    place: tuple[Any, ...],
    refs: Sequence[Any],
    shift: int,
    scratch: dict[str, Any],
    *,
    interpret: bool = False,
) -> jax.Array:
    """A CTA's sums of products, in registers; its weights do not wait for the kernel ahead.

    Args:
      place: within the cut's grid.
      refs: of tokens, weights and layer, which the kernel right ahead does not write.
    """
    x_ref, weight_ref, layer_ref = refs
    config, full = cut.config, scratch["full"]
    num_steps, stages = cut.chunks_per_cta * _STEPS_PER_CHUNK, cut.stages
    token, expert, part = place[0] * cut.rows, place[1] * config.experts, place[2]
    layer_index = layer_ref[0] + shift

    def fetch(step: jax.Array | int, *, is_weights: bool) -> None:
        stage = lax.rem(jnp.int32(step), jnp.int32(stages))
        columns = pl.ds((part * num_steps + step) * _STEP, _STEP)
        if is_weights:
            source = weight_ref.at[layer_index, pl.ds(expert, config.experts), columns]
        else:
            source = x_ref.at[pl.ds(token, cut.rows), columns]
        target = scratch["weights" if is_weights else "tokens"].at[stage]
        plgpu.copy_gmem_to_smem(source, target, full.at[stage])

    def refill(step: jax.Array) -> None:
        @pl.when(step + stages < num_steps)
        def _():
            fetch(step + stages, is_weights=False)
            fetch(step + stages, is_weights=True)

    def sum_chunk(chunk: jax.Array, total: jax.Array) -> jax.Array:
        steps = [chunk * _STEPS_PER_CHUNK + index for index in range(_STEPS_PER_CHUNK)]
        products = _multiply_sm100 if cut.is_sm100 else _multiply_sm90
        return total + products(steps, stages, refill, scratch)

    for step in range(stages):
        fetch(step, is_weights=True)
    launch_order.wait(interpret=interpret)
    for step in range(stages):
        fetch(step, is_weights=False)
    layout = plgpu.Layout.TCGEN05 if cut.is_sm100 else plgpu.Layout.WGMMA
    zeros = plgpu.layout_cast(jnp.zeros((cut.rows, config.experts), jnp.float32), layout)
    return lax.fori_loop(0, cut.chunks_per_cta, sum_chunk, zeros)


def product_scratch(cut: Cut) -> dict[str, Any]:
    """The memory of router_products."""
    staged = _tiled((cut.rows, cut.config.experts), jnp.float32, 16)
    return sum_scratch(cut) | {"staged": staged}


def sum_scratch(cut: Cut) -> dict[str, Any]:
    """The memory of sum_part."""
    experts, stages = cut.config.experts, cut.stages
    scratch: dict[str, Any] = {
        "tokens": _tiled((stages, cut.rows, _STEP), jnp.bfloat16, _STEP),
        "weights": _tiled((stages, experts, _STEP), jnp.bfloat16, _STEP),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    if cut.is_sm100:
        scratch["sums"] = plgpu.TMEM((cut.rows, experts), jnp.float32)
        scratch["done"] = plgpu.Barrier(orders_tensor_core=True)
    return scratch


def _tiled(shape: tuple[int, ...], dtype: Any, columns: int) -> Any:
    """Shared memory as TMA and the tensor cores like it: tiles of 8 rows, swizzled."""
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(  # pyright: ignore[reportAbstractUsage]
        columns * jnp.dtype(dtype).itemsize
    )
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _multiply_sm90(
    steps: list[jax.Array], stages: int, refill: Callable[[jax.Array], None], scratch: Any
) -> jax.Array:
    """One chunk's products by wgmma, in registers."""

    def multiply(sums: Any) -> jax.Array:
        for step in steps:
            stage = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(scratch["full"].at[stage])
            weights = scratch["weights"].at[stage].transpose((1, 0))
            plgpu.wgmma(sums, scratch["tokens"].at[stage], weights)
            plgpu.wgmma_wait(0)
            refill(step)
        return sums[...]

    shape = (scratch["tokens"].shape[1], scratch["weights"].shape[1])
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _multiply_sm100(
    steps: list[jax.Array], stages: int, refill: Callable[[jax.Array], None], scratch: Any
) -> jax.Array:
    """One chunk's products by tcgen05, through tensor memory."""
    sums, done = scratch["sums"], scratch["done"]
    for index, step in enumerate(steps):
        stage = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(scratch["full"].at[stage])
        weights = scratch["weights"].at[stage].transpose((1, 0))
        plgpu.tcgen05_mma(sums, scratch["tokens"].at[stage], weights, done, accumulate=index > 0)
        plgpu.barrier_wait(done)
        refill(step)
    products = plgpu.async_load_tmem(sums)
    plgpu.wait_load_tmem()
    return products


def _pick(
    products: Float32[Array, "S padded_T padded_E"],
    num_tokens: int,
    bias: Float32[Array, "L E"],
    layer: Int32[Array, ""],
    choice: Choice,
    shift: int,
    interpret: bool,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Sums, scores and ranks, one token to a warpgroup."""

    def router_picks(*refs: Any, **scratch: Any) -> None:
        products_ref, bias_ref, layer_ref, experts_ref, weights_ref = refs
        fetch_biases(bias_ref.at[layer_ref[0] + shift], choice, scratch)
        token = lax.axis_index("token")
        pick(products_ref, token, choice, scratch, experts_ref, weights_ref)

    experts, weights = launch_order.kernel(
        router_picks,
        out_type=pick_types(num_tokens, choice),
        scratch_types=pick_scratch(choice),
        grid=(num_tokens,),
        grid_names=("token",),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="router_picks",
    )(products, bias, layer.reshape(1))
    return experts[:, : choice.num_picks], weights[:, : choice.num_picks]


def pick_types(num_tokens: int, choice: Choice) -> list[jax.ShapeDtypeStruct]:
    """The outputs that pick writes."""
    shape = (num_tokens, choice.padded_picks)
    return [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)]


def pick_scratch(choice: Choice) -> dict[str, Any]:
    """The shared memory of fetch_biases and pick."""
    per_expert = plgpu.SMEM((choice.padded_experts,), jnp.float32)
    return {
        **dict.fromkeys(("keys", "scores", "biases"), per_expert),
        "picked": plgpu.SMEM((choice.padded_picks,), jnp.int32),
        "shares": plgpu.SMEM((choice.padded_picks,), jnp.float32),
        "biases_full": plgpu.Barrier(),
    }


def fetch_biases(bias_ref: Any, choice: Choice, scratch: dict[str, Any]) -> None:
    """Copies a layer's biases to shared memory, for all tokens that the CTA picks for."""
    biases, full = scratch["biases"], scratch["biases_full"]
    plgpu.copy_gmem_to_smem(bias_ref, biases.at[pl.ds(0, choice.num_experts)], full)
    plgpu.barrier_wait(full)


def pick(
    products_ref: Any,
    token: jax.Array,
    choice: Choice,
    scratch: dict[str, Any],
    experts_ref: Any,
    weights_ref: Any,
) -> None:
    """Picks a token's experts, and writes them and their weights: the work of one warpgroup."""
    keys, scores, biases = (scratch[name] for name in ("keys", "scores", "biases"))
    picked, shares = scratch["picked"], scratch["shares"]
    num_experts, padded_picks = choice.num_experts, choice.padded_picks
    num_rows = -(-num_experts // _ROW_TILE) * _ROW_TILE
    strided = plgpu.Layout.WG_STRIDED((choice.padded_experts,), vec_size=1)
    whole = score(load_products(products_ref, token, pl.ds(0, choice.padded_experts)))
    scores[...] = whole
    keys[...] = whole + plgpu.layout_cast(biases[...], strided)
    plgpu.commit_smem()

    # Many tokens wait for the SM's arithmetic, of which lower tiles take less; few for the longest chain.
    height = _ROW_TILE if products_ref.shape[1] > _MOST_WAITING else num_rows
    rows = plgpu.Layout.WGMMA.reduce(1)
    shape = (height, padded_picks)
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.int32), plgpu.Layout.WGMMA)
    chosen, chosen_scores = zeros, zeros.astype(jnp.float32)
    for first in range(0, num_rows, height):
        rank = lax.broadcast_in_dim(_ranks(keys, first, height, num_experts), shape, (0,))
        expert = first + lax.broadcasted_iota(jnp.int32, shape, 0)
        is_pick = (rank == column) & (expert < num_experts)
        each = plgpu.layout_cast(scores[pl.ds(first, height)], rows)
        # Two experts have one rank only where keys are no numbers; else each of these has one addend.
        chosen = jnp.maximum(chosen, jnp.where(is_pick, expert, 0))
        chosen_scores += jnp.where(is_pick, lax.broadcast_in_dim(each, shape, (0,)), 0.0)
    picked[...] = jnp.max(chosen, axis=0)
    weights = jnp.sum(chosen_scores, axis=0)
    if choice.norm_topk_prob:
        is_asked = lax.broadcasted_iota(jnp.int32, (padded_picks,), 0) < choice.num_picks
        weights = weights / (jnp.sum(jnp.where(is_asked, weights, 0.0)) + 1e-20)
    shares[...] = weights * choice.routed_scaling_factor
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(picked, experts_ref.at[token])
    plgpu.copy_smem_to_gmem(shares, weights_ref.at[token])
    plgpu.wait_smem_to_gmem(0)


def load_products(products_ref: Any, token: jax.Array, piece: Any) -> list[jax.Array]:
    """Each chunk's products of a token and a piece of the experts, a multiple of 128."""
    strided = plgpu.Layout.WG_STRIDED((piece.size,), vec_size=1)
    chunks = range(products_ref.shape[0])
    return [plgpu.layout_cast(products_ref[chunk, token, piece], strided) for chunk in chunks]


def score(products: list[jax.Array]) -> jax.Array:
    """The sigmoid of the sum of all chunks, in order."""
    logits = functools.reduce(operator.add, products)
    return 1 / (1 + jnp.exp(-logits))


def _ranks(keys: Any, first_row: int, num_rows: int, num_experts: int) -> jax.Array:
    """How many experts come before each from first_row on: int32[num_rows].

    Of equal keys the first comes first: all columns left of these rows come before where they are equal,
    none of those right of them do, and only between is it asked which is which.
    """
    rows = plgpu.Layout.WGMMA.reduce(1)
    columns = plgpu.Layout.WGMMA.reduce(0)
    key = plgpu.layout_cast(keys[pl.ds(first_row, num_rows)], rows)
    counts: dict[int, jax.Array] = {}
    for first in range(0, num_experts, _RANKED_COLUMNS):
        count = min(_RANKED_COLUMNS, num_experts - first)
        shape = (num_rows, count)
        mine = lax.broadcast_in_dim(key, shape, (0,))
        piece = plgpu.layout_cast(keys[pl.ds(first, count)], columns)
        others = lax.broadcast_in_dim(piece, shape, (1,))
        if first + count <= first_row:
            is_before = others >= mine
        elif first >= first_row + num_rows:
            is_before = others > mine
        else:
            row = first_row + lax.broadcasted_iota(jnp.int32, shape, 0)
            is_earlier = first + lax.broadcasted_iota(jnp.int32, shape, 1) < row
            is_before = (others > mine) | ((others == mine) & is_earlier)
        before = jnp.where(is_before, 1, 0)
        # Pieces of one width are added up before their columns are.
        counts[count] = counts[count] + before if count in counts else before
    first, *others = (jnp.sum(each, axis=1) for each in counts.values())
    return sum(others, first)
