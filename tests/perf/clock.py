"""How long the GPU takes for what a function hands over to it: kernel by kernel, and in a graph.

Knows no kernel. Every round begins with an empty L2 cache, as a step finds its weights.
"""

import logging
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler, utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm_jax.sharding import make_mesh
from glm_jax.steps import compiler_options

logger = logging.getLogger(__name__)

# Mosaic lowers kernels for one thread at a time (glm_jax.steps); XLA compiles for all.
LOWERING = threading.Lock()
# Calls in a graph that share no memory are still one after the other.
ONE_BY_ONE = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
_REPEATS = 5
# In the names of XLA's kernels of an exclusive or.
_FLUSH = "xor"
# Calls of a round of time_program, each with another layer.
_CALLS = 16
# Rounds of a graph that are handed over together; milliseconds that the device has other work meanwhile.
_ROUNDS, _BLOCKED = 10, 12.0
_READ_TIME = "{ .reg .b64 now; mov.u64 now, %globaltimer; st.global.b64 [$0], now; }"


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

    The device has other work until all is handed over, for XLA writes a graph's operands anew in every
    call. What emptying the cache and launching a graph of one tiny kernel take is taken from it.
    """
    empty_us, nothing = _nothing()
    return (_of_rounds(run) - nothing + empty_us) / num_calls


def _of_rounds(run: Callable[[], Any]) -> float:
    """Microseconds of a round on the device, by its own clock, the cache emptied before each."""
    flush, block, stamp = _flush(), blocker(_BLOCKED), _stamp()
    times = []
    for _ in range(_REPEATS):
        answer: Any = block()
        begin = stamp()
        for _ in range(_ROUNDS):
            flush()
            answer = run()
        end = stamp()
        jax.block_until_ready(answer)
        times.append((_nanoseconds(end) - _nanoseconds(begin)) / _ROUNDS / 1e3)
    return statistics.median(times)


@cache
def _stamp() -> Callable[[], jax.Array]:
    """A program that tells the device's time."""

    def read(_: Any, ref: Any) -> None:
        with utils.single_thread(utils.ThreadSubset.BLOCK):
            utils.inline_ptx(_READ_TIME, utils.memref_ptr(ref), has_side_effects=True)

    def body(out_ref: Any) -> None:
        inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        inline(read)(out_ref)

    kernel = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((2,), jnp.uint32), kernel_name="stamp"
    )
    return jax.jit(kernel).lower().compile()


def _nanoseconds(stamp: jax.Array) -> int:
    low, high = np.asarray(stamp).tolist()
    return high << 32 | low


@cache
def _nothing() -> tuple[float, float]:
    """Microseconds of a tiny kernel, and of a round with nothing but a graph of it."""
    tiny = jnp.zeros(1024, jnp.int32)
    options = compiler_options(make_mesh(1)) | ONE_BY_ONE
    program = jax.jit(lambda x: x + 1, compiler_options=options).lower(tiny).compile()
    return by_kernel(lambda: program(tiny), 1)["us"], _of_rounds(lambda: program(tiny))


@cache
def blocker(milliseconds: float) -> Callable[[], jax.Array]:
    """A program that takes the device about so long, which the host does not wait for."""

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
    number = max(1, round(milliseconds / (run(50) / 50)))
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
