"""A token's heads as the projection made them: norms and rotary, from shared memory to shared memory.

Knows neither pages nor who asks. The same code, and so the same bits, for a kernel that only writes keys
and values and for one that attends too.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

HEAD_DIM = 128
_FP8_MAX = 448.0
_WARPS = 4
# A warp takes a head at a time, its lanes 32 neighbors: partners of the rotation, half a rotary width
# apart, then sit in one thread, and a head's norm is a sum over the lanes.
_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
# Tiles that leave memory in its order. Left to choose, the compiler takes swizzled ones of fewer than 8
# rows, and then misreads their columns (jax 0.11.2 on an H100, 2026-11-24).
_IN_ORDER = (plgpu.TilingTransform((1, 32)),)  # pyright: ignore[reportAbstractUsage]


class Scratch(NamedTuple):
    """Shared memory: heads as they come, as they leave, and as the cache keeps them."""

    heads: Any
    turned: Any
    kept: Any


class Turning(NamedTuple):
    """Cosines and sines [half], and the norms' weights of each piece of a head."""

    cos: Array
    sin: Array
    weights: list[list[Array]]


@dataclass(frozen=True, slots=True)
class TokenHeads:
    """What is made of a token's heads of one KV head: the queries, then the key, then the value.

    Attributes:
      query_groups: queries.
      rotary_dim: leading elements of a query and of the key that are rotated.
      eps: of the norms.
      cache_dtype: bfloat16, or FP8 of scale 1.
      least_rows: rows that shared memory has at least, be they heads or not.
    """

    query_groups: int
    rotary_dim: int
    eps: float
    cache_dtype: Any
    least_rows: int = 0

    @property
    def num_heads(self) -> int:
        return self.query_groups + 2

    def scratch_types(self) -> Scratch:
        tile = (max(pl.cdiv(self.num_heads, _WARPS) * _WARPS, self.least_rows), HEAD_DIM)
        kept = tile if self._is_fp8 else (1, 32)
        return Scratch(
            plgpu.SMEM(tile, jnp.bfloat16, transforms=_IN_ORDER),
            plgpu.SMEM(tile, jnp.bfloat16, transforms=_IN_ORDER),
            plgpu.SMEM(kept, self.cache_dtype, transforms=_IN_ORDER),
        )

    def fetch(self, token: Any, scratch: Scratch, barrier: Any) -> None:
        """Copies a token's heads, a ref of [heads, HEAD_DIM]."""
        plgpu.copy_gmem_to_smem(token, scratch.heads.at[pl.ds(0, self.num_heads)], barrier)

    def load(self, angles: Any, norms: tuple[Any, ...], layer: Array) -> Turning:
        """What turning takes beside heads.

        Args:
          angles: ref of [2, half], cosines and sines.
          norms: none, or refs of [L, HEAD_DIM] for queries and keys.
        """
        cos, sin = (_vector(angles.at[i]) for i in range(2))
        weights = [[_vector(norm.at[layer, piece]) for norm in norms] for piece in self._pieces]
        return Turning(cos, sin, weights)

    def turn_queries(self, by: Turning, scratch: Scratch) -> None:
        """Norms and rotates queries. Whoever reads scratch commits it first."""
        rows = pl.ds(0, pl.cdiv(self.query_groups, _WARPS) * _WARPS)
        for piece, x in zip(self._pieces, self._turned(by, scratch, rows), strict=True):
            scratch.turned[rows, piece] = x.astype(jnp.bfloat16)

    def turn_key(self, by: Turning, scratch: Scratch) -> None:
        """The key likewise, and the value as it is, both as the cache keeps them."""
        first = self.query_groups // _WARPS * _WARPS
        rows = pl.ds(first, pl.cdiv(self.num_heads, _WARPS) * _WARPS - first)
        for piece, x in zip(self._pieces, self._turned(by, scratch, rows), strict=True):
            if self._is_fp8:
                kept = jnp.clip(x, -_FP8_MAX, _FP8_MAX).astype(self.cache_dtype)
                scratch.kept[rows, piece] = kept
            else:
                scratch.turned[rows, piece] = x.astype(jnp.bfloat16)

    def _turned(self, by: Turning, scratch: Scratch, rows: Any) -> list[Array]:
        """Pieces of some rows' heads."""
        heads = [
            plgpu.load(scratch.heads.at[rows, piece], layout=_ROWS).astype(jnp.float32)
            for piece in self._pieces
        ]
        turned = list(heads)
        if by.weights[0]:
            squares = sum((x * x).sum(axis=1) for x in heads)
            inverse = lax.rsqrt(squares / HEAD_DIM + self.eps)
            turned = []
            for of_piece, x in zip(by.weights, heads, strict=True):
                q_weight, k_weight = (_along_heads(weight, x) for weight in of_piece)
                weight = jnp.where(_head_of(x, rows) < self.query_groups, q_weight, k_weight)
                normed = _rounded(x * lax.broadcast_in_dim(inverse, x.shape, [0]))
                turned.append(_rounded(normed * weight))
        first, second = turned[:2]
        cos, sin = _along_heads(by.cos, first), _along_heads(by.sin, first)
        turned[:2] = [
            _rounded(_rounded(first * cos) - _rounded(second * sin)),
            _rounded(_rounded(second * cos) + _rounded(first * sin)),
        ]
        return [
            jnp.where(_head_of(x, rows) <= self.query_groups, x, original)
            for x, original in zip(turned, heads, strict=True)
        ]

    def store(self, scratch: Scratch, k_place: Any, v_place: Any) -> None:
        """Starts copying key and value, refs of [1, HEAD_DIM], once scratch is committed."""
        kept = scratch.kept if self._is_fp8 else scratch.turned
        for head, place in enumerate((k_place, v_place), self.query_groups):
            plgpu.copy_smem_to_gmem(kept.at[pl.ds(head, 1)], place)

    @property
    def _pieces(self) -> list[Any]:
        """Pieces of a head: the two that turn into each other, then what passes through."""
        half, rest = self.rotary_dim // 2, HEAD_DIM - self.rotary_dim
        pieces = [pl.ds(0, half), pl.ds(half, half)]
        return [*pieces, pl.ds(self.rotary_dim, rest)] if rest else pieces

    @property
    def _is_fp8(self) -> bool:
        return self.cache_dtype != jnp.bfloat16


def _rounded(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """x rounded to bfloat16, to nearest even, in whole numbers.

    Rounded by conversions, a product and the sum that takes it become one fused multiply-add, which
    rounds once where the model rounds twice.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return lax.bitcast_convert_type(bits & -0x10000, jnp.float32)


def _vector(gmem: Any) -> Array:
    # Shorter than a cache line, which the compiler wants to be told that we know.
    return plgpu.load(gmem, optimized=False).astype(jnp.float32)


def _along_heads(vector: Array, like: Array) -> Array:
    return lax.broadcast_in_dim(vector, like.shape, [1])


def _head_of(like: Array, rows: Any) -> Array:
    return rows.start + plgpu.broadcasted_iota(jnp.int32, like.shape, 0, layout=_ROWS)
