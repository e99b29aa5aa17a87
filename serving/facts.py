"""What is known of a loaded model, told to the start's log: sizes, memory, steps and where they came from.

Knows no HTTP and loads nothing.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from checkpoints.converted import is_converted
from checkpoints.inspection import parameters_of
from glm_jax.cache import page_bytes
from glm_jax.config import ModelConfig
from glm_jax.model import Weights
from glm_jax.native import library
from glm_jax.shapes import StepShapes
from serving.start import Start
from serving.wiring import Options

_HIT = "/jax/compilation_cache/cache_hits"
_hits: Counter[str] = Counter()


def _count(event: str, **_: object) -> None:
    # Weights may be made meanwhile, whose programs are no steps: those compile in threads of this name.
    if event == _HIT and threading.current_thread().name.startswith("compile"):
        _hits[event] += 1


jax.monitoring.register_event_listener(_count)


@contextmanager
def cached_steps() -> Iterator[list[int]]:
    """Holds, at its end, the number of steps that came from the cache of compiled programs."""
    before, found = _hits[_HIT], [0]
    yield found
    found[0] = _hits[_HIT] - before


def tell_model(start: Start, config: ModelConfig, options: Options) -> None:
    """Name, size and form of the model."""
    found = parameters_of(config)
    if options.load_format == "dummy":
        form = "random weights"
    else:
        form = "converted" if is_converted(options.model_dir) else "as published"
    dtype = "FP8" if config.is_fp8 else config.dtype
    start.tell(
        "model",
        f"{options.model_dir} ({dtype}, {form}): {_count_of(found.total)} parameters, "
        f"{_count_of(found.active)} for each token; {config.num_hidden_layers} layers, "
        f"{config.num_experts_per_tok} of {config.n_routed_experts} experts",
        directory=str(options.model_dir),
        dtype=dtype,
        form=form,
        parameters=found.total,
        active_parameters=found.active,
        mtp_parameters=found.mtp,
        layers=config.num_hidden_layers,
        experts=config.n_routed_experts,
    )


def tell_mesh(start: Start, mesh: Mesh, options: Options) -> None:
    """Which devices compute, in which form the operations run there, and with which JAX."""
    device = mesh.devices.flat[0]
    if device.platform == "gpu":
        operations = "kernels"
    else:
        operations = "C" if not options.plain_ops and library.is_available() else "plain operations"
    start.tell(
        "mesh",
        f"{mesh.size} x {device.device_kind}, running {operations}, JAX {jax.__version__}",
        devices=mesh.size,
        kind=device.device_kind,
        platform=device.platform,
        operations=operations,
        jax=jax.__version__,
    )


def tell_cache(
    start: Start, config: ModelConfig, shapes: StepShapes, mesh: Mesh, options: Options
) -> None:
    """How many tokens the KV cache holds, and how many requests of full length that is."""
    tokens = shapes.num_pages * shapes.page_size
    at_full_length = shapes.num_pages / shapes.pages_per_sequence
    text = f"{tokens:,} tokens, {at_full_length:,.0f} requests at full length"
    text += f" ({shapes.num_pages:,} pages of {shapes.page_size})"
    if shapes.prefill_budget < options.max_batch_tokens:
        text += (
            f"; a prefill step takes {shapes.prefill_budget} tokens, not "
            f"{options.max_batch_tokens}: more does not pay on this device"
        )
    start.tell(
        "KV cache",
        text,
        tokens=tokens,
        pages=shapes.num_pages,
        page_size=shapes.page_size,
        max_seq_len=shapes.max_seq_len,
        prefill_tokens=shapes.prefill_budget,
    )


def tell_steps(start: Start, shapes: StepShapes, num_cached: int | None) -> None:
    """Which buckets there are, and whether they were compiled.

    Args:
      num_cached: how many came from the cache of compiled programs; None: all from an engine.
    """
    prefill = [rows * shapes.prefill_tile for rows in shapes.prefill_buckets]
    number = len(prefill) + len(shapes.decode_buckets)
    if num_cached is None:
        origin = "all loaded from the engine"
    elif num_cached >= number:
        origin = "all loaded from the cache"
    else:
        origin = f"{number - num_cached} compiled, {num_cached} loaded from the cache"
    start.tell(
        "steps",
        f"prefill of {_list(prefill)} tokens, decode of {_list(shapes.decode_buckets)} rows; {origin}",
        prefill_tokens=prefill,
        decode_rows=list(shapes.decode_buckets),
        compiled=0 if num_cached is None else max(0, number - num_cached),
    )


def tell_weights(start: Start, weights: Weights) -> None:
    """How many bytes were read or made, all devices together, and how fast."""
    nbytes, seconds = sum(array.nbytes for array in weights.values()), start.phases["weights"]
    start.tell(
        "weights",
        f"{_gb(nbytes)} at {nbytes / seconds / 1e9:.2f} GB/s",
        bytes=nbytes,
        seconds=round(seconds, 3),
    )


def tell_memory(
    start: Start,
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    weights: Weights,
    kv_dtype: object,
) -> None:
    """What one device holds, and what it has left once every step has run."""
    device = mesh.local_mesh.devices.flat[0]
    # Every device has a part of every weight, or all of it.
    held = sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in weights.values()
    )
    with_mtp = shapes.num_drafts > 0
    page = page_bytes(config, shapes.page_size, kv_dtype, with_mtp=with_mtp)  # type: ignore[arg-type]
    cache = shapes.num_pages * page // mesh.size
    stats = device.memory_stats() or {}
    limit, most = stats.get("bytes_limit"), stats.get("peak_bytes_in_use")
    text = f"weights {_gb(held)}, KV cache {_gb(cache)} on each device"
    if limit and most:
        text += (
            f"; of {_gb(limit)}, {_gb(most)} at most in use so far and {_gb(limit - most)} never"
        )
    start.tell(
        "memory",
        text,
        weight_bytes=held,
        kv_bytes=cache,
        limit_bytes=limit,
        peak_bytes=most,
    )


def _list(numbers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _count_of(number: int) -> str:
    """In: 8_200_000. Out: 8.2 M."""
    if number >= 1e9:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.1f} M"
