"""From a checkpoint directory to an engine: mesh, shapes, compiled steps and weights.

Knows no HTTP. Steps compile from shapes alone while the weights stream in.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from checkpoints.dummy import dummy_weights
from checkpoints.load import load_weights
from checkpoints.reader import CheckpointError
from glm_jax.config import ConfigError, ModelConfig
from glm_jax.engine.engine import Engine
from glm_jax.model import Weights, abstract_weights
from glm_jax.runner import Programs, Runner, buckets, compile_steps
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh
from glm_jax.sizing import SizingError, choose_shapes
from serving.bridge import CannotStartError
from serving.tokenizer import ModelTokenizer
from serving.wiring import Options

logger = logging.getLogger(__name__)

_DUMMY_SEED = 0
_CACHE_DIRECTORY = Path("~/.cache/glm-jax/steps")


def build_engine(options: Options, tokenizer: ModelTokenizer) -> Engine:
    """Loads the model of options.model_dir and compiles its steps.

    Raises:
      CannotStartError: the checkpoint, the devices and the options do not fit together; the message
        is for the user.
    """
    try:
        return _build(options, tokenizer)
    except (ConfigError, CheckpointError, SizingError) as error:
        raise CannotStartError(str(error)) from error


def _build(options: Options, tokenizer: ModelTokenizer) -> Engine:
    start = time.perf_counter()
    config = ModelConfig.from_directory(options.model_dir)
    if tokenizer.size > config.vocab_size:
        raise ConfigError(
            f"tokenizer.json has {tokenizer.size} tokens and config.json's vocab_size is "
            f"{config.vocab_size}: they are not of the same model"
        )
    mesh, dtype = _mesh(options.num_gpus), np.dtype(jax.numpy.bfloat16)
    shapes = choose_shapes(
        config,
        mesh,
        dtype,
        max_concurrency=options.max_concurrency,
        max_seq_len=options.max_seq_len,
        max_batch_tokens=options.max_batch_tokens,
    )
    _log_shapes(shapes, options.max_batch_tokens)
    _keep_compiled_steps(options.engine)
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as pool:
        programs = pool.submit(_compile, config, shapes, mesh, dtype)
        weights = _weights(options, config, mesh, dtype)
        runner = Runner(config, shapes, mesh, dtype, weights, programs.result())
    runner.warm_up()
    logger.info("ready after %.1f s", time.perf_counter() - start)
    return Engine(runner, shapes, options.queue_size)


def _mesh(num_devices: int) -> Mesh:
    devices = jax.devices()
    platform, kind = devices[0].platform, devices[0].device_kind
    if platform == "cpu" and num_devices > len(devices):
        logger.info("no GPU: the mesh is %d CPU device(s), not %d", len(devices), num_devices)
        num_devices = len(devices)
    try:
        mesh = make_mesh(num_devices)
    except ValueError as error:
        raise SizingError(f"{error}; lower --num-gpus") from error
    logger.info("mesh: %d x %s", mesh.size, kind)
    return mesh


def _log_shapes(shapes: StepShapes, max_batch_tokens: int) -> None:
    logger.info(
        "KV cache: %d pages of %d positions, %d tokens in all",
        shapes.num_pages,
        shapes.page_size,
        shapes.num_pages * shapes.page_size,
    )
    if shapes.prefill_budget < max_batch_tokens:
        logger.info(
            "a prefill step takes %d tokens, not %d: more does not pay on this device",
            shapes.prefill_budget,
            max_batch_tokens,
        )


def _keep_compiled_steps(directory: Path | None) -> None:
    """Keeps executables on disk, so that the next start compiles nothing."""
    if directory is None and jax.config.jax_compilation_cache_dir is not None:
        return
    directory = (directory or _CACHE_DIRECTORY).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _compile(config: ModelConfig, shapes: StepShapes, mesh: Mesh, dtype: np.dtype) -> Programs:
    start = time.perf_counter()
    with tqdm(total=len(buckets(shapes)), desc="compiling steps", unit="step", disable=None) as bar:
        programs = compile_steps(
            config,
            shapes,
            mesh,
            dtype,
            on_compiled=lambda bucket, seconds: bar.update(),
            num_workers=os.cpu_count() or 1,
        )
    logger.info("compiled %d steps in %.1f s", len(programs), time.perf_counter() - start)
    return programs


def _weights(options: Options, config: ModelConfig, mesh: Mesh, dtype: np.dtype) -> Weights:
    start = time.perf_counter()
    specs = abstract_weights(config, dtype)
    if options.load_format == "dummy":
        weights = dummy_weights(specs, mesh, _DUMMY_SEED)
    else:
        weights = load_weights(options.model_dir, config, specs, mesh)
    num_bytes = sum(weight.nbytes for weight in weights.values())
    seconds = time.perf_counter() - start
    logger.info("loaded %.3f GB of weights in %.1f s", num_bytes / 1e9, seconds)
    return weights
