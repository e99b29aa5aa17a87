"""How a decode step's attention is cut, and what one cut says of its keys to be added to others.

Knows no loads of pages. A row's positions are cut at fixed places into leaves. The answer over a leaf is
summed up by itself; those of a split's leaves are folded in their order, then those of a row's splits.
That tree is part of the answer. Which CTA walks which part of it is not: a CTA takes a leaf, a split or two
splits by the row's own length and by how many rows there are, and leaves the same partial answers.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.pallas.warp_products import ROWS, WARP_ROWS

HEAD_DIM = 128
FP8 = jnp.float8_e4m3fn
# Scores are made powers of two.
SCALE = HEAD_DIM**-0.5 * math.log2(math.e)
# Below any score. A maximum that starts here, not at -inf, never makes a difference of infinities.
LOWEST = -1e30
# Of answers of whole rows: a warp takes a row at a time.
WHOLE_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, HEAD_DIM), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)

# A softmax over some keys: float32 maxima [rows], sums of shares [rows], answers [rows, HEAD_DIM].
Answers = tuple[Array, Array, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
      leaf_size: positions that are summed up by themselves. Part of the answer: it decides the order of
        sums.
      split_size: positions whose leaves are folded first. Part of the answer too.
      tile_size: keys per step of a CTA. Part of the answer too.
      stages: tiles of keys and values in shared memory at a time.
      leaf_rows: rows times KV heads of a step up to which a CTA may take a leaf.
      leaf_to: leaves of a batch of rows as long as a CTA's own up to which it does: so few would leave
        multiprocessors idle, and a leaf alone is done the sooner.
      pair_from: splits of such a batch from which a CTA takes two of them, one after the other: so
        many keep every multiprocessor busy, and a second split's first tiles come while the first one
        is finished.
      alone_to: tokens times KV heads of a step up to which tokens of one row are in CTAs of their own:
        two in one CTA take longer than one, which counts until the memory does.
    """

    leaf_size: int = 512
    split_size: int = 1024
    tile_size: int = 128
    stages: int = 2
    leaf_rows: int = 16
    leaf_to: int = 128
    pair_from: int = 384
    alone_to: int = 64

    def __post_init__(self) -> None:
        if self.tile_size % 64:
            raise ValueError(f"{self.tile_size=} must be a multiple of 64")
        if self.leaf_size % self.tile_size:
            raise ValueError(f"{self.leaf_size=} must be a multiple of {self.tile_size=}")
        if self.split_size % self.leaf_size:
            raise ValueError(f"{self.split_size=} must be a multiple of {self.leaf_size=}")
        if self.stages < 2:
            raise ValueError(f"{self.stages=} must be at least 2")

    @property
    def leaves_per_split(self) -> int:
        return self.split_size // self.leaf_size


@dataclass(frozen=True, slots=True)
class Cut:
    """A step's shapes and its config.

    A row here is what a CTA takes of a sequence's tokens: one, or two that meet each key as it comes by.
    They are apart in all but that, so that a token's answer does not depend on who is beside it.

    Attributes:
      sequences: of the batch; each has a row of the page table.
      sequence_tokens: queries of each, for every head.
      num_tokens: of a row.
    """

    sequences: int
    sequence_tokens: int
    num_tokens: int
    kv_heads: int
    query_groups: int
    page_size: int
    pages_per_sequence: int
    cache_dtype: Any
    config: TuningConfig

    @property
    def rows_per_sequence(self) -> int:
        return pl.cdiv(self.sequence_tokens, self.num_tokens)

    @property
    def num_rows(self) -> int:
        return self.sequences * self.rows_per_sequence

    def sequence_of(self, row: Array) -> Array:
        """Whose tokens a row's are."""
        return row if self.rows_per_sequence == 1 else row // self.rows_per_sequence

    def token_of(self, row: Array, index: int) -> Array | int:
        """Which of its sequence's tokens a row's is. What is left over is the last one again."""
        if self.rows_per_sequence == 1:
            return index
        first = row % self.rows_per_sequence * self.num_tokens
        return jnp.minimum(first + index, self.sequence_tokens - 1)

    def place_of(self, row: Array, kv_head: Array) -> Array:
        """A row's KV head among all."""
        return row * self.kv_heads + kv_head

    @property
    def token_rows(self) -> int:
        """Rows that are read for one token's queries: they are read in fours."""
        return pl.cdiv(self.query_groups, 4) * 4

    @property
    def stored_rows(self) -> int:
        """Rows of a partial answer, those of one token after the other's."""
        return self.num_tokens * self.token_rows

    def rows_of(self, token: int) -> Any:
        """Where a partial answer has a token's."""
        return pl.ds(token * self.token_rows, self.token_rows)

    @property
    def takes_leaves(self) -> bool:
        """Whether a CTA may take a leaf."""
        config = self.config
        is_few = self.num_rows * self.kv_heads <= config.leaf_rows
        return is_few and config.leaves_per_split > 1

    @property
    def num_parts(self) -> int:
        """The most CTAs, and partial answers, that a row can have."""
        least = self.config.leaf_size if self.takes_leaves else self.config.split_size
        return pl.cdiv(self.pages_per_sequence * self.page_size, least)

    @property
    def spans(self) -> list[int]:
        """Positions that a CTA may take, in the order of choose."""
        split = self.config.split_size
        return [split, 2 * split, *([self.config.leaf_size] if self.takes_leaves else [])]

    def choose(self, last: Array, values: Any) -> Any:
        """The value for a row whose last position is `last`, of those for each of spans."""
        config, batch = self.config, self.num_rows * self.kv_heads
        one, two, *leaf = values
        num_splits = (last + config.split_size) // config.split_size
        chosen = jnp.where(num_splits * batch >= config.pair_from, two, one)
        return jnp.where(self.is_in_leaves(last), leaf[0], chosen) if leaf else chosen

    def is_in_leaves(self, last: Array) -> Array:
        """Whether such a row's CTAs take leaves, where takes_leaves says that they may."""
        config, batch = self.config, self.num_rows * self.kv_heads
        return (last + config.leaf_size) // config.leaf_size * batch <= config.leaf_to

    def num_ctas(self, last: Array) -> Array:
        """CTAs of such a row, at least one."""
        return jnp.maximum(self.choose(last, [(last + size) // size for size in self.spans]), 1)


def cut_of(
    q_shape: tuple[int, ...],
    k_pages: Any,
    pages_per_sequence: int,
    config: TuningConfig | None = None,
) -> Cut:
    """How attention of queries [B, T, K, G, H] to such pages is cut.

    Raises:
      NotImplementedError: as decode_attention.attend.
    """
    sequences, tokens, kv_heads, query_groups, head_dim = q_shape
    page_size, cache_dtype = k_pages.shape[3], jnp.dtype(k_pages.dtype)
    # Twice the bytes, or four times the scores, of what is best otherwise.
    is_wide = cache_dtype != FP8 or query_groups > 2 * WARP_ROWS
    config = config or (TuningConfig(tile_size=64) if is_wide else TuningConfig())
    if head_dim != HEAD_DIM:
        raise NotImplementedError(f"{head_dim=}: heads are {HEAD_DIM} wide")
    if config.tile_size % page_size or page_size % 8:
        raise NotImplementedError(f"{page_size=}: tiles of {config.tile_size=} are whole pages")
    if query_groups > ROWS:
        raise NotImplementedError(f"{query_groups=}: at most {ROWS} queries share a KV head")
    if cache_dtype not in (jnp.bfloat16, FP8):
        raise NotImplementedError(f"{cache_dtype=}: pages are bfloat16 or FP8")
    is_alone = tokens == 1 or sequences * tokens * kv_heads <= config.alone_to
    return Cut(
        sequences, tokens, 1 if is_alone else 2, kv_heads, query_groups, page_size, pages_per_sequence,
        cache_dtype, config,
    )  # fmt: skip


def fold(carry: Answers, more: Answers) -> Answers:
    """Adds a softmax over some keys to that over the keys before them."""
    (largest, total, out), (more_largest, more_total, more_out) = carry, more
    new_largest = jnp.maximum(largest, more_largest)
    # One of the two stays as it is: an exponential for both.
    is_less = largest < more_largest
    less = jnp.exp2(jnp.minimum(largest, more_largest) - new_largest)
    fade, share = jnp.where(is_less, less, 1.0), jnp.where(is_less, 1.0, less)
    out = out * lax.broadcast_in_dim(fade, out.shape, [0])
    out = out + more_out * lax.broadcast_in_dim(share, out.shape, [0])
    return new_largest, total * fade + more_total * share, out


def nothing(rows: int, layout: Any, row_layout: Any) -> Answers:
    """The softmax over no keys."""
    return (
        plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), row_layout),
        plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), row_layout),
        plgpu.layout_cast(jnp.zeros((rows, HEAD_DIM), jnp.float32), layout),
    )


def nothing_of_rows(rows: int) -> Answers:
    """The same in WHOLE_ROWS."""
    return nothing(rows, WHOLE_ROWS, WHOLE_ROWS.reduce(1))


def where_below(number: Any, limit: Any, answers: Answers) -> Answers:
    """Answers in WHOLE_ROWS if number < limit, else those over no keys, whatever stands there."""
    largest, total, out = answers
    is_row_there, is_there = (jnp.full(x.shape, number, jnp.int32) < limit for x in (total, out))
    return (
        jnp.where(is_row_there, largest, LOWEST),
        jnp.where(is_row_there, total, 0.0),
        jnp.where(is_there, out, 0.0),
    )


def memory_types(*shape: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of Answers of [shape] rows: [..., 2, rows] of maxima and sums, and answers [..., rows, HEAD_DIM]."""
    *places, rows = shape
    kinds = (*places, 2, rows), (*shape, HEAD_DIM)
    return tuple(jax.ShapeDtypeStruct(kind, jnp.float32) for kind in kinds)


def load(refs: Any, rows: Any, place: tuple[Any, ...] = ()) -> Answers:
    """Answers in WHOLE_ROWS from refs of memory_types."""
    of_rows, out = refs
    largest, total = (
        plgpu.load(of_rows.at[(*place, i, rows)], layout=WHOLE_ROWS.reduce(1), optimized=False)
        for i in range(2)
    )
    return largest, total, plgpu.load(out.at[(*place, rows)], layout=WHOLE_ROWS, optimized=False)


def store(refs: Any, answers: Answers, rows: Any, place: tuple[Any, ...] = ()) -> None:
    """The other way, in any layout."""
    (of_rows, out), (largest, total, attended) = refs, answers
    for ref, at, values in (
        (of_rows, (*place, 0, rows), largest),
        (of_rows, (*place, 1, rows), total),
        (out, (*place, rows), attended),
    ):
        put(ref, at, values)


def put(ref: Any, at: Any, values: Array) -> None:
    """Stores values in any layout at a place in memory, from registers."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref.at[at], values, optimized=False)
    else:
        # jax before 0.12 knows no such word, and stores as this says.
        ref[at] = values
