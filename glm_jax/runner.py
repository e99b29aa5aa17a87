"""The device side of the engine: compiled buckets, weights, cache and slots; one call a step.

Knows neither requests nor policy. Every bucket is compiled before the first step, and an executable
cannot compile again: a batch of another shape is an error, never a pause.
"""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.model import Weights
from glm_jax.scoring import lower_score
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import sharding_for
from glm_jax.steps import DEFAULT_OPTIONS, Slots, StepOptions, lower, step_specs

Bucket = tuple[Phase, int]
Programs = dict[Bucket, jax.stages.Compiled]


def buckets(shapes: StepShapes) -> list[Bucket]:
    """Every (phase, rows) the engine can dispatch."""
    prefill: list[Bucket] = [("prefill", rows) for rows in shapes.prefill_buckets]
    return prefill + [("decode", rows) for rows in shapes.decode_buckets]


def compile_steps(
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    dtype: np.dtype,
    options: StepOptions = DEFAULT_OPTIONS,
    *,
    on_compiled: Callable[[Bucket, float], object] = lambda bucket, seconds: None,
    num_workers: int = 4,
) -> Programs:
    """Compiles every bucket, several at a time, from shapes alone; weights may load meanwhile.

    Args:
      on_compiled: told each bucket and the seconds it took, from this thread.
      num_workers: compilations at once; XLA holds no lock while it compiles.
    """

    def build(bucket: Bucket) -> tuple[jax.stages.Compiled, float]:
        start = time.perf_counter()
        program = lower(config, shapes, mesh, dtype, *bucket, options).compile()
        return program, time.perf_counter() - start

    programs: Programs = {}
    with ThreadPoolExecutor(num_workers, thread_name_prefix="compile") as pool:
        futures = {pool.submit(build, bucket): bucket for bucket in buckets(shapes)}
        for future in as_completed(futures):
            programs[futures[future]], seconds = future.result()
            on_compiled(futures[future], seconds)
    return programs


def lower_cache(
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    dtype: np.dtype,
    options: StepOptions = DEFAULT_OPTIONS,
) -> jax.stages.Lowered:
    """Traces the program that makes the empty cache where it lives."""
    spec = step_specs(config, shapes, dtype, options).cache
    sharding = sharding_for(spec.axes, mesh)
    zeros = partial(jnp.zeros, spec.shape, spec.dtype)
    return jax.jit(zeros, out_shardings=sharding).lower()


class Runner:
    """Holds the arrays on the device and runs one compiled step after another.

    Args:
      weights: by dotted path, placed on the mesh.
      programs: every bucket of shapes, from compile_steps.
      make_zeros: the program of lower_cache, compiled; compiled here when not given.
      options: those the programs were compiled with.
    """

    def __init__(
        self,
        config: ModelConfig,
        shapes: StepShapes,
        mesh: Mesh,
        dtype: np.dtype,
        weights: Weights,
        programs: Programs,
        make_zeros: Callable[[], jax.Array] | None = None,
        options: StepOptions = DEFAULT_OPTIONS,
    ) -> None:
        missing = set(buckets(shapes)) - programs.keys()
        if missing:
            raise ValueError(f"no compiled step for the buckets {sorted(missing)}")
        self.shapes = shapes
        self._weights = weights
        self._lower_score = partial(lower_score, config, shapes, mesh, dtype, options)
        self._score: jax.stages.Compiled | None = None
        self._score_lock = threading.Lock()
        self._programs = programs
        self._replicated = NamedSharding(mesh, PartitionSpec())
        zeros = make_zeros or lower_cache(config, shapes, mesh, dtype, options).compile()
        self._cache = KVCache(zeros(), zeros())
        self._slots: Slots = jax.tree.map(
            # From the host, since a program would be compiled here; the largest are one layer's pages.
            lambda spec: jax.device_put(
                np.zeros(spec.shape, spec.dtype), sharding_for(spec.axes, mesh)
            ),
            step_specs(config, shapes, dtype, options).slots,
        )
        self.control(np.zeros((shapes.num_slots, shapes.control_columns), np.int32))

    def _upload(self, array: np.ndarray) -> jax.Array:
        if self._replicated.is_fully_addressable:
            return jax.device_put(array, self._replicated)
        # Each process has the whole array; device_put would ask all others whether it is the same.
        return jax.make_array_from_process_local_data(self._replicated, array, array.shape)

    def control(self, controls: np.ndarray) -> None:
        """From the next step on: int32[slots, control_columns] in place of the controls so far."""
        self._controls = self._upload(controls)

    def dispatch(self, phase: Phase, batch: np.ndarray) -> jax.Array:
        """Starts a step and returns at once.

        Args:
          phase: which step.
          batch: int32[rows, shapes.columns(phase)], rows a bucket of the phase.

        Returns:
          int32[NUM_OUTPUTS, rows], being computed: np.asarray waits for it. See shapes.OUTPUT_TOKENS.
          Of a decode step with drafts int32[tokens_per_step, NUM_OUTPUTS, rows], with token -1 where a
          row has no further one.

        Raises:
          KeyError: rows is not a bucket.
        """
        program = self._programs[phase, batch.shape[0]]
        self._cache, self._slots, output = program(
            self._weights, self._cache, self._slots, self._controls, self._upload(batch)
        )
        output.copy_to_host_async()
        return output

    def prepare_scores(self) -> None:
        """Compiles what `score` runs, once; any thread. Nobody but who asks for scores needs it."""
        with self._score_lock:
            if self._score is None:
                self._score = self._lower_score().compile()

    def score(self, batch: np.ndarray, targets: np.ndarray) -> jax.Array:
        """Starts to score rows of a prefill step that was dispatched before, and returns at once.

        Args:
          batch: int32[shapes.score_rows, shapes.columns("prefill")].
          targets: int32[shapes.score_rows, shapes.prefill_tile], the token after each position.

        Returns:
          int32[NUM_SCORE_OUTPUTS, score_rows * prefill_tile]; np.asarray waits for it.
        """
        self.prepare_scores()
        assert self._score is not None
        uploads = self._upload(batch), self._upload(targets)
        self._cache, output = self._score(self._weights, self._cache, *uploads)
        output.copy_to_host_async()
        return output

    def warm_up(self, phases: Iterable[Bucket] | None = None) -> None:
        """Runs every bucket once on padding rows, so that no first request pays for lazy set-up."""
        for phase, rows in phases or buckets(self.shapes):
            batch = np.zeros((rows, self.shapes.columns(phase)), np.int32)
            batch[:, 0] = self.shapes.num_slots
            np.asarray(self.dispatch(phase, batch))
