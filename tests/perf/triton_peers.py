"""FP8 products and decode attention in Triton, in the cuts that are tried for each shape.

Knows no kernel of ours. Each function makes the operands of so many layers on the GPU, and the ways to
run one of them.
"""

# Not among our dependencies: this is imported only where they are installed.
# pyright: reportMissingImports=false, reportIndexIssue=false

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.perf import triton_kernels as kernels
from tests.perf.peers import Made

_PAGE, _HEAD = 64, 128
_EPS = 1e-5
# How many numbers a router's cut is of.
ROUTER_CUT = 4


def dense(tokens: int, rows: int, width: int, layers: int, device: str = "cuda") -> Made:
    """An FP8 product: swapped or not, its columns split or not."""
    x, x_scale = fp8(device, tokens, width), scales(device, width, tokens)
    weights = [fp8(device, rows, width) for _ in range(layers)]
    scale = scales(device, width, layers, rows)
    bias = torch.randn(rows, device=device, dtype=torch.bfloat16)
    out = torch.empty(tokens, rows, device=device, dtype=torch.bfloat16)
    partials = torch.empty(8, tokens, rows, device=device)
    arrived = torch.zeros(4096, device=device, dtype=torch.int32)

    def run(cut: tuple[int, ...], layer: int) -> Any:
        bt, bn, bk, split, swap, stages, warps = cut
        grid = (rows // bn, split, -(-tokens // bt))
        kernels.dense[grid](
            x, x_scale, weights[layer], scale[layer], bias, out, partials, arrived, tokens,
            N=rows, K=width, BT=bt, BN=bn, BK=bk, SPLIT=split, SWAP=bool(swap), STAGES=stages,
            num_warps=warps, **kernels.launches(),
        )  # fmt: skip
        return out

    def error(got: Any) -> float:
        want = x.float() @ weights[0].float().T * x_scale[:, None] * scale[0] + bias.float()
        return relative(got, want)

    return Made(ways(run, dense_cuts(tokens, rows, width)), error, kernels.overlap)


def dense_cuts(tokens: int, rows: int, width: int) -> list[tuple[int, ...]]:
    """(BT, BN, BK, split, swap, stages, warps): those that were the fastest of more, and near them."""
    if tokens <= 64:
        bt = 16 if tokens <= 16 else 64
        cuts = [
            (bt, bn, bk, split, swap, stages, 4)
            for bn, bk, swap, stages in (
                (64, 256, 1, 4), (64, 128, 1, 6), (32, 256, 0, 5),
            )
            for split in (1, 2, 4)
        ]  # fmt: skip
    else:
        cuts = [
            (bt, bn, bk, split, swap, stages, warps)
            for bt, bn, bk, swap, stages, warps in (
                (64, 64, 128, 1, 5, 4), (128, 64, 128, 0, 5, 4), (128, 128, 128, 0, 4, 8),
            )
            for split in (1, 2)
        ]  # fmt: skip

    def fits(cut: tuple[int, ...]) -> bool:
        bt, bn, bk, split, _, stages, _ = cut
        num_tiles = rows // bn * split * -(-tokens // bt)
        return (
            rows % bn == 0
            and width % (split * bk) == 0
            and 64 <= num_tiles <= 512
            and (bt + bn) * bk * stages < 220_000
        )

    return [cut for cut in cuts if fits(cut)]


def attention(rows: int, length: int, heads: int, layers: int, device: str = "cuda") -> Made:
    """One token of each row over FP8 pages that lie scattered."""
    pages_per_row = length // _PAGE
    num_pages = rows * pages_per_row
    pools = [
        [torch.randn(num_pages, _PAGE, _HEAD, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
         for _ in range(2)]
        for _ in range(layers)
    ]  # fmt: skip
    q = torch.randn(rows, heads, _HEAD, device=device, dtype=torch.bfloat16)
    table = torch.randperm(num_pages, device=device).to(torch.int32).reshape(rows, pages_per_row)
    lengths = torch.full((rows,), length, device=device, dtype=torch.int32)
    out = torch.empty_like(q)
    part = torch.empty(rows * 64 * 16 * _HEAD, device=device)
    part_max, part_sum = (torch.empty(rows * 64 * 16, device=device) for _ in range(2))
    arrived = torch.zeros(rows, device=device, dtype=torch.int32)

    def run(cut: tuple[int, ...], layer: int) -> Any:
        block, splits, stages, warps = cut
        kernels.decode_attention[rows, splits](
            q, *pools[layer], table, lengths, out, part, part_max, part_sum, arrived, pages_per_row,
            H=heads, D=_HEAD, PAGE=_PAGE, BLOCK=block, SPLITS=splits, STAGES=stages,
            num_warps=warps, **kernels.launches(),
        )  # fmt: skip
        return out

    def error(got: Any) -> float:
        keys, values = (pool[table.long()].reshape(rows, length, _HEAD) for pool in pools[0])
        worst = 0.0
        for row in range(0, rows, max(1, rows // 4)):
            scores = q[row].float() @ keys[row].float().T / _HEAD**0.5
            want = scores.softmax(-1) @ values[row].float()
            worst = max(worst, relative(got[row], want))
        return worst

    return Made(ways(run, attention_cuts(rows, length)), error, kernels.overlap)


def attention_cuts(rows: int, length: int) -> list[tuple[int, ...]]:
    """(BLOCK, splits, stages, warps) of those that give each SM one to eight programs, in the tiles that
    were the fastest of more."""
    most = max(1, min(64, length // 64))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most and 128 <= n * rows <= 1100]
    tiles = (128, 2, 8) if rows <= 16 else (64, 3, 4)
    return [(tiles[0], splits, *tiles[1:]) for splits in counts or [most]]


def write_and_attend(rows: int, length: int, heads: int, layers: int, device: str = "cuda") -> Made:
    """Norms, rotary and write by a kernel, PyTorch's attention, and quantization by another.

    Keys and values are bfloat16 and lie in one piece.
    """

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    attend = torch.nn.functional.scaled_dot_product_attention
    qkv, norms = draw(rows, heads + 2, _HEAD), draw(layers, 2, _HEAD)
    caches = [(draw(rows, 1, length, _HEAD), draw(rows, 1, length, _HEAD)) for _ in range(layers)]
    angles = torch.rand(rows, _HEAD // 4, device=device)
    cos, sin, q = angles.cos(), angles.sin(), draw(rows, heads, 1, _HEAD)
    positions = torch.full((rows,), length - 1, device=device, dtype=torch.int32)
    values = torch.empty(rows, heads * _HEAD, device=device, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, 1, device=device)

    def call(layer: int) -> Any:
        kernels.write_heads[rows, heads + 2](
            qkv, norms[layer, 0], norms[layer, 1], cos, sin, positions, q, *caches[layer], length,
            H=heads, D=_HEAD, HALF=_HEAD // 4, EPS=1e-5, num_warps=1, **kernels.launches(),
        )  # fmt: skip
        attended = attend(q, *caches[layer], enable_gqa=True)
        kernels.quantize_rows[(rows,)](
            attended, values, scale, N=heads * _HEAD, BLOCK=1 << (heads * _HEAD - 1).bit_length(),
            num_warps=4, **kernels.launches(),
        )  # fmt: skip
        return values, scale

    def error(got: Any) -> float:
        wide = qkv[:, : heads + 1].float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
        which = torch.tensor([0] * heads + [1], device=device)
        wide = wide * norms[0, which].float()
        first, second, rest = wide[..., :32], wide[..., 32:64], wide[..., 64:]
        c, s = cos[:, None], sin[:, None]
        turned = torch.cat([first * c - second * s, second * c + first * s, rest], -1)
        keys, vals = (cache.float() for cache in caches[0])
        wrote = relative(keys[:, 0, -1], turned[:, heads])
        moved = relative(vals[:, 0, -1], qkv[:, heads + 1].float())
        scores = turned[:, :heads] @ keys[:, 0].mT / _HEAD**0.5
        want = (scores.softmax(-1) @ vals[:, 0]).reshape(rows, -1)
        # Quantized, it is good for 3e-2.
        return max(wrote, moved, relative(got[0].float() * got[1], want) / 8)

    return Made({"": call}, error, kernels.overlap)


def norm(tokens: int, width: int, layers: int, device: str = "cuda") -> Made:
    """Residual add, norm and quantization: a program for each row."""
    x, added = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(2))
    weights = torch.randn(layers, width, device=device).bfloat16()
    run = norm_call(x, weights)

    def way(cut: tuple[int, ...], layer: int) -> Any:
        return run(cut[0], layer, added)

    def error(got: Any) -> float:
        return norm_error(got, x, added, weights[0])

    return Made(ways(way, [(4,), (8,), (16,)]), error, kernels.overlap)


def norm_call(residual: Any, weights: Any) -> Callable[..., Any]:
    """A function of warps, a layer, and what is added to residual: rows, or, with those of experts after
    them, their picks, weights and how many experts are here, the shared expert's."""
    tokens, width = residual.shape
    total, normed = (torch.empty_like(residual) for _ in range(2))
    values = torch.empty_like(residual, dtype=torch.float8_e4m3fn)
    scale = torch.empty(tokens, 1, device=residual.device)

    def run(warps: int, layer: int, added: Any, *routed: Any) -> Any:
        rows, picks, shares, num_local = routed or (added, added, added, 0)
        kernels.combine_norm[(tokens,)](
            rows, added, picks, shares, residual, weights[layer], total, normed, values, scale,
            E=num_local, N=width, PICKS=picks.shape[1] if routed else 0, EPS=_EPS,
            BLOCK=1 << (width - 1).bit_length(), num_warps=warps, **kernels.launches(),
        )  # fmt: skip
        return total, normed, values, scale

    return run


def norm_error(got: Any, residual: Any, added: Any, weight: Any) -> float:
    """Of what norm_call makes of bfloat16 rows that are added to residual."""
    total, normed, values, scale = got
    want = residual + added
    wide = want.float()
    made = (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + _EPS)).bfloat16() * weight
    # Quantized, it is good for 3e-2.
    quantized = relative(values.float() * scale, normed.float()) / 8
    return max(relative(total, want.float()), relative(normed, made.float()), quantized)


def router_chain(
    x: Any, weights: Any, bias: Any, chosen: Any, shares: Any, scaling: float
) -> Callable[[tuple[int, ...], int], Any]:
    """A call of the router's kernels, which write chosen[T, k] and shares[T, k]."""
    tokens, width = x.shape
    experts, padded = bias.shape[1], 1 << (bias.shape[1] - 1).bit_length()
    partials = torch.empty(64 * tokens * experts, device=x.device)

    def run(cut: tuple[int, ...], layer: int) -> Any:
        bt, split, bk, stages = cut
        kernels.router_products[-(-tokens // bt), split, -(-experts // 64)](
            x, weights[layer], partials, tokens, E=experts, K=width, BT=bt, BE=64, BK=bk,
            SPLIT=split, STAGES=stages, num_warps=4, **kernels.launches(),
        )  # fmt: skip
        kernels.router_picks[(tokens,)](
            partials, bias[layer], chosen, shares, tokens, E=experts, BLOCK=padded, SPLIT=split,
            PICKS=chosen.shape[1], SCALING=scaling, num_warps=1, **kernels.launches(),
        )  # fmt: skip
        return chosen, shares

    return run


def router_cuts(tokens: int, width: int) -> list[tuple[int, ...]]:
    """(BT, split, BK, stages), ROUTER_CUT numbers."""
    if tokens <= 64:
        cuts = [(16, split, 128, 4) for split in (8, 20, 40)] + [(16, 20, 256, 2)]
    else:
        cuts = [(16, 4, 128, 4), (32, 8, 128, 4), (64, 20, 128, 3), (64, 8, 128, 4)]
    return [cut for cut in cuts if width % (cut[1] * cut[2]) == 0]


def ways(
    run: Callable[[tuple[int, ...], int], Any], cuts: list[tuple[int, ...]]
) -> dict[str, Callable[[int], Any]]:
    """A call for each cut, by its numbers."""
    return {" ".join(map(str, cut)): partial(run, cut) for cut in cuts}


def fp8(device: str, *shape: int) -> Any:
    """FP8 values below 2 of every magnitude, none of them NaN."""
    bits = torch.randint(0, 256, shape, device=device, dtype=torch.uint8) & 0xBF
    return bits.view(torch.float8_e4m3fn)


def scales(device: str, width: int, *shape: int) -> Any:
    """Scales of products of so many columns."""
    return (torch.rand(shape, device=device) + 0.5) * width**-0.5


def relative(got: Any, want: Any) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.float() - want).norm() / want.norm())
