"""From options to a server: tokenizer, template, engine and routes put together.

Knows neither flags nor environment variables nor JAX: whoever builds the engine is handed in.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from serving.start import Start
from serving.tokenizer import ModelTokenizer

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
    plain_ops: bool = False
    plain_sums: bool = False
    served_model_names: tuple[str, ...]
    http: HttpOptions = field(default_factory=HttpOptions)


class StartupError(Exception):
    """The server cannot start with these options; the message is for the user."""


BuildEngine = Callable[[Options, ModelTokenizer, Start], Engine]


async def run(
    options: Options,
    build_engine: BuildEngine,
    profiler: Profiler | None = None,
    began: float | None = None,
) -> int:
    """Serves with these options; returns the process's exit code.

    Args:
      build_engine: called on the engine's thread, while the server already listens.
      profiler: what /start_profile starts; None where there is none.
      began: time.perf_counter() when the process began, for the log.

    Raises:
      StartupError: a file of the model directory, or the address, is at fault.
    """
    try:
        service = _service(options)
    except ValueError as error:
        raise StartupError(str(error)) from error
    start = Start(service.metrics.started, began)

    def build() -> Engine:
        engine = build_engine(options, service.tokenizer, start)
        start.ready(**_places(options, service.model_names[0]))
        return engine

    try:
        app = create_app(service, options.http, profiler)
        return await serve(app, service.bridge, build, options.address)
    except ListenError as error:
        raise StartupError(str(error)) from error


def _places(options: Options, name: str) -> dict[str, str]:
    """Where the server is reached, and a command that asks it something."""
    address = options.address
    is_any = address.host in ("0.0.0.0", "::")
    url = replace(address, host="localhost").url if is_any else address.url
    where = f"{url} (on every interface)" if is_any else url
    body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}]}
    words = ["curl", f"{url}/v1/chat/completions", "-H", "content-type: application/json"]
    num_keys = len(options.http.access.api_keys)
    if num_keys:
        words += ["-H", "authorization: Bearer $API_KEY"]
    if address.certificate is not None:
        words += ["--cacert", str(address.certificate)]
    words += ["-d", json.dumps(body)]
    # In double quotes what the shell is to fill in.
    curl = " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in words)
    return {
        "listening": f"{where}: /v1, a chat page at /, the API at /docs, /metrics, /readyz",
        "access": f"with a key, of {num_keys} known"
        if num_keys
        else "for all: there is no --api-key",
        "try": curl,
    }


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
    options: Options, tokenizer: ModelTokenizer, start: Start, *, rate: float
) -> Engine:
    """An engine without a model: deterministic tokens of text, `rate` a second in each stream.

    A rate of 0 is as fast as the host can go.
    """
    speed = f"{rate:g} tokens a second in each stream" if rate else "as fast as it can"
    start.tell("model", f"none (--mock): deterministic tokens, {speed}", rate=rate)
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
    """Shapes with pages enough for every slot at its longest, and buckets as a device has them."""
    rows = max(1, options.max_batch_tokens // PREFILL_TILE)
    buckets = [bucket for bucket in (1, 8, 64) if bucket < options.max_concurrency]
    return StepShapes(
        num_slots=options.max_concurrency,
        num_pages=options.max_concurrency * -(-options.max_seq_len // PAGE_SIZE),
        page_size=PAGE_SIZE,
        max_seq_len=options.max_seq_len,
        prefill_tile=PREFILL_TILE,
        prefill_buckets=(rows,),
        decode_buckets=(*buckets, options.max_concurrency),
        vocab_size=vocab_size,
        num_drafts=options.speculative_tokens,
    )
