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
from torch.nn.attention import bias

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


class _Heads:
    """Queries, keys and values of so many last tokens of each row, and what goes around attention: norms,
    rotary and the write by a kernel before it, quantization by another after it."""

    def __init__(
        self, rows: int, length: int, heads: int, tokens: int, layers: int, device: str
    ) -> None:
        self.heads, self.tokens, self.length, self.device = heads, tokens, length, device
        count = rows * tokens
        self.qkv, self.norms = self.draw(count, heads + 2, _HEAD), self.draw(layers, 2, _HEAD)
        angles = torch.rand(count, _HEAD // 4, device=device)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.q = self.draw(rows, heads, tokens, _HEAD)
        last = torch.arange(length - tokens, length, device=device, dtype=torch.int32)
        self.positions = last.repeat(rows)
        self.values = torch.empty(count, heads * _HEAD, device=device, dtype=torch.float8_e4m3fn)
        self.scale = torch.empty(count, 1, device=device)

    def draw(self, *shape: int) -> Any:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def write(self, layer: int, keys: Any, values: Any, table: Any = None) -> None:
        """Writes keys and values, in pages where there is a table of them, and the queries."""
        kernels.write_heads[len(self.qkv), self.heads + 2](
            self.qkv, self.norms[layer, 0], self.norms[layer, 1], self.cos, self.sin,
            self.positions, self.positions if table is None else table, self.q, keys, values,
            self.length, H=self.heads, D=_HEAD, HALF=_HEAD // 4, EPS=_EPS, TOKENS=self.tokens,
            PAGE=0 if table is None else _PAGE, num_warps=1, **kernels.launches(),
        )  # fmt: skip

    def quantize(self, attended: Any) -> Any:
        """FP8 of [B, heads, tokens, 128], however that lies."""
        of_row, of_head, of_token, _ = attended.stride()
        kernels.quantize_heads[(len(self.qkv),)](
            attended, self.values, self.scale, of_row, of_head, of_token, H=self.heads, D=_HEAD,
            TOKENS=self.tokens, BLOCK=1 << (self.heads * _HEAD - 1).bit_length(), num_warps=4,
            **kernels.launches(),
        )  # fmt: skip
        return self.values, self.scale

    def error(self, got: Any, keys: Any, values: Any) -> float:
        """Of what layer 0 made, with its keys and values [B, length, 128], written as they were."""
        rows, heads, tokens = len(self.q), self.heads, self.tokens
        wide = self.qkv[:, : heads + 1].float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + _EPS)
        which = torch.tensor([0] * heads + [1], device=self.device)
        wide = wide * self.norms[0, which].float()
        first, second, rest = wide[..., :32], wide[..., 32:64], wide[..., 64:]
        c, s = self.cos[:, None], self.sin[:, None]
        turned = torch.cat([first * c - second * s, second * c + first * s, rest], -1)
        turned = turned.reshape(rows, tokens, heads + 1, _HEAD)
        is_narrow = keys.dtype == torch.float8_e4m3fn
        keys, values = keys.float(), values.float()
        wrote = relative(keys[:, -tokens:], turned[:, :, heads])
        new = self.qkv[:, heads + 1].float().reshape(rows, tokens, _HEAD)
        moved = relative(values[:, -tokens:], new)
        worst = 0.0
        for row in range(0, rows, max(1, rows // 4)):
            scores = turned[row, :, :heads] @ keys[row].T / _HEAD**0.5
            for token in range(tokens - 1):
                scores[token, :, self.length - tokens + 1 + token :] = float("-inf")
            want = (scores.softmax(-1) @ values[row]).reshape(tokens, -1)
            part = slice(row * tokens, (row + 1) * tokens)
            made = got[0][part].float() * got[1][part]
            # Quantized, it is good for 3e-2.
            worst = max(worst, relative(made, want) / 8)
        return max(wrote, moved) / (8 if is_narrow else 1) + worst


def attention(
    rows: int, length: int, heads: int, tokens: int, layers: int, device: str = "cuda"
) -> Made:
    """Norms, rotary and write, attention over FP8 pages that lie scattered, quantization."""
    around = _Heads(rows, length, heads, tokens, layers, device)
    pages_per_row, num_queries = length // _PAGE, max(16, 1 << (heads * tokens - 1).bit_length())
    num_pages = rows * pages_per_row
    pools = [
        [around.draw(num_pages, _PAGE, _HEAD).to(torch.float8_e4m3fn) for _ in range(2)]
        for _ in range(layers)
    ]
    table = torch.randperm(num_pages, device=device).to(torch.int32).reshape(rows, pages_per_row)
    lengths = torch.full((rows,), length, device=device, dtype=torch.int32)
    out = torch.empty_like(around.q)
    part = torch.empty(rows * 64 * num_queries * _HEAD, device=device)
    part_max, part_sum = (torch.empty(rows * 64 * num_queries, device=device) for _ in range(2))
    arrived = torch.zeros(rows, device=device, dtype=torch.int32)

    def run(cut: tuple[int, ...], layer: int) -> Any:
        block, splits, stages, warps = cut
        keys, values = pools[layer]
        around.write(layer, keys, values, table)
        kernels.decode_attention[rows, splits](
            around.q, keys, values, table, lengths, out, part, part_max, part_sum, arrived,
            pages_per_row, H=heads, D=_HEAD, PAGE=_PAGE, BLOCK=block, SPLITS=splits, STAGES=stages,
            TOKENS=tokens, M=num_queries, num_warps=warps, **kernels.launches(),
        )  # fmt: skip
        return around.quantize(out)

    def error(got: Any) -> float:
        keys, values = (pool[table.long()].reshape(rows, length, _HEAD) for pool in pools[0])
        return around.error(got, keys, values)

    return Made(ways(run, attention_cuts(rows, length)), error, kernels.overlap)


def attention_cuts(rows: int, length: int) -> list[tuple[int, ...]]:
    """(BLOCK, splits, stages, warps) of those that give each SM one to eight programs, in the tiles that
    were the fastest of more."""
    most = max(1, min(64, length // 64))
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most and 128 <= n * rows <= 1100]
    tiles = (128, 2, 8) if rows <= 16 else (64, 3, 4)
    return [(tiles[0], splits, *tiles[1:]) for splits in counts or [most]]


def write_and_attend(
    rows: int, length: int, heads: int, tokens: int, layers: int, device: str = "cuda"
) -> Made:
    """The same with PyTorch's attention: keys and values are bfloat16 and lie in one piece."""
    attend = torch.nn.functional.scaled_dot_product_attention
    around = _Heads(rows, length, heads, tokens, layers, device)
    q = around.q
    caches = [[around.draw(rows, 1, length, _HEAD) for _ in range(2)] for _ in range(layers)]
    seen = torch.ones(tokens, length, dtype=torch.bool, device=device).tril(length - tokens)
    # Tokens as more heads of one.
    of_head = seen.repeat(heads, 1)[None, :, None]

    def way(attention: Callable[..., Any], layer: int) -> Any:
        around.write(layer, *caches[layer])
        attended = attention(*caches[layer])
        return around.quantize(attended)

    def as_heads(keys: Any, values: Any) -> Any:
        flat = q.view(rows, heads * tokens, 1, _HEAD)
        made = attend(flat, keys, values, attn_mask=of_head, enable_gqa=True)
        return made.reshape(q.shape)

    def lower_right(keys: Any, values: Any) -> Any:
        mask: Any = bias.causal_lower_right(tokens, length)
        return attend(q, keys, values, attn_mask=mask, enable_gqa=True)

    one = {"": lambda keys, values: attend(q, keys, values, enable_gqa=True)}
    # With a mask of [tokens, length], or keys expanded to all heads, it takes three to ten times as long.
    several = {"heads": as_heads, "lower right": lower_right}

    def error(got: Any) -> float:
        return around.error(got, *(cache[:, 0] for cache in caches[0]))

    forms = one if tokens == 1 else several
    calls = {name: partial(way, attention) for name, attention in forms.items()}
    return Made(calls, error, kernels.overlap)


def norm(tokens: int, width: int, is_sum: bool, layers: int, device: str = "cuda") -> Made:
    """Residual add, where there is one, norm and quantization: a program for each row."""
    x, other = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(2))
    added = other if is_sum else None
    weights = torch.randn(layers, width, device=device).bfloat16()
    run = norm_call(x, weights)

    def way(cut: tuple[int, ...], layer: int) -> Any:
        return run(cut[0], layer, added)

    def error(got: Any) -> float:
        return norm_error(got, x, added, weights[0])

    return Made(ways(way, [(4,), (8,), (16,)]), error, kernels.overlap)


def norm_call(residual: Any, weights: Any) -> Callable[..., Any]:
    """A function of warps, a layer, and what is added to residual: nothing, rows, or, with those of experts
    after them, their picks, weights and how many experts are here, the shared expert's."""
    tokens, width = residual.shape
    total, normed = (torch.empty_like(residual) for _ in range(2))
    values = torch.empty_like(residual, dtype=torch.float8_e4m3fn)
    scale = torch.empty(tokens, 1, device=residual.device)

    def run(warps: int, layer: int, added: Any, *routed: Any) -> Any:
        is_sum = added is not None
        added = added if is_sum else residual
        rows, picks, shares, num_local = routed or (added, added, added, 0)
        kernels.combine_norm[(tokens,)](
            rows, added, picks, shares, residual, weights[layer], total, normed, values, scale,
            E=num_local, N=width, PICKS=picks.shape[1] if routed else 0, IS_SUM=is_sum, EPS=_EPS,
            BLOCK=1 << (width - 1).bit_length(), num_warps=warps, **kernels.launches(),
        )  # fmt: skip
        return total if is_sum else residual, normed, values, scale

    return run


def norm_error(got: Any, residual: Any, added: Any, weight: Any) -> float:
    """Of what norm_call makes of bfloat16 rows, or of none, that are added to residual."""
    total, normed, values, scale = got
    want = residual if added is None else residual + added
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
