"""How an FP8 product is cut into tiles and steps.

Knows no instruction: fp8_product does what is said here.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Columns of a line: as wide as the widest swizzle that TMA and the tensor cores share.
LINE = 128
# Of the 227 KiB a CTA may have, what is left when scales and barriers have theirs.
_SHARED_MEMORY = 216 * 1024


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """How a product is cut.

    Attributes:
      tokens: tokens per tile, N of an instruction.
      rows: weight rows per warpgroup, M of an instruction.
      warpgroups: how many warpgroups share a tile's tokens, each with its own weight rows.
      stages: steps along K in flight.
      step: columns of a step. A stage costs its feeder and its readers a few hundred cycles of
        arrivals, however wide it is.
      fill: how many of a lone warpgroup's rows a tile really has; the others are never loaded nor
        stored. It gives more SMs a share of a small product.
      takes_turns: whether each of two warpgroups has tiles of its own, every other one, so that one
        multiplies while the other stores; otherwise they share the rows of every tile. Only on sm90:
        tensor memory does the same for sm100.
      store: tokens of which a warpgroup stores its products at once, by default all: what is on its way
        out takes room from stages.
      is_fed_by_warp: whether one warp feeds the ring, which arrives 64 times a copy and waits for no
        other, or a warpgroup, which arrives 128 times and meets before each. Only for sm90: on sm100 it
        is always one.
      ctas_per_sm: how many CTAs, each with so much less room, share an SM.
      last_cuts: into how many a tile of the last round may be cut, 1, 2 or 4, where CTAs would be idle then.
      is_compact: whether a stage has room for the rows of `fill` only, so that more are in flight: products
        read on into the next one, and nobody stores what comes of that. Only on sm90.
      is_stacked: whether rows of two halves, gate above up, share a warpgroup's rows, in tiles of half as
        many: finer tiles with as much in flight.
    """

    tokens: int
    rows: int
    warpgroups: int = 1
    stages: int = 6
    fill: int | None = None
    step: int = LINE
    takes_turns: bool = False
    store: int | None = None
    is_fed_by_warp: bool = False
    ctas_per_sm: int = 1
    is_stacked: bool = False
    last_cuts: int = 1
    is_compact: bool = False

    def __post_init__(self) -> None:
        if self.tokens % 8 or not 0 < self.tokens <= 256:
            raise ValueError(f"tokens={self.tokens} is no multiple of 8 up to 256")
        if self.rows not in (64, 128):
            raise ValueError(f"rows={self.rows} is not 64 or 128")
        if self.warpgroups not in (1, 2):
            raise ValueError(f"warpgroups={self.warpgroups} is not 1 or 2")
        if self.store is not None and (self.store % 8 or self.tokens % self.store):
            raise ValueError(f"store={self.store} is no multiple of 8 that divides {self.tokens}")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: a ring needs at least 2")
        if self.fill is not None and (self.fill % 8 or not 0 < self.fill <= 64):
            raise ValueError(f"fill={self.fill} is no multiple of 8 up to 64")
        if self.fill and self.warpgroups != 1:
            raise ValueError(f"fill={self.fill} is for one warpgroup alone")
        if self.is_stacked and (self.rows != 64 or self.fill != 32):
            raise ValueError(f"is_stacked is for 32 of 64 rows, {self.rows=}, {self.fill=}")
        if self.is_compact and (not self.fill or self.is_stacked or self.last_cuts > 1):
            raise ValueError(f"is_compact is for whole tiles of fewer rows, {self.fill=}")
        if self.step % LINE or not LINE <= self.step <= 8 * LINE:
            raise ValueError(f"step={self.step} is no multiple of {LINE} up to {8 * LINE}")
        if self.last_cuts not in (1, 2, 4) or (self.last_cuts > 1 and self.warpgroups != 1):
            raise ValueError(f"last_cuts={self.last_cuts} is not 1, 2 or 4 for one warpgroup")
        if self.last_cuts > 1 and self.tile_rows % (16 * self.last_cuts):
            raise ValueError(f"{self.tile_rows} rows are not {self.last_cuts} multiples of 16")
        if self.takes_turns and self.warpgroups != 2:
            raise ValueError("takes_turns is for two warpgroups")

    @property
    def tile_rows(self) -> int:
        """Weight rows of a tile."""
        return self.fill or self.cta_rows

    @property
    def cuts(self) -> list[int]:
        """Into how many tiles may be cut: mostly into one."""
        return [cuts for cuts in (1, 2, 4) if cuts <= self.last_cuts]

    @property
    def cta_rows(self) -> int:
        """Weight rows that a stage has room for."""
        return self.rows if self.takes_turns else self.rows * self.warpgroups

    def first_row(self, warpgroup: jax.Array) -> jax.Array:
        """Where in a stage the rows of a warpgroup begin."""
        return jnp.int32(0) if self.takes_turns else warpgroup * self.rows

    @property
    def store_tokens(self) -> int:
        """Tokens of which a warpgroup stores its products at once."""
        return self.store or self.tokens

    @property
    def store_rows(self) -> int:
        """Weight rows that one warpgroup stores."""
        return self.fill or self.rows


def fitting_stages(
    tokens: int,
    rows: int,
    *,
    halves: int = 1,
    step: int = LINE,
    num_staged: int = 1,
    store: int | None = None,
    ctas_per_sm: int = 1,
    fill: int | None = None,
) -> int:
    """How many stages a tile of so many tokens and weight rows leaves room for, 16 at most.

    Args:
      num_staged: tiles whose products may be on their way out.
      store, ctas_per_sm: as TuningConfig has them.
      fill: the same, of a compact ring.
    """
    staged = num_staged * (store or tokens) * rows * 2
    room = _SHARED_MEMORY // ctas_per_sm - staged
    if fill:
        # The last stage's products read on, too. A KiB less is left over: few tokens have few scales.
        room, rows = room + 1024 - (rows - fill) * step, fill
    return min(16, room // ((halves * rows + tokens) * step))
