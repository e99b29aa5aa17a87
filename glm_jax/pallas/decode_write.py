"""The KV write as the beginning of decode attention: one token a row, its queries made where they are used.

Knows nothing of how parts are attended to. Every CTA of a row makes its own queries, while its first pages
come. The one whose positions end with the new token's writes its key and value, and only then copies the
tile that holds them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.pallas.token_heads import Scratch, TokenHeads, Turning

# What copies have written, other copies of this CTA read.
_BETWEEN_COPIES = "fence.proxy.async;"


class Refs(NamedTuple):
    """What there is to read beside pages: heads [B, 1, K, G + 2, H], angles [B, 1, 2, half], norms [L, H]."""

    qkv: Any
    angles: Any
    norms: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class NewToken:
    """A row's new token for one KV head.

    Attributes:
      heads: how its heads are turned.
      refs: of all rows.
      scratch, barrier: shared memory of heads.scratch_types, and what its copy arrives at.
      interpret: whether there are no fences.
    """

    heads: TokenHeads
    refs: Refs
    scratch: Scratch
    barrier: Any
    interpret: bool

    def fetch(self, row: Array, kv_head: Array, layer: Array) -> Turning:
        """Starts copying the token's heads, and loads what turning them takes."""
        self.heads.fetch(self.refs.qkv.at[row, 0, kv_head], self.scratch, self.barrier)
        return self.heads.load(self.refs.angles.at[row, 0], self.refs.norms, layer)

    def turn(self, turning: Turning, is_here: Array, k_place: Any, v_place: Any) -> Any:
        """Makes queries, and where is_here starts writing key and value.

        Returns where the queries are, rows of bfloat16, committed.
        """
        plgpu.barrier_wait(self.barrier)
        self.heads.turn_queries(turning, self.scratch)
        pl.when(is_here)(lambda: self.heads.turn_key(turning, self.scratch))
        plgpu.commit_smem()
        pl.when(is_here)(lambda: self.heads.store(self.scratch, k_place, v_place))
        return self.scratch.turned

    def wait_until_written(self) -> None:
        """Copies that start after this find key and value there."""
        plgpu.wait_smem_to_gmem(0)
        if not self.interpret:
            inline: Any = plgpu.inline_mgpu()
            inline(_fence)()


def _fence(_: Any) -> None:
    utils.inline_ptx(_BETWEEN_COPIES, has_side_effects=True)


@dataclass(frozen=True, slots=True)
class Kind:
    """What every row's new token has in common: how its heads are turned, and whether norms come first."""

    heads: TokenHeads
    has_norms: bool

    @property
    def num_operands(self) -> int:
        """Operands beside attention's: angles, and norms of queries and keys."""
        return 3 if self.has_norms else 1

    def scratch_types(self) -> tuple[Scratch]:
        """What lies over warps' answers: by the time there are any, it has been read."""
        return (self.heads.scratch_types(),)

    def here(self, qkv: Any, more: Any, scratch: Any, interpret: bool) -> NewToken:
        """The token in a CTA of attention with such scratch."""
        angles, *norms = more
        _, of_heads, *_ = scratch.warps
        refs = Refs(qkv, angles, tuple(norms))
        return NewToken(self.heads, refs, Scratch(*of_heads), scratch.query_barrier, interpret)
