"""What a device's memory holds: weights, temporaries, keys and values, and what is left.

Knows no clock. Temporaries come from the compiler where it is installed, else from an estimate.
"""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from glm_jax.aot.topology import mesh_of, missing_wheels
from glm_jax.cache import page_bytes
from glm_jax.config import ModelConfig
from glm_jax.environment import MEMORY_SHARE
from glm_jax.kernels import Kernels
from glm_jax.model import abstract_weights
from glm_jax.runner import compile_steps
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import MESH_AXIS
from glm_jax.sizing import (
    SizingError,
    choose_shapes,
    shapes_within,
    weight_bytes,
)
from glm_jax.steps import StepOptions
from glm_jax.targets.target import Target

_UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server is asked to hold, as its options of the same names.

    Attributes:
      num_drafts: the server's --speculative-tokens.
    """

    max_concurrency: int
    max_seq_len: int
    max_batch_tokens: int
    num_drafts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One device's memory, in bytes.

    Attributes:
      total: what the device has.
      reserved: the driver's, NCCL's and XLA's own.
      weights: of the model.
      temporaries: of the largest step.
      kv: keys and values of every sequence at its longest.
      kv_tokens: positions that would fit in all, over all devices together.
      is_compiled: the temporaries are the compiler's, not an estimate.
    """

    total: int
    reserved: int
    weights: int
    temporaries: int
    kv: int
    kv_tokens: int
    is_compiled: bool

    @property
    def headroom(self) -> int:
        """Bytes left; negative when the settings do not fit."""
        return self.total - self.reserved - self.weights - self.temporaries - self.kv


def shapes_for(
    config: ModelConfig,
    target: Target,
    dtype: np.dtype,
    kv_dtype: np.dtype,
    limits: Limits,
) -> StepShapes:
    """The shapes to compile for a GPU target, with a page for every position promised.

    Raises:
      SizingError: the devices cannot share the model, or it has no sequences this long.
    """
    return shapes_within(
        config,
        AbstractMesh((target.num_devices,), (MESH_AXIS,)),
        dtype,
        platform="gpu",
        kv_bytes=_UNBOUNDED,
        kv_dtype=kv_dtype,
        max_concurrency=limits.max_concurrency,
        max_seq_len=limits.max_seq_len,
        max_batch_tokens=limits.max_batch_tokens,
        num_drafts=limits.num_drafts,
    )


def engine_shapes(
    config: ModelConfig,
    target: Target,
    mesh: Mesh,
    dtype: np.dtype,
    limits: Limits,
    kv_dtype: np.dtype | None = None,
) -> StepShapes:
    """The shapes an engine is compiled for: pages for every position promised, as far as they fit.

    Raises:
      SizingError: not even one sequence fits, or the limits are not the model's.
    """
    if target.memory is None:
        return choose_shapes(config, mesh, dtype, **asdict(limits), kv_dtype=kv_dtype)
    kept = dtype if kv_dtype is None else kv_dtype
    promised = shapes_for(config, target, dtype, kept, limits)
    memory = measure(config, target, promised, dtype, kept, may_compile=False)
    fitting = memory.kv_tokens // promised.page_size
    if fitting < promised.pages_per_sequence:
        raise SizingError(
            f"{target} has room for {memory.kv_tokens} positions beside the weights, and one "
            f"sequence can need {limits.max_seq_len}; lower --max-seq-len or use more devices"
        )
    return replace(promised, num_pages=min(promised.num_pages, fitting))


def estimate_temporaries(
    config: ModelConfig, target: Target, shapes: StepShapes, dtype: np.dtype
) -> int:
    """Bytes of the largest step as the reference operations take them.

    One layer's experts copied out of their stack; the float32 products of every expert of the
    device with every token; two rows of float32 logits for each row of the batch.
    """
    copied = sum(
        math.prod(spec.shape[1:]) * spec.dtype.itemsize // target.num_devices
        for path, spec in abstract_weights(config, dtype).items()
        if ".experts." in path and path.endswith(".values")
    )
    decoded = shapes.decode_buckets[-1] * shapes.tokens_per_step
    tokens = max(shapes.prefill_budget, decoded)
    rows = max(shapes.prefill_buckets[-1], decoded)
    width = max(2 * config.moe_intermediate_size, config.hidden_size)
    products = 4 * tokens * config.n_routed_experts // target.num_devices * width
    return copied + products + 8 * rows * config.vocab_size


def compile_temporaries(
    config: ModelConfig,
    target: Target,
    shapes: StepShapes,
    dtype: np.dtype,
    options: StepOptions,
) -> dict[tuple[Phase, int], int]:
    """Bytes of the largest step of each phase, from the compiler.

    Raises:
      TargetError: the compiler's wheels are not installed.
    """
    largest = replace(
        shapes,
        prefill_buckets=shapes.prefill_buckets[-1:],
        decode_buckets=shapes.decode_buckets[-1:],
    )
    programs = compile_steps(config, largest, mesh_of(target), dtype, options, num_workers=2)
    temporaries = {}
    for bucket, program in programs.items():
        analysis = program.memory_analysis()
        assert analysis is not None, "XLA analyses the memory of every program for a GPU"
        temporaries[bucket] = analysis.temp_size_in_bytes
    return temporaries


def measure(
    config: ModelConfig,
    target: Target,
    shapes: StepShapes,
    dtype: np.dtype,
    kv_dtype: np.dtype,
    *,
    may_compile: bool,
) -> Memory:
    """Accounts for a device's memory at these shapes."""
    assert target.memory is not None, "this machine's own memory is not planned for"
    is_compiled = may_compile and not missing_wheels()
    if is_compiled:
        # A plan is for any model and any number of devices, also where kernels are not.
        options = StepOptions(kv_dtype=kv_dtype, kernels=Kernels(allow_reference=True))
        temporaries = max(compile_temporaries(config, target, shapes, dtype, options).values())
    else:
        temporaries = estimate_temporaries(config, target, shapes, dtype)
    reserved = target.memory - int(MEMORY_SHARE * target.memory)
    with_mtp = shapes.num_drafts > 0
    weights = weight_bytes(config, dtype, target.num_devices, with_mtp=with_mtp)
    page = page_bytes(config, shapes.page_size, kv_dtype, with_mtp=with_mtp)
    free = max(0, target.memory - reserved - weights - temporaries)
    return Memory(
        total=target.memory,
        reserved=reserved,
        weights=weights,
        temporaries=temporaries,
        kv=shapes.num_slots * shapes.pages_per_sequence * page // target.num_devices,
        kv_tokens=free * target.num_devices // page * shapes.page_size,
        is_compiled=is_compiled,
    )


def refuse(
    config: ModelConfig,
    target: Target,
    memory: Memory,
    limits: Limits,
    page_size: int,
    dtype: np.dtype,
    kv_dtype: np.dtype,
) -> str | None:
    """Why the settings do not fit and which nearest ones do; None when they fit."""
    if memory.headroom >= 0:
        return None
    lacking = f"{target} lacks {-memory.headroom / 1e9:.1f} GB per device"
    wanted = f"{limits.max_concurrency} sequences of {limits.max_seq_len} positions"
    fitting = _nearest_that_fit(memory, limits, page_size, kv_dtype)
    if fitting:
        return f"{lacking} for {wanted}; what fits: {', or '.join(fitting)}"
    number = _smallest_that_holds(config, target, dtype)
    if number is None:
        return f"{lacking} for {wanted}; no number of {target.kind} holds the weights alone"
    if number > target.num_devices:
        return f"{lacking} for {wanted}; the weights alone need {target.kind}x{number}"
    return f"{lacking} for {wanted}; lower --max-batch-tokens from {limits.max_batch_tokens}"


def _nearest_that_fit(
    memory: Memory, limits: Limits, page_size: int, kv_dtype: np.dtype
) -> list[str]:
    """Options that would make it fit, each alone; none if no page fits beside the weights."""
    pages = memory.kv_tokens // page_size
    options = []
    if concurrency := pages // math.ceil(limits.max_seq_len / page_size):
        options.append(f"--max-concurrency {concurrency}")
    if length := pages // limits.max_concurrency * page_size:
        options.append(f"--max-seq-len {length}")
    if kv_dtype.itemsize == 2 and memory.headroom + memory.kv // 2 >= 0:
        options.append("--kv-cache-dtype fp8_e4m3")
    return options


def _smallest_that_holds(config: ModelConfig, target: Target, dtype: np.dtype) -> int | None:
    """Devices of the target's kind that hold the weights, at most one a kv head; None if none do."""
    assert target.memory is not None, "this machine's own memory is not planned for"
    usable = int(MEMORY_SHARE * target.memory)
    for number in range(1, config.num_key_value_heads + 1):
        is_even = config.num_key_value_heads % number == 0
        if is_even and weight_bytes(config, dtype, number) < usable:
            return number
    return None
