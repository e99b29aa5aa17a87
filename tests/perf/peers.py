"""What PyTorch and Triton, where they are installed beside JAX, make of the same operations.

Knows no kernel of ours. A peer is a function from a number of layers to its operands' ways: those are
tried one after the other, and the fastest is timed by the same clock as ours, CUPTI's.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_REPEATS, _CALLS, _REPLAYS = 5, 16, 6
_EPS = 1e-5
_FLUSH = "bitwise_not"
# Tokens of a decode step; more are no concern of the peers written here.
_MOST = 256


@dataclass(frozen=True)
class Made:
    """A peer's operands, on the GPU.

    Attributes:
      ways: calls with a layer, by what distinguishes them.
      error: of what a call with layer 0 returns, against float32; None where the library is trusted.
      overlap: says whether launches from now on may begin before the one ahead has ended, where that is
        ours to say.
    """

    ways: dict[str, Callable[[int], Any]]
    error: Callable[[Any], float] | None = None
    overlap: Callable[[bool], None] = lambda is_on: None


Peer = Callable[[int], Made]


def dense(tokens: int, rows: int, width: int) -> dict[str, Peer]:
    """An FP8 product with a scale per token and per channel."""
    in_triton = partial(_of_module, "triton_peers", "dense", tokens, rows, width)
    return _there(
        {"torch._scaled_mm": partial(_scaled_mm, tokens, rows, width)},
        {"Triton": in_triton} if tokens <= _MOST else {},
    )


def block(tokens: int) -> dict[str, Peer]:
    """A router, a device's experts, their sum with a residual, its norm and quantization."""
    if tokens > _MOST:
        return {}
    return _there({}, {"Triton": partial(_of_module, "expert_peers", "block_in_triton", tokens)})


def attention(rows: int, tokens: int, length: int, heads: int) -> dict[str, Peer]:
    """Attention alone: PyTorch's over bfloat16 keys that lie in one piece."""
    return _there({"torch sdpa": partial(_sdpa, rows, tokens, length, heads)}, {})


def write_and_attend(rows: int, length: int, heads: int, tokens: int = 1) -> dict[str, Peer]:
    """Head norms, rotary, the write, attention and quantization of the last tokens of each row: PyTorch's
    attention as above, or, of several tokens, Triton's over FP8 pages, the rest by Triton."""
    operands = rows, length, heads, tokens
    both = partial(_of_module, "triton_peers", "write_and_attend", *operands)
    paged = partial(_of_module, "triton_peers", "attention", *operands)
    # Of one token Triton's is slower everywhere (docs/kernel-log.md).
    return _there({}, {"Triton, torch sdpa": both} | ({"Triton": paged} if tokens > 1 else {}))


def norm(tokens: int, width: int, *, is_sum: bool, is_compiled: bool) -> dict[str, Peer]:
    """Residual add, where there is one, norm and quantization; of torch.compile too, where it is asked for."""
    in_triton = partial(_of_module, "triton_peers", "norm", tokens, width, is_sum)
    compiled = {"torch.compile": partial(_norm, tokens, width, is_sum)}
    return _there(compiled if is_compiled else {}, {"Triton": in_triton})


def prepare(peer: Peer) -> None:
    """Compiles a peer's ways into the caches on disk, where a later process finds them."""
    made = peer(1)
    made.overlap(True)
    for call in made.ways.values():
        try:
            call(0)
        except Exception:  # measure says of it what is to be said
            continue
    _torch().cuda.synchronize()


def measure(peer: Peer, layers: int) -> dict[str, Any]:
    """Times a peer's fastest way.

    Returns:
      "us": microseconds of a call in kernels, the median; "kernels_us", the same by kernel;
      "us_graph": with the gaps between kernels of a CUDA graph, or with their overlaps where that takes
      less; "way"; "error"; "tried": us_graph of every way, or why there is none.
    """
    made = peer(layers)
    made.overlap(True)
    tried: dict[str, Any] = {}
    for name, call in made.ways.items():
        try:
            tried[name] = _in_graph(call, layers)
        except Exception as error:  # too much shared memory, say
            tried[name] = f"{type(error).__name__}: {error}"[:120]
    ran = {name: us for name, us in tried.items() if isinstance(us, float)}
    if not ran:
        raise RuntimeError(f"none of its ways ran: {tried}")
    way = min(ran, key=lambda name: ran[name])
    call = made.ways[way]
    error = None if made.error is None else made.error(call(0))
    # Kernels that overlap have no times of their own.
    made.overlap(False)
    tried["one after the other"] = _in_graph(call, layers)
    kernels = _in_kernels(call, layers)
    us = sum(kernels.values()) or ran[way]
    return {
        "us": us, "us_graph": min(ran[way], tried["one after the other"]), "kernels_us": kernels,
        "way": way, "error": error, "tried": tried,
    }  # fmt: skip


def _there(of_torch: dict[str, Peer], of_triton: dict[str, Peer]) -> dict[str, Peer]:
    if not find_spec("torch"):
        return {}
    return of_torch | (of_triton if find_spec("triton") else {})


def _torch() -> Any:
    # Not among our dependencies, so its types are not known either.
    return import_module("torch")


def _of_module(module: str, name: str, *arguments: Any) -> Made:
    """A peer of a module that is imported only now; the last argument is the number of layers."""
    return getattr(import_module(f"tests.perf.{module}"), name)(*arguments)


def _scaled_mm(tokens: int, rows: int, width: int, layers: int) -> Made:
    torch = _torch()
    # It takes tokens by the sixteen.
    padded = -(-tokens // 16) * 16
    x = torch.randn(padded, width, device="cuda").to(torch.float8_e4m3fn)
    weights = [
        torch.randn(rows, width, device="cuda").to(torch.float8_e4m3fn) for _ in range(layers)
    ]
    x_scale = torch.rand(padded, 1, device="cuda")
    scale = torch.rand(1, rows, device="cuda")

    def call(layer: int) -> Any:
        return torch._scaled_mm(
            x, weights[layer].t(), x_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Made({"": call})


def _sdpa(rows: int, tokens: int, length: int, heads: int, layers: int) -> Made:
    torch = _torch()
    attend = torch.nn.functional.scaled_dot_product_attention

    def draw(heads: int, tokens: int) -> Any:
        return torch.randn(rows, heads, tokens, 128, device="cuda", dtype=torch.bfloat16)

    q = draw(heads, tokens)
    caches = [(draw(1, length), draw(1, length)) for _ in range(layers)]

    def call(layer: int) -> Any:
        return attend(q, *caches[layer], is_causal=tokens > 1, enable_gqa=True)

    return Made({"": call})


def _norm(tokens: int, width: int, is_sum: bool, layers: int) -> Made:
    torch = _torch()

    def norm_quantize(residual: Any, weight: Any) -> Any:
        wide = residual.float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + _EPS)
        normed = wide.bfloat16() * weight
        scale = normed.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448.0
        values = (normed.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return residual, normed, values, scale

    x, added = (torch.randn(tokens, width, device="cuda").bfloat16() for _ in range(2))
    weights = torch.randn(layers, width, device="cuda").bfloat16()
    if not is_sum:
        alone = torch.compile(lambda x, weight: norm_quantize(x, weight)[1:], dynamic=False)
        return Made({"": lambda layer: alone(x, weights[layer])})
    both = torch.compile(lambda x, added, weight: norm_quantize(x + added, weight), dynamic=False)
    return Made({"": lambda layer: both(x, added, weights[layer])})


def _in_graph(call: Callable[[int], Any], layers: int) -> float:
    """Microseconds of a call among one for each layer, in a graph that begins with an empty L2 cache.

    What emptying the cache takes alone is taken from it.
    """
    for layer in range(layers):
        call(layer)

    def call_all() -> None:
        _flush()
        for layer in range(layers):
            call(layer)

    return (_of_graph(call_all) - _of_flush()) / layers


def _of_graph(run: Callable[[], None]) -> float:
    """Microseconds of what run does, captured: the median of rounds of several replays."""
    torch = _torch()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    # torch.cuda.graph does this too, but collects garbage first, which takes longer than all else.
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
    graph.replay()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The host hands over all of it while the device empties the cache.
        for _ in range(_REPLAYS):
            _flush()
        start.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / _REPLAYS)
    return statistics.median(times)


@cache
def _of_flush() -> float:
    # A GPU that did nothing has not its full clock yet.
    for _ in range(1000):
        _flush()
    return _of_graph(_flush)


def _in_kernels(call: Callable[[int], Any], layers: int) -> dict[str, float]:
    """Microseconds of a call in each kernel, medians, as CUPTI counts them; empty where it does not.

    Each round begins with an empty L2 cache and takes no layer twice, as ours do.
    """
    torch = _torch()
    profiler = torch.profiler
    rounds = max(_REPEATS, 2 * _CALLS // layers)
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            _flush()
            for layer in range(layers):
                call(layer)
        torch.cuda.synchronize()
    durations: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and _FLUSH not in event.name:
            durations[event.name[:80]].append(event.time_range.elapsed_us())
    return {
        name: statistics.median(times) * len(times) / (rounds * layers)
        for name, times in durations.items()
    }


@cache
def _large() -> Any:
    return _torch().zeros(1 << 26, device="cuda", dtype=_torch().int32)


def _flush() -> None:
    """Writes more than the L2 cache holds, by a kernel with _FLUSH in its name."""
    _large().bitwise_not_()
