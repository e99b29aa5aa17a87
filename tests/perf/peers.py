"""What PyTorch, where it is installed beside JAX, makes of the same operations.

Knows no kernel of ours.
"""

import statistics
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_REPEATS = 50


def scaled_mm(tokens: int, rows: int, width: int, layers: int) -> dict[str, Callable[[], float]]:
    """torch._scaled_mm with a scale per token and per channel; it takes tokens by the sixteen."""
    if not find_spec("torch"):
        return {}

    def microseconds() -> float:
        torch = _torch()

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

        return _microseconds(call, layers)

    return {"torch._scaled_mm": microseconds}


def attention(
    rows: int, tokens: int, length: int, heads: int, layers: int
) -> dict[str, Callable[[], float]]:
    """scaled_dot_product_attention over bfloat16 keys that lie in one piece: no pages to follow."""
    if not find_spec("torch"):
        return {}

    def microseconds() -> float:
        torch = _torch()
        attend = torch.nn.functional.scaled_dot_product_attention

        def draw(heads: int, tokens: int) -> Any:
            return torch.randn(rows, heads, tokens, 128, device="cuda", dtype=torch.bfloat16)

        q = draw(heads, tokens)
        caches = [(draw(1, length), draw(1, length)) for _ in range(layers)]

        def call(layer: int) -> Any:
            return attend(q, *caches[layer], is_causal=tokens > 1, enable_gqa=True)

        return _microseconds(call, layers)

    return {"torch sdpa": microseconds}


def _torch() -> Any:
    # Not among our dependencies, so its types are not known either.
    return import_module("torch")


def _microseconds(call: Callable[[int], Any], layers: int) -> float:
    torch = _torch()

    for layer in range(layers):
        call(layer)
    times = []
    for repeat in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The card is given work, so that the host is ahead of it when the call comes.
        torch.cuda._sleep(200_000)
        start.record()
        call(repeat % layers)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)
