"""How kernels are timed and checked: on fresh inputs, over poisoned memory, against what the card can do.

Knows no kernel. A case is called as a step calls it, once for each layer of its operands, and all of that
is one program: without graphs, where CUPTI times each kernel, and as one graph, where gaps count too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from glm_jax.pallas.chip import Chip
from glm_jax.pallas.launch_order import overlapping
from glm_jax.sharding import make_mesh
from glm_jax.steps import compiler_options
from tests.perf.alone import alone
from tests.perf.clock import LOWERING, ONE_BY_ONE, by_kernel, in_graph, time_program
from tests.perf.peers import Peer

# A step takes the case's operands and a layer, and returns arrays.
Step = Callable[[Any, Any], Any]

_OURS = "mosaic_gpu_kernel"
# XLA may leave out roundings to bfloat16 that the kernels and the layers make.
rounded = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
_NO_GRAPH = {"xla_gpu_enable_command_buffer": ""}


@dataclass(frozen=True)
class Part:
    """Some of the kernels that a case runs.

    Attributes:
      name: of what they do together.
      ours, theirs: patterns of their kernels' names, and of those of peers that do the same.
      bytes: fewest bytes of device memory that they move.
    """

    name: str
    ours: str
    theirs: str
    bytes: float


@dataclass(frozen=True)
class Case:
    """One kernel at one shape, or several as a step runs them one after the other.

    Attributes:
      kernel: its module and function.
      shape: what of the shape varies, for people.
      draw: makes the operands from a key.
      num_layers: layers that the operands hold; timed calls take them in turn.
      step: the kernel, a function of the operands and a layer.
      reference: the same in XLA's own operations, in float32 where it matters.
      errors: relative errors of the kernel's outputs against the reference's, by name.
      tolerance: what the largest of them may be.
      bytes: fewest bytes of device memory a call moves.
      operations: floating-point operations, FP8 or bfloat16 as `unit` says.
      unit: "fp8" or "bf16".
      is_float32: the reference's products are of float32, whose form in Triton is compiled for minutes.
        Of FP8, only that form adds in float32: cuBLAS adds as our kernels' instructions do.
      phase: of the steps that run this: "decode", "prefill", or "" where none does.
      written: places of the operands that all calls share and write, counters and pages: the step gets
        them as Refs, where it is not interpreted.
      knows_layer: the step is traced for each layer, which it takes as a number.
      parts: of a case that is several kernels.
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
    phase: str = "decode"
    written: tuple[int, ...] = ()
    knows_layer: bool = False
    parts: tuple[Part, ...] = ()
    is_timed_alone: bool = False
    alternatives: dict[str, Step] = field(default_factory=dict)
    peers: dict[str, Peer] = field(default_factory=dict)


@dataclass(frozen=True)
class Programs:
    """What a case runs, compiled: many cases' at once, since XLA takes longer to compile than to run.

    Attributes:
      draw: makes the operands.
      calls: of kept and written operands (see split): the step with each layer, and what was written.
        Its kernels do not overlap.
      graph: the same as one graph, of kernels that begin early as they do in steps; None where steps
        are no graph.
      reference, errors: as the case's.
    """

    draw: Callable[..., Any]
    calls: Callable[..., Any]
    graph: Callable[..., Any] | None
    reference: Callable[..., Any]
    errors: Callable[..., Any]


def split(case: Case, operands: Any) -> tuple[Any, list[Any]]:
    """The operands that calls keep, and those that they write."""
    if not case.written:
        return operands, []
    kept = tuple(None if at in case.written else x for at, x in enumerate(operands))
    return kept, [operands[at] for at in case.written]


def all_layers(case: Case) -> Callable[[Any, list[Any]], tuple[list[Any], list[Any]]]:
    """A function of what split returns: the outputs of a call for each layer, and what they wrote."""
    # Traced and lowered once; not with what was traced of the same case before.
    once = jax.jit(lambda operands, layer: case.step(operands, layer))
    step = case.step if case.knows_layer else lambda operands, n: once(operands, jnp.int32(n))

    def run(kept: Any, written: list[Any]) -> tuple[list[Any], list[Any]]:
        refs = jax.tree.map(jax.new_ref, written)
        operands = kept
        if refs:
            operands = [*kept]
            for at, ref in zip(case.written, refs, strict=True):
                operands[at] = ref
            operands = tuple(operands)
        outputs = [step(operands, layer) for layer in range(case.num_layers)]
        return outputs, jax.tree.map(jax.freeze, refs)

    return run


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


def on_mesh[**P, T](function: Callable[P, T], mesh: Mesh) -> Callable[P, T]:
    """The function on the one device of a mesh, as steps run."""
    place = PartitionSpec()
    sharded: Any = jax.shard_map(
        function, mesh=mesh, in_specs=place, out_specs=place, check_vma=False
    )
    return sharded


def compile_case(case: Case, mesh: Mesh | None = None) -> Programs:
    """Compiles everything the case itself runs, without running any of it, with a step's options.

    Args:
      mesh: of a device that is not here, to be compiled for.
    """
    mesh = mesh or make_mesh(1)
    on, options = partial(on_mesh, mesh=mesh), compiler_options(mesh)
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    no_graph = options | _NO_GRAPH if is_gpu else options
    # References are run once: trying ways to run them would take longer than anything else here.
    plain = no_graph | {"xla_gpu_enable_triton_gemm": not case.is_float32} if is_gpu else options
    key, layer = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
    with LOWERING:
        draw = jax.jit(on(case.draw)).lower(key)
    operands = draw.out_info

    def lowered() -> jax.stages.Lowered:
        run = jax.jit(on(all_layers(case)), donate_argnums=1)
        with LOWERING:
            return run.lower(*split(case, operands))

    has_graph = is_gpu and case.phase != "prefill" and not case.is_timed_alone
    # Nothing of XLA's is between the calls, and whoever reads what they made waits for all of it.
    with overlapping():
        graph = lowered() if has_graph else None
    with alone():
        calls = lowered()
    reference = jax.jit(on(case.reference)).lower(operands, layer)
    errors = jax.jit(on(case.errors)).lower(calls.out_info[0][0], reference.out_info)
    return Programs(
        draw=draw.compile(compiler_options=plain),
        calls=calls.compile(compiler_options=no_graph),
        graph=graph and graph.compile(compiler_options=options | ONE_BY_ONE),
        reference=reference.compile(compiler_options=plain),
        errors=errors.compile(compiler_options=plain),
    )


def compile_alternatives(case: Case) -> dict[str, Callable[..., Any]]:
    """Compiles the case's alternatives, tuned as XLA does it."""
    if not case.alternatives:
        return {}
    on = partial(on_mesh, mesh=make_mesh(1))
    operands = jax.eval_shape(on(case.draw), jax.eval_shape(lambda: jax.random.key(0)))
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    return {
        name: jax.jit(on(step)).lower(operands, layer).compile()
        for name, step in case.alternatives.items()
    }


def check(case: Case, programs: Programs, seed: int, poisoned_bytes: int) -> float:
    """The largest relative error of one call on fresh inputs; infinite where it is no number."""
    operands = programs.draw(jax.random.key(seed))
    layer = seed % case.num_layers
    expected = jax.block_until_ready(programs.reference(operands, jnp.int32(layer)))
    _poison(poisoned_bytes)
    run = programs.graph or programs.calls
    outputs, _ = jax.block_until_ready(run(*split(case, operands)))
    return largest(programs.errors(outputs[layer], expected))


def check_interpreted(case: Case, seed: int) -> float:
    """The same at once, for kernels that are interpreted."""
    on = partial(on_mesh, mesh=make_mesh(1))
    operands = on(case.draw)(jax.random.key(seed))
    layer = seed % case.num_layers
    expected = rounded(on(case.reference))(operands, jnp.int32(layer))
    if case.knows_layer:
        got = rounded(on(lambda operands: case.step(operands, layer)))(operands)
    else:
        got = rounded(on(case.step))(operands, jnp.int32(layer))
    return largest(case.errors(got, expected))


def largest(errors: dict[str, jax.Array]) -> float:
    """The largest error, infinite if one is no number."""
    values = [float(error) for error in errors.values()]
    return max(value if value == value else float("inf") for value in values)


def measure(case: Case, programs: Programs) -> dict[str, Any]:
    """Microseconds of one call: "us", in kernels, the median; "kernels_us", the same by kernel;
    "us_graph", in a graph of all layers, with the gaps between kernels, where there is one.

    Each round begins with an empty L2 cache and takes no layer twice, as a step finds its weights.
    Without CUPTI, "us" is the host's time and counts what the host does.
    """
    run = _Calls(case, programs)
    times = by_kernel(lambda: run(programs.calls), case.num_layers)
    if case.is_timed_alone and times["kernels_us"]:
        times["us"] = sum(us for name, us in times["kernels_us"].items() if _OURS in name)
    if programs.graph is not None:
        graph = programs.graph
        times["us_graph"] = in_graph(lambda: run(graph), case.num_layers)
    return times


class _Calls:
    """A case's operands, and what its calls wrote last."""

    def __init__(self, case: Case, programs: Programs) -> None:
        operands = jax.block_until_ready(programs.draw(jax.random.key(0)))
        self._kept, self._written = split(case, operands)

    def __call__(self, program: Callable[..., Any]) -> Any:
        """Hands over a program; returns its outputs, which nobody has waited for."""
        outputs, self._written = program(self._kept, self._written)
        return outputs


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


def _poison(num_bytes: int) -> None:
    """Leaves NaN in memory that the next outputs are likely to be given."""
    width = 1 << 24
    blocks = [jnp.full((width,), jnp.nan, jnp.float32) for _ in range(num_bytes // (4 * width))]
    jax.block_until_ready(blocks)
