"""A router, a device's experts and its part of the shared one, and the sum before the next norm: in Triton.

Knows no kernel of ours.
"""

# Not among our dependencies: this is imported only where they are installed.
# pyright: reportMissingImports=false, reportIndexIssue=false

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from tests.perf import triton_kernels as kernels
from tests.perf.peers import Made
from tests.perf.picks import picks_of
from tests.perf.triton_peers import (
    ROUTER_CUT,
    fp8,
    norm_call,
    norm_error,
    router_chain,
    router_cuts,
    scales,
    ways,
)

_LARGEST = 448.0
_NORM_WARPS = 8


class Operands:
    """Random weights of so many layers, tokens and their picks; the first experts live here."""

    def __init__(
        self, tokens: int, layers: int, num_local: int = 20, inner: int = 1536, shared: int = 192,
        width: int = 5120, num_experts: int = 160, num_picks: int = 8, device: str = "cuda",
    ) -> None:  # fmt: skip
        self.tokens, self.num_local, self.inner, self.shared = tokens, num_local, inner, shared
        self.width, self.num_picks, self.device = width, num_picks, device
        self.num_experts = num_experts
        self.x, self.x_scale = fp8(device, tokens, width), scales(device, width, tokens)
        self.picks, self.weights = (
            torch.from_numpy(found).to(device)
            for found in picks_of(tokens, num_experts, num_picks, num_local)
        )
        self.up = fp8(device, layers, num_local, 2 * inner, width)
        self.up_scale = scales(device, width, layers, num_local, 2 * inner)
        self.down = fp8(device, layers, num_local, width, inner)
        self.down_scale = scales(device, inner, layers, num_local, width)
        self.shared_up = fp8(device, layers, 2 * shared, width)
        self.shared_up_scale = scales(device, width, layers, 2 * shared)
        self.shared_down = fp8(device, layers, width, shared)
        self.shared_down_scale = scales(device, shared, layers, width)

    def summed(self) -> Any:
        """The first layer's sum, in float32."""
        wide = self.x.float() * self.x_scale[:, None]
        want = _mlp(
            wide, self.shared_up[0], self.shared_up_scale[0], self.shared_down[0],
            self.shared_down_scale[0],
        )  # fmt: skip
        for expert in range(self.num_local):
            theirs = (self.picks == expert).nonzero()
            if len(theirs):
                parts = (self.up, self.up_scale, self.down, self.down_scale)
                mine = _mlp(wide[theirs[:, 0]], *(part[0, expert] for part in parts))
                want[theirs[:, 0]] += self.weights[theirs[:, 0], theirs[:, 1], None] * mine
        return want


def block_in_triton(tokens: int, layers: int, **sizes: Any) -> Made:
    """Seven kernels: the router's products; each token's picks and weights; lists of each expert's tokens;
    gate and up; quantization; down; the sum with a residual, its norm and quantization."""
    on = Operands(tokens, layers, **sizes)
    router = torch.randn(on.num_experts, on.width, device=on.device) * on.width**-0.5
    # Rows that pick what was drawn.
    x = router[on.picks.long()].sum(1).mul(2).bfloat16()
    routers = router.bfloat16().expand(layers, -1, -1).contiguous()
    bias = torch.zeros(layers, on.num_experts, device=on.device)
    residual = torch.randn(tokens, on.width, device=on.device).bfloat16()
    norms = torch.randn(layers, on.width, device=on.device).bfloat16()
    route = router_chain(x, routers, bias, on.picks, on.weights, 1.0)
    chain, finish = _chain(on), norm_call(residual, norms)

    def run(cut: tuple[int, ...], layer: int) -> Any:
        route(cut[:ROUTER_CUT], layer)
        rows, shared = chain(cut[ROUTER_CUT:], layer)
        return finish(_NORM_WARPS, layer, shared, rows, on.picks, on.weights, on.num_local)

    def error(got: Any) -> float:
        # bfloat16 rows of every expert, and their sum's rounding, come to 4e-3 of it.
        return norm_error(got, residual, on.summed().bfloat16(), norms[0])

    every = product(router_cuts(tokens, on.width), cuts(tokens, on))
    return Made(ways(run, [(*first, *rest) for first, rest in every]), error, kernels.overlap)


def _chain(on: Operands) -> Callable[[tuple[int, ...], int], Any]:
    """A call of the experts' kernels: their rows, and the shared expert's."""
    tokens = on.tokens
    empty = partial(torch.empty, device=on.device)
    slots, counts = (empty(on.num_local * n, dtype=torch.int32) for n in (tokens, 1))
    hidden = empty(on.num_local * tokens * on.inner, dtype=torch.bfloat16)
    shared_hidden = empty(tokens * on.shared, dtype=torch.bfloat16)
    narrow, shared_narrow = (
        empty(wide.shape, dtype=torch.float8_e4m3fn) for wide in (hidden, shared_hidden)
    )
    narrow_scale, shared_narrow_scale = empty(on.num_local * tokens), empty(tokens)
    rows = empty(tokens * on.num_picks, on.width, dtype=torch.bfloat16)
    shared_rows = empty(tokens, on.width, dtype=torch.bfloat16)
    at_once = min(tokens, 16)
    num_picks = tokens * on.num_picks

    def run(cut: tuple[int, ...], layer: int) -> Any:
        bt, bn, bk, swap, stages, warps, bn2, bk2, swap2, stages2, warps2 = cut
        grid_y = on.num_local + -(-tokens // bt)
        kernels.align[(on.num_local,)](
            on.picks, slots, counts, num_picks, tokens, BLOCK=1 << (num_picks - 1).bit_length(),
            **kernels.launches(),
        )  # fmt: skip
        kernels.gate_up[on.inner // bn, grid_y](
            on.x, on.x_scale, slots, counts, on.up[layer], on.up_scale[layer], on.shared_up[layer],
            on.shared_up_scale[layer], hidden, shared_hidden, tokens, E=on.num_local, N=on.inner,
            SHARED=on.shared, K=on.width, PICKS=on.num_picks, BT=bt, BN=bn, BK=bk, SWAP=bool(swap),
            STAGES=stages, num_warps=warps, **kernels.launches(),
        )  # fmt: skip
        kernels.quantize[on.num_local + -(-tokens // at_once), at_once](
            hidden, counts, narrow, narrow_scale, shared_hidden, shared_narrow, shared_narrow_scale,
            tokens, E=on.num_local, N=on.inner, SHARED=on.shared, ROWS=at_once,
            BLOCK=1 << (on.inner - 1).bit_length(), SHARED_BLOCK=1 << (on.shared - 1).bit_length(),
            num_warps=4, **kernels.launches(),
        )  # fmt: skip
        kernels.down[on.width // bn2, grid_y](
            narrow, narrow_scale, slots, counts, on.down[layer], on.down_scale[layer], shared_narrow,
            shared_narrow_scale, on.shared_down[layer], on.shared_down_scale[layer], rows,
            shared_rows, tokens, E=on.num_local, N=on.width, K=on.inner, SHARED=on.shared, BT=bt,
            BN=bn2, BK=bk2, SWAP=bool(swap2), STAGES=stages2, num_warps=warps2, **kernels.launches(),
        )  # fmt: skip
        return rows, shared_rows

    return run


def cuts(tokens: int, on: Operands) -> list[tuple[int, ...]]:
    """BT; then (BN, BK, swap, stages, warps) of gate and up, and the same of down: those that were the
    fastest of more for some number of tokens."""
    ups = (64, 128, 1, 4, 4), (64, 128, 1, 6, 4), (64, 256, 1, 3, 4)
    downs = (128, 128, 1, 5, 4), (64, 256, 1, 4, 4), (128, 256, 1, 3, 8)
    return [
        (bt, *up, *down)
        for bt, up, down in product((16,) if tokens < 256 else (16, 32), ups, downs)
        if on.inner % up[0] == on.shared % up[0] == on.width % up[1] == 0
        and on.inner % down[1] == on.width % down[0] == 0
    ]


def _mlp(x: Any, up: Any, up_scale: Any, down: Any, down_scale: Any) -> Any:
    """A gated MLP in float32, its hidden rows rounded to bfloat16 and FP8 as the kernels do."""
    gate, linear = (x @ up.float().T * up_scale).chunk(2, dim=-1)
    hidden = (torch.nn.functional.silu(gate) * linear).bfloat16().float()
    scale = hidden.abs().amax(-1, keepdim=True).clamp_min(1e-12) / _LARGEST
    hidden = (hidden / scale).to(torch.float8_e4m3fn).float() * scale
    return hidden @ down.float().T * down_scale
