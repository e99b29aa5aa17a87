"""How kernels are timed and checked: on fresh inputs, over poisoned memory, against what the card can do.

Knows no kernel.
"""

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from glm_jax.pallas.chip import Chip
from tests.perf.peers import Peer

# A step takes the case's operands and a layer, and returns arrays.
Step = Callable[[Any, jax.Array], Any]

logger = logging.getLogger(__name__)

_REPEATS = 5
_OURS = "mosaic_gpu_kernel"
# In the names of those that empty memory, once a step and not once a layer.
_ONCE = "empty_"
# In the names of XLA's kernels of an exclusive or.
_FLUSH = "xor"
# XLA may leave out roundings to bfloat16 that the kernels and the layers make.
_ROUNDED = {"xla_allow_excess_precision": False}
rounded = partial(jax.jit, compiler_options=_ROUNDED)
# References are run once: trying ways to run them would take longer than anything else here.
_UNTUNED = _ROUNDED | {"xla_gpu_autotune_level": 0}
# Calls of a round: each takes another layer, so that the L2 cache has none of their weights.
_CALLS = 16


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
      kernel: its module and function.
      shape: what of the shape varies, for people.
      draw: makes the operands from a key.
      num_layers: layers that the operands hold; timed calls take them in turn.
      step: the kernel.
      reference: the same in XLA's own operations, in float32 where it matters.
      errors: relative errors of the kernel's outputs against the reference's, by name.
      tolerance: what the largest of them may be.
      bytes: fewest bytes of device memory a call moves.
      operations: floating-point operations, FP8 or bfloat16 as `unit` says.
      unit: "fp8" or "bf16".
      is_float32: the reference's products are of float32, whose form in Triton is compiled for minutes.
        Of FP8, only that form adds in float32: cuBLAS adds as our kernels' instructions do.
      is_timed_alone: leaves XLA's own kernels around ours out of the time, where a real step has none.
      alternatives: other ways to the same end in JAX, by name.
      peers: the same of other libraries, by name; see peers.py.
    """

    kernel: str
    shape: str
    draw: Callable[[jax.Array], Any]
    num_layers: int
    step: Step
    reference: Step
    errors: Callable[[Any, Any], dict[str, jax.Array]]
    tolerance: float
    bytes: float
    operations: float = 0.0
    unit: str = "bf16"
    is_float32: bool = False
    is_timed_alone: bool = False
    alternatives: dict[str, Step] = field(default_factory=dict)
    peers: dict[str, Peer] = field(default_factory=dict)


@dataclass(frozen=True)
class Programs:
    """What a case runs, compiled: many cases' at once, since XLA takes longer to compile than to run.

    Attributes:
      draw: makes the operands.
      step, reference, errors: as the case's.
    """

    draw: Callable[..., Any]
    step: Callable[..., Any]
    reference: Callable[..., Any]
    errors: Callable[..., Any]


def chip_of(device: Any) -> Chip:
    """The chip of a device that is here."""
    is_blackwell = float(device.compute_capability) >= 10
    return Chip("sm100" if is_blackwell else "sm90", device.core_count)


def relative_error(got: jax.Array, expected: jax.Array) -> jax.Array:
    """Norm of the difference over the norm of what is expected; not a number where either is not."""
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)


def mismatches(got: jax.Array, expected: jax.Array) -> jax.Array:
    """The share of elements that differ."""
    return jnp.mean((got != expected).astype(jnp.float32))


def compile_case(case: Case) -> Programs:
    """Compiles everything the case itself runs, without running any of it."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    operands = jax.eval_shape(case.draw, key)
    layer = jax.ShapeDtypeStruct((), jnp.int32)

    options = _UNTUNED | ({"xla_gpu_enable_triton_gemm": False} if case.is_float32 else {})

    def compiled(step: Step) -> Callable[..., Any]:
        return jax.jit(step, compiler_options=options).lower(operands, layer).compile()

    outputs = (jax.eval_shape(step, operands, layer) for step in (case.step, case.reference))
    return Programs(
        draw=jax.jit(case.draw).lower(key).compile(),
        step=compiled(case.step),
        reference=compiled(case.reference),
        errors=jax.jit(case.errors).lower(*outputs).compile(),
    )


def compile_alternatives(case: Case) -> dict[str, Callable[..., Any]]:
    """Compiles the case's alternatives, tuned as XLA does it."""
    operands = jax.eval_shape(case.draw, jax.eval_shape(lambda: jax.random.key(0)))
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    return {
        name: jax.jit(step).lower(operands, layer).compile()
        for name, step in case.alternatives.items()
    }


def check(case: Case, programs: Programs, seed: int, poisoned_bytes: int) -> float:
    """The largest relative error of one call on fresh inputs; infinite where it is no number."""
    operands = programs.draw(jax.random.key(seed))
    layer = jnp.int32(seed % case.num_layers)
    expected = jax.block_until_ready(programs.reference(operands, layer))
    _poison(poisoned_bytes)
    return largest(programs.errors(programs.step(operands, layer), expected))


def check_interpreted(case: Case, seed: int) -> float:
    """The same at once, for kernels that are interpreted."""
    operands, layer = case.draw(jax.random.key(seed)), jnp.int32(seed % case.num_layers)
    got, expected = (rounded(step)(operands, layer) for step in (case.step, case.reference))
    return largest(case.errors(got, expected))


def largest(errors: dict[str, jax.Array]) -> float:
    """The largest error, infinite if one is no number."""
    values = [float(error) for error in errors.values()]
    return max(value if value == value else float("inf") for value in values)


def measure(case: Case, programs: Programs) -> dict[str, Any]:
    """Microseconds of one call; see time_program."""
    operands = jax.block_until_ready(programs.draw(jax.random.key(0)))
    times = time_program(programs.step, operands, case.num_layers)
    if case.is_timed_alone and times["kernels_us"]:
        ours = (name for name in times["kernels_us"] if _OURS in name and _ONCE not in name)
        times["us"] = sum(times["kernels_us"][name] for name in ours)
    return times


def measure_alternatives(
    case: Case, programs: Programs, alternatives: dict[str, Callable[..., Any]]
) -> dict[str, dict[str, Any]]:
    """The same of each alternative, by name."""
    if not alternatives:
        return {}
    operands = jax.block_until_ready(programs.draw(jax.random.key(0)))
    return {
        name: time_program(program, operands, case.num_layers)
        for name, program in alternatives.items()
    }


def time_program(program: Callable[..., Any], operands: Any, num_layers: int) -> dict[str, Any]:
    """Microseconds of a call of program(operands, layer), the median of rounds over several layers.

    A call is a program of its own: within one, XLA leaves out what nobody asks for and merges what is
    equal, whatever barriers stand between. In what CUPTI counts, each round begins with an empty L2
    cache and takes no layer twice, as a step finds its weights.

    Returns:
      "us": the GPU's time in kernels, as CUPTI counts it, or us_wall where it does not;
      "kernels_us": the same by kernel;
      "us_wall": with the gaps between kernels, and the host's time where that is longer.
    """
    layers = [jnp.int32(layer) for layer in range(num_layers)]

    def call_all(num_calls: int) -> None:
        answer = None
        # An answer is not kept: where each is large, they would not fit together.
        for call in range(num_calls):
            answer = program(operands, layers[call % num_layers])
        jax.block_until_ready(answer)

    call_all(1)
    start = time.perf_counter()
    call_all(1)
    num_calls = _CALLS if time.perf_counter() - start < 2e-3 else min(_CALLS, num_layers, 4)
    walls = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call_all(num_calls)
        walls.append((time.perf_counter() - start) / num_calls * 1e6)
    times: dict[str, Any] = {"us_wall": statistics.median(walls), "kernels_us": {}}
    num_calls = min(num_calls, num_layers) if num_layers > 1 else num_calls
    flush = _flush()

    def cold_rounds() -> None:
        for _ in range(_REPEATS):
            flush()
            call_all(num_calls)

    kernels = [kernel for kernel in profile(cold_rounds) if _FLUSH not in kernel[0]]
    if len(kernels) < _REPEATS:
        return {"us": times["us_wall"], **times}
    per_round = len(kernels) // _REPEATS
    by_name: list[dict[str, float]] = []
    for first in range(0, per_round * _REPEATS, per_round):
        sums: dict[str, float] = defaultdict(float)
        for name, milliseconds in kernels[first : first + per_round]:
            sums[name] += milliseconds * 1e3 / num_calls
        by_name.append(sums)
    times["kernels_us"] = {
        name: statistics.median(sums[name] for sums in by_name) for name in by_name[0]
    }
    return {"us": statistics.median(sum(sums.values()) for sums in by_name), **times}


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
def _flush() -> Callable[[], None]:
    """A function that writes more than the L2 cache holds, by a kernel with _FLUSH in its name."""
    if jax.default_backend() != "gpu":
        return lambda: None
    program = jax.jit(lambda x: x ^ 1, donate_argnums=0)
    buffer = [program(jnp.zeros((1 << 26,), jnp.int32))]

    def flush() -> None:
        buffer[0] = program(buffer[0])

    return flush


def _poison(num_bytes: int) -> None:
    """Leaves NaN in memory that the next outputs are likely to be given."""
    width = 1 << 24
    blocks = [jnp.full((width,), jnp.nan, jnp.float32) for _ in range(num_bytes // (4 * width))]
    jax.block_until_ready(blocks)
