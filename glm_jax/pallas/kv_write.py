"""From the QKV projection to the KV cache: head norms, rotary, and the write, in one kernel.

Knows neither weights nor who owns a page.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from glm_jax.pallas.chip import Chip

HEAD_DIM = 128
_FP8_MAX = 448.0
# A warp takes a head at a time, its lanes 32 neighbors: partners of the rotation, half a rotary width
# apart, then sit in one thread, and a head's norm is a sum over the lanes.
_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
# Tiles that leave memory in its order. Left to choose, the compiler takes swizzled ones of fewer than 8
# rows, and then misreads their columns (jax 0.11.2 on an H100, 2026-11-24).
_IN_ORDER = (plgpu.TilingTransform((1, 32)),)  # pyright: ignore[reportAbstractUsage]


def rotary_table(
    positions: Int32[Array, "B T"], rotary_dim: int, theta: float
) -> BFloat16[Array, "B T 2 half"]:
    """Cosines, then sines, of each position's angles, rounded as layers.rotate rounds them."""
    half = rotary_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape(1, 1, half)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=2).astype(jnp.bfloat16)


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


def write[Pages: (jax.Array, jax.Ref)](
    qkv: BFloat16[Array, "B T K heads H"],
    q_norm: BFloat16[Array, "L H"] | None,
    k_norm: BFloat16[Array, "L H"] | None,
    positions: Int32[Array, "B T"],
    page_table: Int32[Array, "B P"],
    layer: Int32[Array, ""] | int,
    k_pages: Pages,
    v_pages: Pages,
    *,
    eps: float,
    rotary_dim: int,
    theta: float,
    chip: Chip,
    table: BFloat16[Array, "B T 2 half"] | None = None,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "B T K G H"], Pages, Pages]:
    """Norms and rotates queries and keys, and stores keys and values at each row's positions.

    The pages, [L, pages, K, page_size, H], may be arrays, whose successors come back, or Refs, which
    are written and come back themselves. Either way the kernel writes in place. Position -1 stores
    nothing. FP8 pages have scale 1: what lies beyond +-448 is clamped.

    The heads of `qkv` are the G queries, then the key, then the value. What comes back for a query at
    position -1 is of no use. Sines and cosines depend on positions alone, so they are XLA's, outside
    of the kernel: `table` is what rotary_table makes, once for all layers of a step.

    Raises:
      NotImplementedError: the head is not 128 wide, or half of the rotary width no multiple of 32.
      ValueError: only one of the norms is given.
    """
    head_dim = qkv.shape[-1]
    if head_dim != HEAD_DIM or rotary_dim % 64 or not 0 < rotary_dim <= HEAD_DIM:
        raise NotImplementedError(
            f"{head_dim=}, {rotary_dim=}: heads are {HEAD_DIM} wide, rotary widths 64 or {HEAD_DIM}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm come together")
    del chip  # The same instructions on all of them.
    norms = () if q_norm is None else (q_norm, k_norm)
    cache = k_pages.dtype, k_pages.shape[3]
    kernel = _kernel(qkv.shape, *cache, rotary_dim, eps, bool(norms), interpret)
    if table is None:
        table = rotary_table(positions, rotary_dim, theta)
    layers = jnp.asarray(layer, jnp.int32).reshape(1)
    operands = (qkv, table, positions.reshape(-1), page_table, layers)
    if isinstance(k_pages, jax.Array):
        k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
        q = kernel(*operands, k_ref, v_ref, *norms)
        return q, jax.freeze(k_ref), jax.freeze(v_ref)
    return kernel(*operands, k_pages, v_pages, *norms), k_pages, v_pages


def _kernel(qkv_shape, cache_dtype, page_size, rotary_dim, eps, has_norms, interpret):
    num_rows, num_tokens, kv_heads, num_heads, _ = qkv_shape
    query_groups = num_heads - 2
    padded_heads = pl.cdiv(num_heads, 4) * 4
    half = rotary_dim // 2
    # Pieces of a head: the two that turn into each other, then what passes through.
    pieces = [pl.ds(0, half), pl.ds(half, half)]
    if rotary_dim < HEAD_DIM:
        pieces.append(pl.ds(rotary_dim, HEAD_DIM - rotary_dim))

    def body(
        qkv_gmem, table_gmem, positions_gmem, page_table_gmem, layer_gmem, k_gmem, v_gmem, *rest
    ):
        *norm_gmem, q_gmem, heads_smem, out_smem, cache_smem, barrier = rest
        token, kv_head = lax.axis_index("token"), lax.axis_index("kv_head")
        row, column = token // num_tokens, token % num_tokens
        layer = layer_gmem[0]
        plgpu.copy_gmem_to_smem(
            qkv_gmem.at[row, column, kv_head], heads_smem.at[pl.ds(0, num_heads)], barrier
        )
        cos, sin = (_vector(table_gmem.at[row, column, i]) for i in range(2))
        plgpu.barrier_wait(barrier)
        heads = [
            plgpu.load(heads_smem.at[:, piece], layout=_ROWS).astype(jnp.float32)
            for piece in pieces
        ]

        def along_heads(vector, like):
            return lax.broadcast_in_dim(vector, like.shape, [1])

        def head_of(like):
            return plgpu.broadcasted_iota(jnp.int32, like.shape, 0, layout=_ROWS)

        turned = list(heads)
        if norm_gmem:
            squares = sum((x * x).sum(axis=1) for x in heads)
            inverse = lax.rsqrt(squares / HEAD_DIM + eps)
            turned = []
            for piece, x in zip(pieces, heads, strict=True):
                q_weight, k_weight = (
                    along_heads(_vector(norm.at[layer, piece]), x) for norm in norm_gmem
                )
                weight = jnp.where(head_of(x) < query_groups, q_weight, k_weight)
                normed = _rounded(x * lax.broadcast_in_dim(inverse, x.shape, [0]))
                turned.append(_rounded(normed * weight))
        first, second = turned[:2]
        cos, sin = along_heads(cos, first), along_heads(sin, first)
        turned[:2] = [
            _rounded(_rounded(first * cos) - _rounded(second * sin)),
            _rounded(_rounded(second * cos) + _rounded(first * sin)),
        ]
        for piece, x, original in zip(pieces, turned, heads, strict=True):
            x = jnp.where(head_of(x) <= query_groups, x, original)
            out_smem[:, piece] = x.astype(jnp.bfloat16)
            if cache_smem is not out_smem:
                cache_smem[:, piece] = jnp.clip(x, -_FP8_MAX, _FP8_MAX).astype(cache_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            out_smem.at[pl.ds(0, query_groups)], q_gmem.at[row, column, kv_head]
        )
        position = positions_gmem[token]

        @pl.when(position >= 0)
        def _store():
            page = page_table_gmem[row, position // page_size]
            place = (layer, page, kv_head, pl.ds(position % page_size, 1))
            for head, pages in (query_groups, k_gmem), (query_groups + 1, v_gmem):
                plgpu.copy_smem_to_gmem(cache_smem.at[pl.ds(head, 1)], pages.at[place])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    is_fp8 = cache_dtype != jnp.bfloat16
    tile = (padded_heads, HEAD_DIM)

    def body_with_cache(*refs):
        *rest, heads_smem, out_smem, cache_smem, barrier = refs
        body(*rest, heads_smem, out_smem, cache_smem if is_fp8 else out_smem, barrier)

    return plgpu.kernel(
        body_with_cache,
        out_type=jax.ShapeDtypeStruct(
            (num_rows, num_tokens, kv_heads, query_groups, HEAD_DIM), jnp.bfloat16
        ),
        grid=(num_rows * num_tokens, kv_heads),
        grid_names=("token", "kv_head"),
        scratch_types=(
            plgpu.SMEM(tile, jnp.bfloat16, transforms=_IN_ORDER),
            plgpu.SMEM(tile, jnp.bfloat16, transforms=_IN_ORDER),
            plgpu.SMEM(tile if is_fp8 else (1, 32), cache_dtype, transforms=_IN_ORDER),
            plgpu.Barrier(),
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="kv_write",
    )
