"""The decode steps' operations as one writes them in Triton: what our kernels are held against.

Written for this comparison, with what Triton has for it (tiles, its pipelines, wgmma where a tile has 64
rows); knows no kernel of ours. Names of constants: T tokens, N rows of weights, K columns, E experts.
"""

# Not among our dependencies: this is imported only where it is installed.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# The interpreter knows no grids that depend on each other.
_ON_GPU = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")
_launches: dict[str, bool] = {}


def overlap(is_on: bool) -> None:
    """From now on, whether a launch of these kernels may begin before the one ahead has ended."""
    _launches["launch_pdl"] = is_on


def launches() -> dict[str, bool]:
    """What each launch is given beside its arguments."""
    return _launches


@triton.jit
def _await_others():
    """Until all that is ahead has ended; what is behind may then take its place."""
    if _ON_GPU:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _tile(
    x_rows, is_token, w_rows, begin, end, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, STAGES: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of x @ w.T as [BT, BN] float32; swapped, weights are the left side and wgmma applies."""
    columns = tl.arange(0, BK)
    acc = tl.zeros((BN, BT) if SWAP else (BT, BN), tl.float32)
    for k in tl.range(begin, end, BK, num_stages=STAGES):
        at = k + columns[None, :]
        if IS_EVEN:
            x = tl.load(x_rows[:, None] + at, mask=is_token[:, None], other=0.0)
            w = tl.load(w_rows[:, None] + at)
        else:
            x = tl.load(x_rows[:, None] + at, mask=is_token[:, None] & (at < end), other=0.0)
            w = tl.load(w_rows[:, None] + at, mask=at < end, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc) if SWAP else tl.dot(x, tl.trans(w), acc)
    return tl.trans(acc) if SWAP else acc


@triton.jit(do_not_specialize=["tokens"])
def dense(
    x, x_scale, w, w_scale, bias, out, partial, arrived, tokens, N: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """bfloat16 [T, N] of FP8 rows and weights; of a split K, whoever comes last adds all parts."""
    _await_others()
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rt = tl.program_id(2) * BT + tl.arange(0, BT)
    split = tl.program_id(1)
    is_token = rt < tokens
    acc = _tile(
        x + rt * K, is_token, w + rn * K, split * (K // SPLIT), (split + 1) * (K // SPLIT),
        BT, BN, BK, SWAP, STAGES, True,
    )  # fmt: skip
    places, mask = rt[:, None] * N + rn[None, :], is_token[:, None]
    is_mine = True
    if SPLIT > 1:
        tl.store(partial + split * tokens * N + places, acc, mask=mask)
        tl.debug_barrier()
        counter = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        is_mine = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
        if is_mine:
            acc = tl.zeros((BT, BN), tl.float32)
            for other in tl.static_range(SPLIT):
                acc += tl.load(
                    partial + other * tokens * N + places, mask=mask, other=0, cache_modifier=".cg"
                )
            tl.store(counter, 0)
    if is_mine:
        acc *= tl.load(x_scale + rt, mask=is_token, other=0)[:, None]
        acc *= tl.load(w_scale + rn)[None, :]
        acc += tl.load(bias + rn).to(tl.float32)[None, :]
        tl.store(out + places, acc.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def router_products(
    x, w, partial, tokens, E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
    BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [SPLIT, T, E]: parts of the products of bfloat16 rows and a router's weights."""
    _await_others()
    rt = tl.program_id(0) * BT + tl.arange(0, BT)
    split = tl.program_id(1)
    re = tl.program_id(2) * BE + tl.arange(0, BE)
    is_token, is_expert = rt < tokens, re < E
    columns = tl.arange(0, BK)
    acc = tl.zeros((BT, BE), tl.float32)
    for k in tl.range(split * (K // SPLIT), (split + 1) * (K // SPLIT), BK, num_stages=STAGES):
        at = k + columns[None, :]
        a = tl.load(x + rt[:, None] * K + at, mask=is_token[:, None], other=0.0)
        b = tl.load(w + re[:, None] * K + at, mask=is_expert[:, None], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    places = (split * tokens + rt[:, None]) * E + re[None, :]
    tl.store(partial + places, acc, mask=is_token[:, None] & is_expert[None, :])


@triton.jit(do_not_specialize=["tokens"])
def router_picks(
    partial, bias, picks, weights, tokens, E: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, PICKS: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """Each token's experts, the best first, and their shares of SCALING."""
    _await_others()
    token = tl.program_id(0)
    experts = tl.arange(0, BLOCK)
    logits = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        at = partial + (split * tokens + token) * E + experts
        logits += tl.load(at, mask=experts < E, other=0.0)
    scores = tl.sigmoid(logits)
    keys = scores + tl.load(bias + experts, mask=experts < E, other=0.0)
    keys = tl.where(experts < E, keys, float("-inf"))
    places = tl.arange(0, PICKS)
    chosen = tl.zeros((PICKS,), tl.int32)
    shares = tl.zeros((PICKS,), tl.float32)
    for place in tl.static_range(PICKS):
        best = tl.argmax(keys, 0)
        is_best = experts == best
        chosen = tl.where(places == place, best, chosen)
        shares = tl.where(places == place, tl.sum(tl.where(is_best, scores, 0.0), 0), shares)
        keys = tl.where(is_best, float("-inf"), keys)
    shares *= SCALING / tl.sum(shares, 0)
    tl.store(picks + token * PICKS + places, chosen)
    tl.store(weights + token * PICKS + places, shares)


@triton.jit(do_not_specialize=["num_picks", "capacity"])
def align(picks, slots, counts, num_picks, capacity, BLOCK: tl.constexpr):
    """Each expert's picks, as places in picks[T, 8], in a list of its own: no sort, no prefix over experts."""
    _await_others()
    expert = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    is_mine = tl.load(picks + places, mask=places < num_picks, other=-1) == expert
    rank = tl.cumsum(is_mine.to(tl.int32), 0) - 1
    tl.store(slots + expert * capacity + rank, places, mask=is_mine)
    tl.store(counts + expert, tl.sum(is_mine.to(tl.int32), 0))


@triton.jit
def _gated_tile(
    x, x_scale, rows, is_row, out_rows, out, w, w_scale, rn, N: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a tile: both products in one loop over x, gate's weights first."""
    columns = tl.arange(0, BK)
    gate = tl.zeros((BN, BT) if SWAP else (BT, BN), tl.float32)
    up = tl.zeros((BN, BT) if SWAP else (BT, BN), tl.float32)
    x_rows, w_rows = x + rows * K, w + rn * K
    for k in tl.range(0, K, BK, num_stages=STAGES):
        a = tl.load(x_rows[:, None] + k + columns[None, :], mask=is_row[:, None], other=0.0)
        g = tl.load(w_rows[:, None] + k + columns[None, :])
        u = tl.load(w_rows[:, None] + N * K + k + columns[None, :])
        if SWAP:
            gate = tl.dot(g, tl.trans(a), gate)
            up = tl.dot(u, tl.trans(a), up)
        else:
            gate = tl.dot(a, tl.trans(g), gate)
            up = tl.dot(a, tl.trans(u), up)
    if SWAP:
        gate, up = tl.trans(gate), tl.trans(up)
    scale = tl.load(x_scale + rows, mask=is_row, other=0)[:, None]
    gate *= scale * tl.load(w_scale + rn)[None, :]
    up *= scale * tl.load(w_scale + N + rn)[None, :]
    hidden = gate * tl.sigmoid(gate) * up
    tl.store(
        out + out_rows[:, None] * N + rn[None, :], hidden.to(tl.bfloat16), mask=is_row[:, None]
    )


@triton.jit(do_not_specialize=["tokens"])
def gate_up(
    x, x_scale, slots, counts, w, w_scale, shared_w, shared_scale, hidden, shared_hidden, tokens,
    E: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, PICKS: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """bfloat16 hidden rows of each expert's tokens, [E, T, N]; and the shared expert's, [T, SHARED]."""
    _await_others()
    expert = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    if expert < E:
        count = tl.load(counts + expert)
        for first in range(0, count, BT):
            ranks = first + tl.arange(0, BT)
            is_row = ranks < count
            rows = tl.load(slots + expert * tokens + ranks, mask=is_row, other=0) // PICKS
            at = expert.to(tl.int64) * 2 * N
            _gated_tile(
                x, x_scale, rows, is_row, expert * tokens + ranks, hidden, w + at * K, w_scale + at, rn,
                N, K, BT, BN, BK, SWAP, STAGES,
            )  # fmt: skip
    elif tl.program_id(0) * BN < SHARED:
        rows = (expert - E) * BT + tl.arange(0, BT)
        _gated_tile(
            x, x_scale, rows, rows < tokens, rows, shared_hidden, shared_w, shared_scale, rn,
            SHARED, K, BT, BN, BK, SWAP, STAGES,
        )  # fmt: skip


@triton.jit
def _quantize_row(values, out, scale, N: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    row = tl.load(values + columns, mask=columns < N, other=0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(row), 0), 1e-12)
    tl.store(out + columns, (row * (448.0 / largest)).to(tl.float8e4nv), mask=columns < N)
    tl.store(scale, largest / 448.0)


@triton.jit(do_not_specialize=["tokens"])
def quantize(
    hidden, counts, out, scale, shared_hidden, shared_out, shared_scale, tokens,
    E: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SHARED_BLOCK: tl.constexpr,
):  # fmt: skip
    """FP8 of every hidden row, with a scale each: ROWS programs an expert."""
    _await_others()
    expert, first = tl.program_id(0), tl.program_id(1)
    if expert < E:
        for rank in range(first, tl.load(counts + expert), ROWS):
            row = expert * tokens + rank
            _quantize_row(hidden + row * N, out + row * N, scale + row, N, BLOCK)
    else:
        row = (expert - E) * ROWS + first
        if row < tokens:
            _quantize_row(
                shared_hidden + row * SHARED, shared_out + row * SHARED, shared_scale + row, SHARED,
                SHARED_BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def down(
    hidden, scale, slots, counts, w, w_scale, shared_hidden, shared_hidden_scale, shared_w,
    shared_scale, out, shared_out, tokens, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SHARED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """bfloat16 rows at their picks' places, [T * 8, N]; and the shared expert's, [T, N]."""
    _await_others()
    expert = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    if expert < E:
        count = tl.load(counts + expert)
        at = expert.to(tl.int64) * N
        for first in range(0, count, BT):
            ranks = first + tl.arange(0, BT)
            is_row = ranks < count
            rows = expert * tokens + ranks
            acc = _tile(
                hidden + rows * K, is_row, w + (at + rn) * K, 0, K, BT, BN, BK, SWAP, STAGES, True
            )
            acc *= tl.load(scale + rows, mask=is_row, other=0)[:, None]
            acc *= tl.load(w_scale + at + rn)[None, :]
            places = tl.load(slots + rows, mask=is_row, other=0)
            tl.store(
                out + places[:, None] * N + rn[None, :], acc.to(tl.bfloat16), mask=is_row[:, None]
            )
    else:
        rows = (expert - E) * BT + tl.arange(0, BT)
        is_row = rows < tokens
        acc = _tile(
            shared_hidden + rows * SHARED, is_row, shared_w + rn * SHARED, 0, SHARED,
            BT, BN, BK, SWAP, STAGES, SHARED % BK == 0,
        )  # fmt: skip
        acc *= tl.load(shared_hidden_scale + rows, mask=is_row, other=0)[:, None]
        acc *= tl.load(shared_scale + rn)[None, :]
        tl.store(
            shared_out + rows[:, None] * N + rn[None, :], acc.to(tl.bfloat16), mask=is_row[:, None]
        )


@triton.jit
def combine_norm(
    rows, added, picks, weights, residual, norm, total, normed, values, scale, E: tl.constexpr,
    N: tl.constexpr, PICKS: tl.constexpr, IS_SUM: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's added row and the weighted rows of the picks that are held here, rounded to bfloat16, on top
    of its residual; that normed; that quantized. Where there is no sum, the residual alone is normed."""
    _await_others()
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    acc = tl.zeros((BLOCK,), tl.float32)
    if IS_SUM:
        acc = tl.load(added + token * N + columns, mask=mask, other=0).to(tl.float32)
    before = tl.load(residual + token * N + columns, mask=mask, other=0)
    weight = tl.load(norm + columns, mask=mask, other=0).to(tl.float32)
    for place in tl.static_range(PICKS):
        at = token * PICKS + place
        is_here = tl.load(picks + at) < E
        row = tl.load(rows + at * N + columns, mask=mask & is_here, other=0).to(tl.float32)
        acc += tl.where(is_here, tl.load(weights + at), 0.0) * row
    out = before
    if IS_SUM:
        out = (before.to(tl.float32) + acc.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16)
        tl.store(total + token * N + columns, out, mask=mask)
    wide = out.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / N + EPS)
    made = ((wide * factor).to(tl.bfloat16).to(tl.float32) * weight).to(tl.bfloat16)
    tl.store(normed + token * N + columns, made, mask=mask)
    made = made.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(made), 0), 1e-12)
    tl.store(values + token * N + columns, (made * (448.0 / largest)).to(tl.float8e4nv), mask=mask)
    tl.store(scale + token, largest / 448.0)


@triton.jit
def quantize_heads(
    rows, values, scale, of_row, of_head, of_token, H: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """FP8 of the heads of each row's tokens, with a scale a token; rows lie as the three strides say."""
    _await_others()
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    at = token // TOKENS * of_row + token % TOKENS * of_token + columns // D * of_head + columns % D
    row = tl.load(rows + at, mask=columns < H * D, other=0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(row), 0), 1e-12)
    made = (row * (448.0 / largest)).to(tl.float8e4nv)
    tl.store(values + token * H * D + columns, made, mask=columns < H * D)
    tl.store(scale + token, largest / 448.0)


@triton.jit(do_not_specialize=["length"])
def write_heads(
    qkv, q_norm, k_norm, cos, sin, positions, table, q, keys, values, length, H: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A token's queries, normed and turned, [B, H, TOKENS, D]; its key, treated so, and its value where
    they belong: in one piece a row or, where PAGE is not 0, in pages."""
    _await_others()
    token, head = tl.program_id(0), tl.program_id(1)
    row = token // TOKENS
    dims = tl.arange(0, D)
    partner = tl.where(dims < 2 * HALF, dims ^ HALF, dims)
    source = qkv + (token * (H + 2) + head) * D
    x = tl.load(source + dims)
    position = tl.load(positions + token)
    if PAGE > 0:
        page = tl.load(table + row * (length // PAGE) + position // PAGE)
        place = (page.to(tl.int64) * PAGE + position % PAGE) * D + dims
    else:
        place = (row * length + position) * D + dims
    if head <= H:
        norm = q_norm if head < H else k_norm
        wide, other = x.to(tl.float32), tl.load(source + partner).to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 0) / D + EPS)
        wide = (wide * factor).to(tl.bfloat16).to(tl.float32)
        other = (other * factor).to(tl.bfloat16).to(tl.float32)
        wide *= tl.load(norm + dims).to(tl.float32)
        other *= tl.load(norm + partner).to(tl.float32)
        at = token * HALF + dims % HALF
        sign = tl.where(dims < HALF, -1.0, 1.0)
        turned = wide * tl.load(cos + at) + sign * other * tl.load(sin + at)
        x = tl.where(dims < 2 * HALF, turned, wide).to(tl.bfloat16)
        if head < H:
            tl.store(q + ((row * H + head) * TOKENS + token % TOKENS) * D + dims, x)
        else:
            tl.store(keys + place, x.to(keys.dtype.element_ty))
    else:
        tl.store(values + place, x.to(values.dtype.element_ty))


@triton.jit(do_not_specialize=["pages_per_row"])
def decode_attention(
    q, k_pages, v_pages, table, lengths, out, part, part_max, part_sum, arrived, pages_per_row,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """bfloat16 [B, H, TOKENS, D] of queries [B, H, TOKENS, D], the last of which sees all of its row: flash
    decoding over pages of FP8, in tiles of M queries; a row's last part adds all of them up."""
    _await_others()
    row, split = tl.program_id(0), tl.program_id(1)
    heads, dims = tl.arange(0, M), tl.arange(0, D)
    length = tl.load(lengths + row)
    share = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    begin, end = split * share, tl.minimum(length, (split + 1) * share)
    in_q = (row * H * TOKENS + heads[:, None]) * D + dims[None, :]
    query = tl.load(q + in_q, mask=heads[:, None] < H * TOKENS, other=0)
    sees = tl.minimum(end, length - (TOKENS - 1) + heads % TOKENS)
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    scale: tl.constexpr = 1.4426950408889634 / D**0.5
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK)
        page = tl.load(
            table + row * pages_per_row + positions // PAGE, mask=positions < end, other=0
        )
        at = page.to(tl.int64) * PAGE + positions % PAGE
        key = tl.load(k_pages + at[:, None] * D + dims[None, :]).to(tl.bfloat16)
        score = tl.dot(query, tl.trans(key)) * scale
        score = tl.where(positions[None, :] < sees[:, None], score, float("-inf"))
        now = tl.maximum(largest, tl.max(score, 1))
        before = tl.exp2(largest - now)
        weight = tl.exp2(score - now[:, None])
        total = total * before + tl.sum(weight, 1)
        value = tl.load(v_pages + at[:, None] * D + dims[None, :]).to(tl.bfloat16)
        acc = tl.dot(weight.to(tl.bfloat16), value, acc * before[:, None])
        largest = now
    is_mine = True
    if SPLITS > 1:
        mine = row * SPLITS + split
        tl.store(part_max + mine * M + heads, largest)
        tl.store(part_sum + mine * M + heads, total)
        tl.store(part + (mine * M + heads[:, None]) * D + dims[None, :], acc)
        tl.debug_barrier()
        is_mine = tl.atomic_add(arrived + row, 1, sem="acq_rel") == SPLITS - 1
        if is_mine:
            splits = tl.arange(0, SPLITS)
            all_of = (row * SPLITS + splits[:, None]) * M + heads[None, :]
            maxima = tl.load(part_max + all_of, cache_modifier=".cg")
            top = tl.max(maxima, 0)
            factors = tl.exp2(maxima - top[None, :])
            total = tl.sum(factors * tl.load(part_sum + all_of, cache_modifier=".cg"), 0)
            acc = tl.zeros((M, D), tl.float32)
            for other in range(SPLITS):
                one = (row * SPLITS + other) * M + heads
                factor = tl.exp2(tl.load(part_max + one, cache_modifier=".cg") - top)
                acc += factor[:, None] * tl.load(
                    part + one[:, None] * D + dims[None, :], cache_modifier=".cg"
                )
            tl.store(arrived + row, 0)
    if is_mine:
        tl.store(
            out + in_q, (acc / total[:, None]).to(tl.bfloat16), mask=heads[:, None] < H * TOKENS
        )
