"""How long the GPU takes for what a function hands over to it: kernel by kernel, and in a graph.

Knows no kernel. Every round begins with an empty L2 cache, as a step finds its weights.
"""

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

logger = logging.getLogger(__name__)

NO_GRAPH = {"xla_gpu_enable_command_buffer": ""}
# As steps have it (glm_jax.steps); calls that share no memory are still one after the other.
IN_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL",
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_enable_dynamic_slice_fusion": False,
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
}
_REPEATS = 5
# In the names of XLA's kernels of an exclusive or.
_FLUSH = "xor"
# Calls of a round of time_program, each with another layer.
_CALLS = 16
# Programs of a round in a graph, few and many; milliseconds that the device has other work before them.
_FEW, _MANY, _BLOCKED = 2, 12, 12.0


def time_program(program: Callable[..., Any], operands: Any, num_layers: int) -> dict[str, Any]:
    """Microseconds of a call of program(operands, layer), as by_kernel counts them.

    A call is a program of its own: within one, XLA leaves out what nobody asks for and merges what is
    equal, whatever barriers stand between.
    """
    layers = [jnp.int32(layer) for layer in range(num_layers)]

    def call_all(num_calls: int) -> Any:
        answer = None
        # An answer is not kept: where each is large, they would not fit together.
        for call in range(num_calls):
            answer = program(operands, layers[call % num_layers])
        return answer

    jax.block_until_ready(call_all(1))
    start = time.perf_counter()
    jax.block_until_ready(call_all(1))
    num_calls = _CALLS if time.perf_counter() - start < 2e-3 else 4
    num_calls = min(num_calls, num_layers) if num_layers > 1 else num_calls
    return by_kernel(lambda: call_all(num_calls), num_calls)


def by_kernel(run: Callable[[], Any], num_calls: int) -> dict[str, Any]:
    """Microseconds of one of num_calls that run hands over.

    Returns:
      "us": in kernels, the median of rounds, as CUPTI counts it; without CUPTI the host's time, with
        what the host does; "kernels_us": the same by kernel.
    """
    flush = _flush()
    jax.block_until_ready((run(), flush()))

    def cold_rounds() -> float:
        seconds = []
        for _ in range(_REPEATS):
            jax.block_until_ready(flush())
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    walls: list[float] = []
    kernels = profile(lambda: walls.append(cold_rounds()))
    kernels = [kernel for kernel in kernels if _FLUSH not in kernel[0]]
    if len(kernels) < _REPEATS:
        return {"us": walls[0] * 1e6 / num_calls, "kernels_us": {}}
    per_round = len(kernels) // _REPEATS
    by_name: list[dict[str, float]] = []
    for first in range(0, per_round * _REPEATS, per_round):
        sums: dict[str, float] = defaultdict(float)
        for name, milliseconds in kernels[first : first + per_round]:
            sums[name] += milliseconds * 1e3 / num_calls
        by_name.append(sums)
    medians = {name: statistics.median(sums[name] for sums in by_name) for name in by_name[0]}
    return {"us": statistics.median(sum(x.values()) for x in by_name), "kernels_us": medians}


def in_graph(run: Callable[[], Any], num_calls: int) -> float:
    """Microseconds of one of num_calls in a graph, which run hands over, from an empty L2 cache on.

    The device has other work until all is handed over; a few rounds are taken from many, and what
    emptying the cache and launching a graph of one tiny kernel take is taken from the rest.
    """
    empty_us, nothing = _nothing()
    return (_of_rounds(run) - nothing + empty_us) / num_calls


def _of_rounds(run: Callable[[], Any]) -> float:
    """Microseconds of a round on the device, the cache emptied before each."""
    flush, block = _flush(), _blocker()
    times = []
    for _ in range(_REPEATS):
        walls = []
        for rounds in (_FEW, _MANY):
            start = time.perf_counter()
            blocked, answer = block(), None
            for _ in range(rounds):
                flush()
                answer = run()
            jax.block_until_ready((blocked, answer))
            walls.append(time.perf_counter() - start)
        times.append((walls[1] - walls[0]) / (_MANY - _FEW) * 1e6)
    return statistics.median(times)


@cache
def _nothing() -> tuple[float, float]:
    """Microseconds of a tiny kernel, and of a round with nothing but a graph of it."""
    tiny = jnp.zeros(1024, jnp.int32)
    program = jax.jit(lambda x: x + 1, compiler_options=IN_GRAPH).lower(tiny).compile()
    return by_kernel(lambda: program(tiny), 1)["us"], _of_rounds(lambda: program(tiny))


@cache
def _blocker() -> Callable[[], jax.Array]:
    """A program of about _BLOCKED milliseconds on the device, which the host does not wait for."""

    # The host looks at a loop's end in every turn unless it knows their number.
    @partial(jax.jit, static_argnums=1)
    def copies(x: jax.Array, number: int) -> jax.Array:
        return jax.lax.fori_loop(0, number, lambda _, x: x + 1, x)

    x = jnp.zeros(1 << 26, jnp.float32)

    def run(number: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(copies(x, number))
        return (time.perf_counter() - start) * 1e3

    run(50)
    number = max(1, round(_BLOCKED / (run(50) / 50)))
    run(number)
    return lambda: copies(x, number)


def profile(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """The kernels that run while `run` does, in order: names and milliseconds; none without CUPTI."""
    # jax's own wrapper runs one function on one set of arguments only.
    library: Any = getattr(profiler, "mosaic_gpu_lib")  # noqa: B009
    extension: Any = getattr(library, "_mosaic_gpu_ext", None)
    try:
        extension._cupti_init()
    except (AttributeError, RuntimeError) as error:
        # Without CUPTI the time between kernels counts too.
        logger.warning("kernels are not timed one by one: %s", error)
        run()
        return []
    try:
        run()
    finally:
        timings = extension._cupti_get_timings(True) or []
    return timings


@cache
def _flush() -> Callable[[], Any]:
    """A function that writes more than the L2 cache holds, by a kernel with _FLUSH in its name."""
    if jax.default_backend() != "gpu":
        return lambda: None
    program = jax.jit(lambda x: x ^ 1, donate_argnums=0)
    buffer = [program(jnp.zeros((1 << 26,), jnp.int32))]

    def flush() -> jax.Array:
        buffer[0] = program(buffer[0])
        return buffer[0]

    return flush
