"""The KV write as the beginning of decode attention: a row's new tokens, queries made where they are used.

Knows nothing of how parts are attended to. Every CTA of a row makes its own queries, while its first pages
come. The one among whose positions a new token's is writes its key and value, and only then copies the
tile that holds them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.pallas.token_heads import Scratch, TokenHeads, Turning

# What copies have written, other copies of this CTA read.
_BETWEEN_COPIES = "fence.proxy.async;"


class Refs(NamedTuple):
    """What there is to read beside pages: heads [B, T, K, G + 2, H], angles [B, T, 2, half], norms [L, H]."""

    qkv: Any
    angles: Any
    norms: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """A row's new tokens for one KV head.

    Attributes:
      heads: how their heads are turned.
      refs: of all rows.
      scratch, barrier: shared memory of heads.scratch_types for each token, and what copies arrive at.
      interpret: whether there are no fences.
    """

    heads: TokenHeads
    refs: Refs
    scratch: list[Scratch]
    barrier: Any
    interpret: bool

    def fetch(self, row: Array, kv_head: Array, layer: Array) -> list[Turning]:
        """Starts copying the tokens' heads, and loads what turning them takes."""
        for token, scratch in enumerate(self.scratch):
            self.heads.fetch(self.refs.qkv.at[row, token, kv_head], scratch, self.barrier)
        angles, norms = self.refs.angles, self.refs.norms
        tokens = range(len(self.scratch))
        return [self.heads.load(angles.at[row, token], norms, layer) for token in tokens]

    def turn(
        self, turnings: list[Turning], are_here: list[Array], places: list[tuple[Any, Any]]
    ) -> list[Any]:
        """Makes queries, and of tokens that are here starts writing key and value, to their places.

        Returns where each token's queries are, rows of bfloat16, committed.
        """
        plgpu.barrier_wait(self.barrier)
        tokens = list(zip(self.scratch, turnings, are_here, places, strict=True))
        for scratch, turning, is_here, _ in tokens:
            self.heads.turn_queries(turning, scratch)
            pl.when(is_here)(partial(self.heads.turn_key, turning, scratch))
        plgpu.commit_smem()
        for scratch, _, is_here, place in tokens:
            pl.when(is_here)(partial(self.heads.store, scratch, *place))
        return [scratch.turned for scratch in self.scratch]

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
    """What all rows' new tokens have in common.

    Attributes:
      heads: how their heads are turned.
      num_tokens: of a row.
      has_norms: whether norms come first.
    """

    heads: TokenHeads
    num_tokens: int
    has_norms: bool

    @property
    def num_operands(self) -> int:
        """Operands beside attention's: angles, and norms of queries and keys."""
        return 3 if self.has_norms else 1

    def scratch_types(self) -> tuple[list[Scratch]]:
        """What lies over warps' answers: by the time there are any, it has been read."""
        return ([self.heads.scratch_types() for _ in range(self.num_tokens)],)

    def here(self, qkv: Any, more: Any, scratch: Any, interpret: bool) -> NewTokens:
        """The tokens in a CTA of attention with such scratch."""
        angles, *norms = more
        _, of_tokens, *_ = scratch.warps
        refs = Refs(qkv, angles, tuple(norms))
        of_tokens = [Scratch(*of_token) for of_token in of_tokens]
        return NewTokens(self.heads, refs, of_tokens, scratch.query_barrier, interpret)
