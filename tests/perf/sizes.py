"""The sizes kernels are timed at: GLM-4.7 on one of eight devices, or tiny ones for a rehearsal.

Knows no kernel.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What one device holds and is given.

    Attributes:
      tokens: of a step.
      contexts: positions a decoded token sees.
      hidden: width of the residual stream.
      layers: stacked layers whose small weights are drawn.
      heavy_layers: of those whose weights are experts.
      experts: that the router knows; local_experts: that this device holds.
      picks: experts per token.
      expert_width: of a routed expert; split_width: the same where each device has a part of every one.
      split_tokens: of steps with such experts; shared_width: this device's part of the shared expert.
      query_groups: query heads of the device's one KV head.
      prefill: tokens of a prefill step.
      page_size: positions of a page.
    """

    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    hidden: int
    layers: int
    heavy_layers: int
    experts: int
    local_experts: int
    picks: int
    expert_width: int
    split_width: int
    split_tokens: tuple[int, ...]
    shared_width: int
    query_groups: int
    prefill: int
    page_size: int


GLM_4_7 = Sizes(
    tokens=(1, 4, 16, 64, 256, 8192),
    contexts=(2048, 8192),
    hidden=5120,
    layers=16,
    heavy_layers=6,
    experts=160,
    local_experts=20,
    picks=8,
    expert_width=1536,
    split_width=192,
    split_tokens=(1, 64, 256),
    shared_width=192,
    query_groups=12,
    prefill=8192,
    page_size=64,
)

REHEARSAL = Sizes(
    tokens=(2,),
    contexts=(96,),
    hidden=256,
    layers=2,
    heavy_layers=2,
    experts=16,
    local_experts=4,
    picks=2,
    expert_width=128,
    split_width=64,
    split_tokens=(2,),
    shared_width=64,
    query_groups=12,
    prefill=64,
    page_size=32,
)
