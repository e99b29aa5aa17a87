"""Prefill and decode, compiled for a mesh: everything that runs on the device.

Knows no requests and not what a step does: shapes and specs in, one program a bucket out.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from glm_jax import speculation
from glm_jax.cache import KVCache, cache_spec
from glm_jax.config import ModelConfig
from glm_jax.kernels import DEFAULT_KERNELS, Kernels
from glm_jax.model import Weights, abstract_model, bind
from glm_jax.mtp import abstract_mtp, bind_mtp, weight_specs
from glm_jax.multi_step import decode_steps
from glm_jax.phases import Slots, StepResult, decode, prefill
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import WeightSpec, partition_spec, sharding_for

# An answer must not depend on how its step was fused, that is on the bucket and the mesh.
COMPILER_OPTIONS: dict[str, Any] = {
    # XLA may otherwise skip a rounding that the program asks for, in one fusion but not in another.
    "xla_allow_excess_precision": False,
    # On CPU, YNNPACK serves the products, whose rows it keeps apart, and nothing else: its reductions
    # change a row's bits with the rows beside it (jaxlib 0.12.0.1, prefill of 2 rows against 16).
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
# On GPUs a decode step is one graph, launched once: its loop over the layers too, which the graph holds
# unrolled, so that a layer costs a compilation once and nothing of the host ever.
_IN_GRAPHS = ["FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "CONDITIONAL", "WHILE",
              "DYNAMIC_SLICE_FUSION"]  # fmt: skip
GPU_COMPILER_OPTIONS: dict[str, Any] = {
    "xla_allow_excess_precision": False,
    "xla_gpu_command_buffer_unroll_loops": True,
    # A piece too small for a graph would split the rest.
    "xla_gpu_graph_min_graph_size": 1,
    # One row's pages are a slice that XLA would have its own kind of fusion hand to our kernels.
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # The output head is the product that cuBLAS chooses untuned. Tuning would choose anew at every
    # start, and with it the bits; Triton's tiles, untuned, take 14 to 40 times as long (64 and 256
    # rows on an H200; docs/kernel-log.md).
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
}


# Mosaic keeps in one place for all threads whether code is for a single thread of the GPU
# (jax 0.11 and 0.12, mosaic/gpu/utils.py): of kernels lowered side by side, one may come out with all
# threads doing what one is to do.
LOWERING = threading.Lock()


def compiler_options(mesh: Mesh, kernels: Kernels = DEFAULT_KERNELS) -> dict[str, Any]:
    """XLA's options for a step on the mesh, whose operations run so."""
    if mesh.devices.flat[0].platform != "gpu":
        return COMPILER_OPTIONS
    # Before 0.12, sums over devices could not be in a graph, and the option had no word for them.
    sums = ["COLLECTIVES_KERNEL", "COLLECTIVES"] if jax.__version_info__ >= (0, 12) else []
    options = GPU_COMPILER_OPTIONS | {"xla_gpu_enable_command_buffer": ",".join(_IN_GRAPHS + sums)}
    if not kernels.fused_all_reduce:
        # XLA's own kernels for small sums reach into other devices' memory too: all are NCCL's.
        options["xla_gpu_experimental_use_collective_kernels"] = ""
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """What neither the model nor the shapes decide about a step.

    Attributes:
      kv_dtype: of keys and values in the cache; None for that of the activations.
      kernels: how the heavy operations run.
    """

    kv_dtype: np.dtype | None = None
    kernels: Kernels = DEFAULT_KERNELS


DEFAULT_OPTIONS = StepOptions()


def slot_shapes(shapes: StepShapes) -> list[tuple[int, ...]]:
    """The shape of each array of Slots but those of drafting; all are int32."""
    return [(shapes.num_slots,), (shapes.num_slots,), (shapes.num_pages, shapes.page_size)]


class StepSpecs(NamedTuple):
    """What a step takes, before any array exists.

    Attributes:
      weights: by dotted path.
      cache: of keys, and the same of values.
      slots: of each array of Slots, in its place.
    """

    weights: dict[str, WeightSpec]
    cache: WeightSpec
    slots: Slots


def step_specs(
    config: ModelConfig,
    shapes: StepShapes,
    dtype: np.dtype,
    options: StepOptions = DEFAULT_OPTIONS,
) -> StepSpecs:
    """The arrays of every step of this model at these shapes."""
    kept = dtype if options.kv_dtype is None else options.kv_dtype
    is_drafting = shapes.num_drafts > 0
    integers = [
        WeightSpec(shape, np.dtype(np.int32), (None,) * len(shape)) for shape in slot_shapes(shapes)
    ]
    drafting = speculation.drafting_specs(config, shapes, dtype, kept) if is_drafting else None
    return StepSpecs(
        weight_specs(config, dtype, with_mtp=is_drafting),
        cache_spec(config, shapes, kept),
        Slots(*integers, drafting),  # type: ignore[arg-type]
    )


def step_function(
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    dtype: np.dtype,
    phase: Phase,
    options: StepOptions = DEFAULT_OPTIONS,
) -> jax.stages.Wrapped:
    """The jitted step of a phase: cache and slots are donated, weights stay."""
    body = _body(config, jnp.dtype(dtype), phase, options.kernels, shapes.num_drafts > 0)

    def once(
        weights: Weights, cache: KVCache, slots: Slots, controls: Array, batch: Array
    ) -> StepResult:
        return body(weights, cache, slots, controls, batch, shapes.pages_per_sequence)

    def several(
        weights: Weights, cache: KVCache, slots: Slots, controls: Array, batch: Array
    ) -> StepResult:
        def decode(cache: KVCache, slots: Slots, batch: Array) -> StepResult:
            return once(weights, cache, slots, controls, batch)

        return decode_steps(decode, cache, slots, batch, shapes.decode_steps)

    step = several if phase == "decode" and shapes.decode_steps > 1 else once

    step.__name__ = phase
    replicated = PartitionSpec()
    specs = step_specs(config, shapes, dtype, options)
    places = jax.tree.map(
        lambda spec: partition_spec(spec.axes), (specs.weights, _both(specs.cache), specs.slots)
    )
    # One shard_map around the whole step: sums over devices are where the model says, nowhere else.
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(*places, replicated, replicated),
        out_specs=(*places[1:], replicated),
        check_vma=False,
    )
    return jax.jit(
        sharded, donate_argnums=(1, 2), compiler_options=compiler_options(mesh, options.kernels)
    )


def _body(
    config: ModelConfig, dtype: jnp.dtype, phase: Phase, kernels: Kernels, is_drafting: bool
) -> Callable[..., StepResult]:
    """The phase as a function of weights in place of a model."""
    decoder = abstract_model(config, dtype, kernels)
    if not is_drafting:
        run = prefill if phase == "prefill" else decode
        return lambda weights, *arguments: run(bind(decoder, weights), *arguments)
    speculate = speculation.prefill if phase == "prefill" else speculation.decode
    mtp = abstract_mtp(config, dtype, kernels)

    def both(weights: Weights) -> speculation.Models:
        return speculation.Models(bind(decoder, weights), bind_mtp(mtp, weights))

    return lambda weights, *arguments: speculate(both(weights), *arguments)


def _both(spec: WeightSpec) -> KVCache:
    return KVCache(spec, spec)  # type: ignore[arg-type]


def lower(
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    dtype: np.dtype,
    phase: Phase,
    rows: int,
    options: StepOptions = DEFAULT_OPTIONS,
) -> jax.stages.Lowered:
    """Traces one step bucket from shapes alone, one at a time; no weights are needed."""
    specs = step_specs(config, shapes, dtype, options)

    def abstract(spec: WeightSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding_for(spec.axes, mesh))

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)

    function = step_function(config, shapes, mesh, dtype, phase, options)
    with LOWERING:
        return function.lower(
            *jax.tree.map(abstract, (specs.weights, _both(specs.cache), specs.slots)),
            integers(shapes.num_slots, shapes.control_columns),
            integers(rows, shapes.columns(phase)),
        )
