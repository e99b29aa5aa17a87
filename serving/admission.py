"""From a parsed request to the engine's: limits checked, defaults filled in.

Knows neither HTTP nor streams.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_jax.engine.request import Constraint, Request, SamplingParams
from serving import errors
from serving.protocol import ChatRequest, GenerationRequest

# Seeds of one request's answers are as far apart as can be: 2**64 divided by the golden ratio.
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one request may ask for, in tokens, and how long it may wait.

    Attributes:
      max_seq_len: prompt and completion together.
      max_prompt_tokens: the prompt.
      max_new_tokens: the completion.
      max_queue_seconds: until it must have begun; None: it waits for as long as it takes.
    """

    max_seq_len: int
    max_prompt_tokens: int
    max_new_tokens: int
    max_queue_seconds: float | None = None

    @property
    def longest_prompt(self) -> int:
        """Tokens a prompt may have, at least one place being left for the completion."""
        return min(self.max_prompt_tokens, self.max_seq_len - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the model directory says of generation.

    Attributes:
      stop_token_ids: the tokens that end an answer.
      temperature, top_p, top_k: used where a request says nothing.
    """

    stop_token_ids: frozenset[int]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def from_directory(cls, model_dir: Path) -> GenerationDefaults:
        """Reads `generation_config.json`, and `config.json` for stop tokens it does not name.

        Raises:
          ValueError: neither names the stop tokens, or a file says what is no JSON object or number.
        """
        config = _read_json(model_dir / "config.json")
        config |= _read_json(model_dir / "generation_config.json")
        stop = config.get("eos_token_id")
        stop_tokens: list[Any] = stop if isinstance(stop, list) else [stop]
        if not stop_tokens or not all(isinstance(token, int) for token in stop_tokens):
            raise ValueError(f"{model_dir}: no eos_token_id in its generation_config.json")

        def number(name: str, default: float) -> float:
            value = _given(config.get(name), default)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(
                    f"{model_dir}/generation_config.json: {name} is no number: {value!r}"
                )
            return value

        greedy = config.get("do_sample") is False
        return cls(
            stop_token_ids=frozenset(stop_tokens),
            temperature=0.0 if greedy else float(number("temperature", 1.0)),
            top_p=float(number("top_p", 1.0)) or 1.0,
            top_k=int(number("top_k", 0)),
        )


def admit(
    request: GenerationRequest,
    prompt: Sequence[int],
    *,
    id: str,
    limits: Limits,
    defaults: GenerationDefaults,
    vocab_size: int,
    candidate: int = 0,
    constraint: Constraint | None = None,
) -> Request:
    """The engine's request.

    Args:
      candidate: which of several answers to one prompt; their seeds differ.
      constraint: what the answer must keep to.

    Raises:
      ApiError: 400, the prompt is empty, too long, or leaves the vocabulary; or prompt and
        completion together are too long.
    """
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    if not prompt:
        raise errors.invalid(param, f"Invalid '{param}': the prompt must not be empty.")
    if not all(0 <= token < vocab_size for token in prompt):
        message = f"Invalid '{param}': token ids must be in 0 to {vocab_size - 1}."
        raise errors.invalid(param, message)
    if len(prompt) > limits.longest_prompt:
        raise prompt_too_long(param, f"{len(prompt)}", limits)
    seed = secrets.randbits(64) if request.seed is None else request.seed
    max_new_tokens = _max_new_tokens(request, len(prompt), param, limits)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_new_tokens:
        message = f"Invalid 'min_tokens': {min_tokens} is more than the {max_new_tokens} allowed."
        raise errors.invalid("min_tokens", message)
    wait = limits.max_queue_seconds
    return Request(
        id=id,
        prompt=tuple(prompt),
        sampling=SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=_given(request.temperature, defaults.temperature),
            top_p=_given(request.top_p, defaults.top_p),
            top_k=max(0, _given(request.top_k, defaults.top_k)),
            min_p=_given(request.min_p, 0.0),
            seed=(seed + candidate * _SEED_STEP) % 2**64,
            stop_token_ids=_stop_token_ids(request, defaults, vocab_size),
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            repetition_penalty=_given(request.repetition_penalty, 1.0),
            logit_bias=_logit_bias(request, vocab_size),
            min_tokens=min_tokens,
            num_logprobs=request.num_top_logprobs or 0,
            num_prompt_logprobs=request.num_prompt_logprobs,
        ),
        constraint=constraint,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        deadline=None if wait is None else time.monotonic() + wait,
    )


def prompt_too_long(param: str, num_tokens: str, limits: Limits) -> errors.ApiError:
    """The error for a prompt of so many tokens (in words: it may be "at least 9000")."""
    used = f"your {param} resulted in {num_tokens} tokens"
    if limits.max_prompt_tokens < limits.max_seq_len:
        used += f", and a prompt may have {limits.longest_prompt}"
    return errors.context_length_exceeded(param, limits.max_seq_len, used)


def _max_new_tokens(request: GenerationRequest, prompt: int, param: str, limits: Limits) -> int:
    field, asked = request.token_limit
    if asked == 0:
        asked = 1  # for the prompt's sake; the token is left out
    if asked is None:
        return min(limits.max_new_tokens, limits.max_seq_len - prompt)
    if asked > limits.max_new_tokens:
        message = f"{field} is too large: {asked}. This server completes up to "
        raise errors.invalid(field, f"{message}{limits.max_new_tokens} tokens.")
    if prompt + asked > limits.max_seq_len:
        used = (
            f"you requested {prompt + asked} tokens ({prompt} in the {param}, "
            f"{asked} in the completion)"
        )
        raise errors.context_length_exceeded(param, limits.max_seq_len, used)
    return asked


def _logit_bias(request: GenerationRequest, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not all(0 <= token < vocab_size for token in request.logit_bias):
        message = f"Invalid 'logit_bias': token ids must be in 0 to {vocab_size - 1}."
        raise errors.invalid("logit_bias", message)
    return tuple(request.logit_bias.items())


def _stop_token_ids(
    request: GenerationRequest, defaults: GenerationDefaults, vocab_size: int
) -> frozenset[int]:
    asked = frozenset(request.stop_token_ids or ())
    if not all(0 <= token < vocab_size for token in asked):
        message = f"Invalid 'stop_token_ids': token ids must be in 0 to {vocab_size - 1}."
        raise errors.invalid("stop_token_ids", message)
    return asked if request.ignore_eos else asked | defaults.stop_token_ids


def _given[T](value: T | None, default: T) -> T:
    return default if value is None else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object")
    return fields
