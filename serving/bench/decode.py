"""The engine alone: requests into it, tokens out of it, with neither HTTP nor text between.

Knows no server. Every round submits all requests at once, as many as there are slots for, and waits
for the last token of the last of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.engine.request import Request, SamplingParams, Turn
from serving.bench.prompts import Shape, Vocabulary, random_prompts
from serving.bridge import Engine
from serving.model_engine import build_engine
from serving.server import Address
from serving.start import Start
from serving.tokenizer import ModelTokenizer
from serving.wiring import Options

Round = dict[str, float]

_ROUND_SECONDS = 3600.0


class EngineFailedError(Exception):
    """A request did not get its tokens; the message is for the user."""


class Bench:
    """An engine with its thread, and what it delivers, stamped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Condition()
        self._stamps: list[tuple[float, int]] = []  # time, tokens delivered at it
        self._firsts: dict[str, float] = {}
        self._num_open = 0
        self._failure: str | None = None
        self._thread = threading.Thread(target=engine.run_turns, args=(self._take,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._engine.stop()
        self._thread.join(60)

    def round(self, prompts: Sequence[Sequence[int]], output_len: int, name: str) -> Round:
        """One round: see the module; throughputs in tokens per second, times in ms.

        * output_throughput: all tokens, from submitting to the last of them.
        * decode_throughput: the tokens after every request had its first, over the time since.
        * step_ms: that time per token of a request.
        * ttft_ms: to a request's first token, mean.

        Raises:
          EngineFailedError: a request ended without its tokens.
        """
        sampling = SamplingParams(max_new_tokens=output_len, temperature=0.0)
        requests = [
            Request(id=f"{name}-{number}", prompt=tuple(prompt), sampling=sampling)
            for number, prompt in enumerate(prompts)
        ]
        with self._lock:
            self._stamps, self._firsts, self._num_open = [], {}, len(requests)
        began = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        with self._lock:
            is_over = self._lock.wait_for(lambda: self._num_open <= 0, _ROUND_SECONDS)
            if not is_over or self._failure:
                raise EngineFailedError(self._failure or f"no end after {_ROUND_SECONDS:.0f} s")
            return self._measured(began, len(requests), output_len)

    def _measured(self, began: float, num_requests: int, output_len: int) -> Round:
        ended = self._stamps[-1][0]
        all_begun = max(self._firsts.values())
        later = sum(number for at, number in self._stamps if at > all_begun)
        decoding = ended - all_begun
        return {
            "output_tokens": sum(number for _, number in self._stamps),
            "seconds": ended - began,
            "output_throughput": num_requests * output_len / (ended - began),
            "decode_throughput": later / decoding if decoding else 0.0,
            "step_ms": 1e3 * decoding * num_requests / later if later else 0.0,
            "ttft_ms": 1e3 * float(np.mean([at - began for at in self._firsts.values()])),
        }

    def _take(self, turn: Turn) -> None:
        now = time.perf_counter()
        number = len(turn.ids) + sum(event.token is not None for event in turn.events)
        with self._lock:
            self._stamps.append((now, number))
            for event in turn.events:  # first and last tokens are among them
                self._firsts.setdefault(event.request_id, now)
                if event.finish_reason is not None:
                    self._num_open -= 1
                    if event.finish_reason != "length":
                        self._failure = f"a request ended of {event.error or event.finish_reason}"
            if self._num_open <= 0:
                self._lock.notify_all()


@contextmanager
def built(options: Options, phases: dict[str, float]) -> Iterator[Bench]:
    """The engine of these options, running; `phases` gets the seconds of its start.

    Raises:
      CannotStartError: it cannot be built.
    """
    tokenizer = ModelTokenizer.from_directory(options.model_dir)
    bench = Bench(build_engine(options, tokenizer, Start(phases.__setitem__)))
    try:
        yield bench
    finally:
        bench.close()


def options_for(
    model_dir: Path, *, max_concurrency: int, length: int, num_gpus: int, load_format: str
) -> Options:
    """Options of an engine for prompt and completion of `length` tokens together."""
    return Options(
        model_dir=model_dir,
        engine=None,
        address=Address(host="", port=0),
        max_concurrency=max_concurrency,
        max_batch_tokens=32768,
        max_seq_len=max(2, length),
        max_new_tokens=length,
        max_prompt_tokens=length,
        num_gpus=num_gpus,
        queue_size=max_concurrency,
        load_format=load_format,
        served_model_names=(),
    )


def prompts_of(model_dir: Path, shape: Shape, number: int, seed: int) -> list[list[int]]:
    """So many random prompts, of the model's text tokens."""
    made = random_prompts(shape, Vocabulary(model_dir), seed=(seed,), is_chat=False)
    return [next(made)["prompt"] for _ in range(number)]


def middle(rounds: Sequence[Round]) -> dict[str, Any]:
    """The median of each number over the rounds, and the spread of the throughput."""
    result: dict[str, Any] = {
        name: float(np.median([found[name] for found in rounds])) for name in rounds[0]
    }
    throughputs = [found["decode_throughput"] for found in rounds]
    return {**result, "decode_throughput_range": [min(throughputs), max(throughputs)]}
