"""From options to a server: tokenizer, template, engine and routes put together.

Knows neither flags nor environment variables nor JAX: whoever builds the engine is handed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.shapes import StepShapes
from serving.admission import GenerationDefaults, Limits
from serving.app import HttpOptions, create_app
from serving.bridge import Bridge
from serving.chat import ChatTemplate
from serving.grammars import Grammars
from serving.metrics import Metrics
from serving.operations import Profiler
from serving.server import Address, ListenError, serve
from serving.service import Service
from serving.tokenizer import ModelTokenizer

logger = logging.getLogger(__name__)

PAGE_SIZE = 64
PREFILL_TILE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says; its help explains each."""

    model_dir: Path
    engine: Path | None
    engine_fallback: bool = False
    address: Address
    max_concurrency: int
    max_batch_tokens: int
    max_seq_len: int
    max_new_tokens: int
    max_prompt_tokens: int
    num_gpus: int
    queue_size: int
    load_format: str
    load_readers: int = 4
    queue_timeout: float = 0.0
    integrity_interval: int = 1000
    kv_cache_dtype: str = "auto"
    speculative_tokens: int = 0
    decode_steps: int = 1
    coordinator: str | None = None
    num_processes: int = 1
    process_id: int = 0
    allow_reference_ops: bool = False
    served_model_names: tuple[str, ...]
    http: HttpOptions = field(default_factory=HttpOptions)


class StartupError(Exception):
    """The server cannot start with these options; the message is for the user."""


# Told the name of each phase of the start and the seconds it took.
ReportPhase = Callable[[str, float], object]
BuildEngine = Callable[[Options, ModelTokenizer, ReportPhase], Engine]


async def run(options: Options, build_engine: BuildEngine, profiler: Profiler | None = None) -> int:
    """Serves with these options; returns the process's exit code.

    Args:
      build_engine: called on the engine's thread, while the server already listens.
      profiler: what /start_profile starts; None where there is none.

    Raises:
      StartupError: a file of the model directory, or the address, is at fault.
    """
    try:
        service = _service(options)
    except ValueError as error:
        raise StartupError(str(error)) from error
    logger.info(
        "model %s: %d tokens in the vocabulary", service.model_names[0], service.tokenizer.size
    )
    try:
        return await serve(
            create_app(service, options.http, profiler),
            service.bridge,
            lambda: build_engine(options, service.tokenizer, service.metrics.started),
            options.address,
        )
    except ListenError as error:
        raise StartupError(str(error)) from error


def _service(options: Options) -> Service:
    tokenizer = ModelTokenizer.from_directory(options.model_dir)
    bridge = Bridge()
    defaults = GenerationDefaults.from_directory(options.model_dir)
    return Service(
        bridge=bridge,
        tokenizer=tokenizer,
        template=ChatTemplate.from_directory(options.model_dir, tokenizer),
        model_names=options.served_model_names or (options.model_dir.resolve().name,),
        limits=Limits(
            max_seq_len=options.max_seq_len,
            max_prompt_tokens=options.max_prompt_tokens,
            max_new_tokens=options.max_new_tokens,
            max_queue_seconds=options.queue_timeout or None,
        ),
        grammars=Grammars(tokenizer, defaults.stop_token_ids),
        defaults=defaults,
        metrics=Metrics(bridge.stats),
    )


def mock_engine(
    options: Options, tokenizer: ModelTokenizer, report: ReportPhase, *, rate: float
) -> Engine:
    """An engine without a model: deterministic tokens of text, `rate` a second in each stream.

    A rate of 0 is as fast as the host can go.
    """
    del report  # it is there at once
    shapes = mock_shapes(options, tokenizer.size)
    runner = MockRunner(
        shapes,
        tokenizer.size,
        seconds_per_step=1 / rate if rate else 0.0,
        # Text only, so that an answer ends where its request says.
        tokens=range(min(tokenizer.control_tokens.values())),
    )
    return Engine(runner, shapes, options.queue_size, integrity_interval=options.integrity_interval)


def mock_shapes(options: Options, vocab_size: int) -> StepShapes:
    """Shapes with pages enough for every slot at its longest."""
    rows = max(1, options.max_batch_tokens // PREFILL_TILE)
    return StepShapes(
        num_slots=options.max_concurrency,
        num_pages=options.max_concurrency * -(-options.max_seq_len // PAGE_SIZE),
        page_size=PAGE_SIZE,
        max_seq_len=options.max_seq_len,
        prefill_tile=PREFILL_TILE,
        prefill_buckets=(rows,),
        decode_buckets=(options.max_concurrency,),
        vocab_size=vocab_size,
        num_drafts=options.speculative_tokens,
    )
