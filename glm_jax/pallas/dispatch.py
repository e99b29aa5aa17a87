"""Which rows each expert multiplies: the router's picks, sorted by the experts of this device.

Knows neither scores nor weights. Every expert's rows start at a multiple of the tile, so that a tile
of tokens meets one expert and is stored whole; rows that only fill a tile belong to nobody.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32


class Dispatch(NamedTuple):
    """Rows of this device's experts, R = tiles * tile of them.

    Attributes:
      tokens: the token of each row; 0 where a row only fills a tile.
      rows: the row of each choice of each token; R where its expert lives elsewhere.
      tile_experts: the local expert of each tile that is in use, those in use first.
      num_tiles: how many tiles are in use.
    """

    tokens: Int32[Array, " R"]
    rows: Int32[Array, "T k"]
    tile_experts: Int32[Array, " tiles"]
    num_tiles: Int32[Array, "1"]

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.tokens.shape[0] // self.tile_experts.shape[0]


def default_tile(num_tokens: int) -> int:
    """Rows of a tile: about twice an expert's share of a step, where 160 experts take 8 picks."""
    if num_tokens <= 128:
        return 16
    if num_tokens <= 512:
        return 32
    return 64 if num_tokens <= 1024 else 128


def max_tiles(num_tokens: int, num_choices: int, num_local: int, tile: int) -> int:
    """The most tiles that any picks can take: each expert with picks wastes at most tile - 1 rows."""
    picks = num_tokens * min(num_choices, num_local)
    return (picks + min(picks, num_local) * (tile - 1)) // tile


def dispatch(
    experts: Int32[Array, "T k"],
    first_expert: Int32[Array, ""],
    num_local: int,
    *,
    tile: int | None = None,
) -> Dispatch:
    """Sorts the picks that are of this device's experts, by expert and then by token.

    Args:
      experts: distinct experts for each token, of all devices.
      first_expert: the first of this device's num_local.
      tile: rows of a tile.
    """
    num_tokens, num_choices = experts.shape
    tile = tile or default_tile(num_tokens)
    tiles = max_tiles(num_tokens, num_choices, num_local, tile)
    local_experts = jnp.arange(num_local, dtype=jnp.int32)
    local = experts - first_expert
    is_local = (local >= 0) & (local < num_local)
    picked = (local[:, :, None] == local_experts[None, None]).any(1).astype(jnp.int32)
    before = jnp.cumsum(picked, axis=0) - picked
    tile_ends = jnp.cumsum(pl.cdiv(picked.sum(0), jnp.int32(tile)))
    first_rows = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_ends[:-1]]) * tile
    clipped = jnp.clip(local, 0, num_local - 1)
    rows = first_rows[clipped] + jnp.take_along_axis(before, clipped, axis=1)
    rows = jnp.where(is_local, rows, tiles * tile)
    order = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], rows.shape)
    tokens = jnp.zeros(tiles * tile, jnp.int32).at[rows].set(order, mode="drop")
    ends_passed = (jnp.arange(tiles)[:, None] >= tile_ends[None]).sum(1).astype(jnp.int32)
    tile_experts = jnp.minimum(ends_passed, num_local - 1)
    return Dispatch(tokens, rows, tile_experts, tile_ends[-1:])
