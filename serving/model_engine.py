"""From a checkpoint directory to an engine: mesh, shapes, compiled steps and weights.

Knows no HTTP. Steps come from an engine directory, or compile from shapes alone while the weights
stream in.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from checkpoints.dummy import dummy_weights
from checkpoints.load import Reading, load_weights
from checkpoints.progress import has_bars
from checkpoints.reader import CheckpointError
from glm_jax.aot.saved import EngineMismatchError, SavedEngine, load
from glm_jax.cache import KV_DTYPES
from glm_jax.config import ConfigError, ModelConfig
from glm_jax.engine.engine import Engine
from glm_jax.kernels import Kernels
from glm_jax.model import Weights
from glm_jax.mtp import weight_specs
from glm_jax.processes import Followers, Leader, LeadingRunner, Member, ProcessesError, join
from glm_jax.runner import Bucket, Programs, Runner, buckets, compile_steps
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh
from glm_jax.sizing import NO_MTP_LAYER, SizingError, choose_shapes
from glm_jax.steps import StepOptions
from serving.bridge import CannotStartError
from serving.facts import (
    cached_steps,
    tell_cache,
    tell_memory,
    tell_mesh,
    tell_model,
    tell_steps,
    tell_weights,
)
from serving.start import Start
from serving.tokenizer import ModelTokenizer
from serving.wiring import Options

logger = logging.getLogger(__name__)

# In what XLA says where a device cannot reach into another's memory, and where NCCL is older than 2.29.2.
_NO_PEER_MEMORY = "ncclGetPeerDevicePointer"

_DUMMY_SEED = 0
_CACHE_DIRECTORY = Path("~/.cache/glm-jax/steps")


def build_engine(options: Options, tokenizer: ModelTokenizer, start: Start | None = None) -> Engine:
    """Loads the model of options.model_dir, and loads or compiles its steps.

    Args:
      start: told each phase and its seconds, "weights", "load" or "compile", "warm_up", "total",
        and what becomes known of model, devices, memory and steps.

    Raises:
      CannotStartError: the checkpoint, the devices and the options do not fit together; the message
        is for the user.
    """
    try:
        return _build(options, tokenizer, start or Start())
    except EngineMismatchError as error:
        raise CannotStartError(f"{error}, or add --engine-fallback to compile") from error
    except (
        ConfigError,
        CheckpointError,
        SizingError,
        NotImplementedError,
        ProcessesError,
    ) as error:
        raise CannotStartError(str(error)) from error


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its devices, without any compiled step.

    Attributes:
      dtype: of activations.
      weights: by dotted path.
    """

    config: ModelConfig
    mesh: Mesh
    dtype: np.dtype
    weights: Weights


def load_model(options: Options, tokenizer: ModelTokenizer) -> LoadedModel:
    """Loads the model of options.model_dir.

    Raises:
      CannotStartError: as build_engine.
    """
    try:
        config = _config(options, tokenizer)
        mesh, dtype = _mesh(options.num_gpus), np.dtype(jax.numpy.bfloat16)
        _keep_compiled_steps()
        return LoadedModel(config, mesh, dtype, _weights(options, config, mesh, dtype))
    except (ConfigError, CheckpointError, SizingError) as error:
        raise CannotStartError(str(error)) from error


def engine_of(model: LoadedModel, options: Options) -> Engine:
    """Compiles the steps of a loaded model.

    Raises:
      CannotStartError: as build_engine.
    """
    config, mesh, dtype, how = model.config, model.mesh, model.dtype, step_options(options)
    try:
        shapes = _shapes(options, config, mesh, dtype)
        programs = _compile(config, shapes, mesh, dtype, how)
    except (SizingError, NotImplementedError) as error:
        raise CannotStartError(str(error)) from error
    runner = Runner(config, shapes, mesh, dtype, model.weights, programs, options=how)
    return _engine(runner, options)


def _build(options: Options, tokenizer: ModelTokenizer, start: Start) -> Engine:
    with start.phase("total"):
        followers = _joined(options, Followers)
        config = _config(options, tokenizer)
        tell_model(start, config, options)
        mesh, dtype = _mesh(options.num_gpus), np.dtype(jax.numpy.bfloat16)
        tell_mesh(start, mesh, options)
        saved = _saved_engine(options, config, mesh, dtype, start)
        shapes = saved.shapes if saved else _shapes(options, config, mesh, dtype)
        tell_cache(start, config, shapes, mesh, options)
        if followers is not None:
            followers.begin(shapes, _what(config, mesh, options))
        runner = _runner(options, config, shapes, mesh, dtype, saved, start)
    return _engine(runner if followers is None else LeadingRunner(runner, followers), options)


def follow(options: Options) -> None:
    """Computes what process 0 computes, with this process's devices, until process 0 ends.

    Raises:
      CannotStartError: as build_engine; or the processes do not belong together.
    """
    try:
        leader = _joined(options, Leader)
        assert leader is not None, "a lone process follows nobody"
        config = _config(options, ModelTokenizer.from_directory(options.model_dir))
        mesh, dtype = _mesh(options.num_gpus), np.dtype(jax.numpy.bfloat16)
        shapes = leader.begun(_what(config, mesh, options))
        runner = _runner(options, config, shapes, mesh, dtype, None, Start())
        # Whoever ends all processes at once means process 0, which finishes first what it has begun.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        leader.follow(runner)
    except (
        ConfigError,
        CheckpointError,
        SizingError,
        NotImplementedError,
        ProcessesError,
        ValueError,
    ) as error:
        raise CannotStartError(str(error)) from error


def _joined[T](options: Options, connect: Callable[[Member], T]) -> T | None:
    """This process's connections to the others; None where it is alone."""
    if options.coordinator is None:
        return None
    if options.engine is not None:
        raise ProcessesError("an engine directory is for one process: leave --engine out")
    member = Member(options.coordinator, options.num_processes, options.process_id)
    logger.info("process %d of %d: waiting for all", member.process_id, member.num_processes)
    join(member)
    return connect(member)


def _what(config: ModelConfig, mesh: Mesh, options: Options) -> str:
    """What all processes must have in common, in few words."""
    same = (config, mesh.size, step_options(options), options.load_format, jax.__version__)
    return sha256(repr(same).encode()).hexdigest()[:16]


def _runner(
    options: Options,
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    dtype: np.dtype,
    saved: SavedEngine | None,
    start: Start,
) -> Runner:
    """Loads weights and steps at the same time, and runs every step once."""
    how = step_options(options)
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as pool:
        programs = pool.submit(_programs, saved, config, shapes, mesh, dtype, how, start)
        with start.phase("weights"):
            weights = _weights(options, config, mesh, dtype)
        tell_weights(start, weights)
        zeros = saved.make_zeros if saved else None
        runner = Runner(config, shapes, mesh, dtype, weights, programs.result(), zeros, how)
    with start.phase("warm_up"):
        _warm_up(runner)
    tell_memory(start, config, shapes, mesh, weights, how.kv_dtype or dtype)
    return runner


def _engine(runner: Runner | LeadingRunner, options: Options) -> Engine:
    return Engine(
        runner, runner.shapes, options.queue_size, integrity_interval=options.integrity_interval
    )


def _config(options: Options, tokenizer: ModelTokenizer) -> ModelConfig:
    config = ModelConfig.from_directory(options.model_dir)
    if tokenizer.size > config.vocab_size:
        raise ConfigError(
            f"tokenizer.json has {tokenizer.size} tokens and config.json's vocab_size is "
            f"{config.vocab_size}: they are not of the same model"
        )
    return config


def _limits(options: Options) -> dict[str, int]:
    return {
        "max_concurrency": options.max_concurrency,
        "max_seq_len": options.max_seq_len,
        "max_batch_tokens": options.max_batch_tokens,
        "num_drafts": options.speculative_tokens,
    }


def _shapes(options: Options, config: ModelConfig, mesh: Mesh, dtype: np.dtype) -> StepShapes:
    kv_dtype = step_options(options).kv_dtype
    shapes = choose_shapes(config, mesh, dtype, **_limits(options), kv_dtype=kv_dtype)
    return replace(shapes, decode_steps=options.decode_steps)


def _warm_up(runner: Runner) -> None:
    try:
        runner.warm_up()
    except jax.errors.JaxRuntimeError as error:
        if _NO_PEER_MEMORY not in str(error):
            raise
        raise CannotStartError(
            "sums over devices are made by kernels that write into each other's memory, and NCCL "
            "does not give it to them on this host (its own message is in the log; none is there where "
            "it is older than 2.29.2): --plain-sums has NCCL make the sums"
        ) from error


def step_options(options: Options) -> StepOptions:
    """How steps are to be computed, as the command line says it."""
    return StepOptions(
        kv_dtype=KV_DTYPES[options.kv_cache_dtype],
        kernels=Kernels(
            allow_reference=options.allow_reference_ops,
            native=not options.plain_ops,
            fused_all_reduce=not options.plain_sums,
        ),
    )


def _saved_engine(
    options: Options, config: ModelConfig, mesh: Mesh, dtype: np.dtype, start: Start
) -> SavedEngine | None:
    """The engine of --engine; None where steps are to be compiled."""
    if options.engine is None:
        return None
    try:
        if options.decode_steps > 1:
            raise EngineMismatchError(
                "an engine's decode steps are single: leave --decode-steps out"
            )
        with start.phase("load"):
            how = step_options(options)
            return load(config, mesh, dtype, _limits(options), options.engine, how)
    except EngineMismatchError as error:
        if not options.engine_fallback:
            raise
        logger.warning("%s; compiling instead", error)
        return None


def _programs(
    saved: SavedEngine | None,
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    dtype: np.dtype,
    how: StepOptions,
    start: Start,
) -> Programs:
    if saved is not None:
        tell_steps(start, shapes, None)
        return saved.programs
    _keep_compiled_steps()
    with start.phase("compile"), cached_steps() as cached:
        programs = _compile(config, shapes, mesh, dtype, how)
    tell_steps(start, shapes, cached[0])
    return programs


def _mesh(num_devices: int) -> Mesh:
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        # The extra aot brings JAX's CUDA plugin without CUDA, which it then complains about at length.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = jax.devices()
    if devices[0].platform == "cpu" and num_devices > len(devices):
        logger.info("no GPU: the mesh is %d CPU device(s), not %d", len(devices), num_devices)
        num_devices = len(devices)
    try:
        mesh = make_mesh(num_devices)
    except ValueError as error:
        raise SizingError(f"{error}; lower --num-gpus") from error
    return mesh


def _keep_compiled_steps() -> None:
    """Keeps executables on disk, so that the next start on this machine compiles nothing anew."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(_CACHE_DIRECTORY.expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _compile(
    config: ModelConfig, shapes: StepShapes, mesh: Mesh, dtype: np.dtype, how: StepOptions
) -> Programs:
    number = len(buckets(shapes))
    with tqdm(total=number, desc="compiling steps", unit="step", disable=not has_bars()) as bar:
        done = 0

        def on_compiled(bucket: Bucket, seconds: float) -> None:
            nonlocal done
            done += 1
            bar.update()
            if bar.disable:
                phase, rows = bucket
                logger.info("step %d of %d: %s %d, %.1f s", done, number, phase, rows, seconds)

        return compile_steps(
            config,
            shapes,
            mesh,
            dtype,
            how,
            on_compiled=on_compiled,
            num_workers=os.cpu_count() or 1,
        )


def _weights(options: Options, config: ModelConfig, mesh: Mesh, dtype: np.dtype) -> Weights:
    if options.speculative_tokens and not config.num_nextn_predict_layers:
        raise SizingError(NO_MTP_LAYER)
    specs = weight_specs(config, dtype, with_mtp=options.speculative_tokens > 0)
    if options.load_format == "dummy":
        return dummy_weights(specs, mesh, _DUMMY_SEED)
    reading = Reading(num_readers=options.load_readers)
    return load_weights(options.model_dir, config, specs, mesh, reading=reading)
