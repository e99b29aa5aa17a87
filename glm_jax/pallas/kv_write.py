"""From the QKV projection to the KV cache: head norms, rotary, and the write, in one kernel.

Knows neither weights nor who owns a page.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int32

from glm_jax.pallas import launch_order
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.token_heads import HEAD_DIM, Scratch, TokenHeads

__all__ = ["HEAD_DIM", "rotary_table", "write"]


def rotary_table(
    positions: Int32[Array, "B T"], rotary_dim: int, theta: float
) -> BFloat16[Array, "B T 2 half"]:
    """Cosines, then sines, of each position's angles, rounded as layers.rotate rounds them."""
    half = rotary_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape(1, 1, half)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=2).astype(jnp.bfloat16)


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
    of_token = TokenHeads(num_heads - 2, rotary_dim, eps, cache_dtype)
    query_groups, num_norms = of_token.query_groups, 2 if has_norms else 0

    def body(
        qkv_gmem, table_gmem, positions_gmem, page_table_gmem, layer_gmem, k_gmem, v_gmem, *rest
    ):
        norms, (q_gmem, *scratch, barrier) = rest[:num_norms], rest[num_norms:]
        scratch = Scratch(*scratch)
        token, kv_head = lax.axis_index("token"), lax.axis_index("kv_head")
        row, column = token // num_tokens, token % num_tokens
        layer = layer_gmem[0]
        of_token.fetch(qkv_gmem.at[row, column, kv_head], scratch, barrier)
        turning = of_token.load(table_gmem.at[row, column], norms, layer)
        # Beside the copy: one load tells where the other is.
        position = positions_gmem[token]
        page = page_table_gmem[row, jnp.maximum(position, 0) // page_size]
        plgpu.barrier_wait(barrier)
        of_token.turn_queries(turning, scratch)
        of_token.turn_key(turning, scratch)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            scratch.turned.at[pl.ds(0, query_groups)], q_gmem.at[row, column, kv_head]
        )

        @pl.when(position >= 0)
        def _store():
            place = (layer, page, kv_head, pl.ds(position % page_size, 1))
            of_token.store(scratch, k_gmem.at[place], v_gmem.at[place])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return launch_order.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (num_rows, num_tokens, kv_heads, query_groups, HEAD_DIM), jnp.bfloat16
        ),
        grid=(num_rows * num_tokens, kv_heads),
        grid_names=("token", "kv_head"),
        scratch_types=(*of_token.scratch_types(), plgpu.Barrier()),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="kv_write",
    )
