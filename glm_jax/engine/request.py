"""What a caller asks for, and what comes back. Plain data.

Knows neither pages nor devices: these are the only objects that cross between server and engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glm_jax.shapes import MAX_BANS, MAX_LOGIT_BIASES, MAX_TOP_LOGPROBS

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Attributes:
      max_new_tokens: completion tokens at most, 1 or more.
      temperature: 0 means greedy.
      top_p: nucleus mass in (0, 1]; 1 means off.
      top_k: candidates kept; 0 means off.
      min_p: least probability relative to the likeliest token, in [0, 1); 0 means off.
      seed: 64 bits that, with a token's position, decide all randomness of the request.
      stop_token_ids: tokens that end the completion; the ending token is delivered too.
      frequency_penalty: taken from a token's logit for every time the completion has it.
      presence_penalty: taken from it once if the completion has it.
      repetition_penalty: a token that prompt or completion has is that much less likely: its logit
        is divided by it, or multiplied where negative; 1 means off.
      logit_bias: (token, what is added to its logit), at most MAX_LOGIT_BIASES.
      min_tokens: no stop token before so many tokens.
      num_logprobs: likeliest tokens to deliver beside each token, at most MAX_TOP_LOGPROBS.
      num_prompt_logprobs: the same for each token of the prompt; None: nothing of the prompt is told.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    num_logprobs: int = 0
    num_prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be 0 or a positive 31-bit integer, got {self.top_k}")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p must be in [0, 1), got {self.min_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an unsigned 64-bit integer, got {self.seed}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if not 0 <= self.num_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"num_logprobs is {self.num_logprobs}, not in 0 … {MAX_TOP_LOGPROBS}")
        if not 0 <= (self.num_prompt_logprobs or 0) <= MAX_TOP_LOGPROBS:
            number = self.num_prompt_logprobs
            raise ValueError(f"num_prompt_logprobs is {number}, not in 0 … {MAX_TOP_LOGPROBS}")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise ValueError(f"logit_bias has more than {MAX_LOGIT_BIASES} entries")
        if self.min_tokens and len(self.stop_token_ids) > MAX_BANS:
            raise ValueError(f"min_tokens takes at most {MAX_BANS} stop tokens")

    @property
    def has_controls(self) -> bool:
        """Whether tokens are biased or banned."""
        return bool(self.logit_bias or (self.min_tokens and self.stop_token_ids))

    @property
    def needs_history(self) -> bool:
        """Whether the device must have seen every token: penalties look at those before."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0
        )


class Constraint(Protocol):
    """Which tokens a completion may go on with: a grammar, a budget. Of one request only.

    The engine's thread calls it; what it takes there, the device waits for.
    """

    def binds(self, index: int) -> bool:
        """Whether the completion's token `index` may be restricted, as far as can be told now.

        True keeps the engine from sampling that token before all tokens before it are accepted.
        """
        ...

    def accept(self, token: int) -> None:
        """Takes in the next token of the completion."""
        ...

    def mask(self) -> NDArray[np.int32]:
        """Bits of the tokens that may come next: int32[words]; tokens beyond the last are not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to make.

    Attributes:
      id: unique among live requests.
      prompt: token ids, at least one; whether the vocabulary has them is the caller's to check.
      sampling: how to choose tokens and when to stop.
      constraint: which tokens may be chosen; None: any.
      priority: the lower goes first, and may take the place of one that is higher.
      cache_salt: pages are shared among requests of the same salt only.
      deadline: time.monotonic() until which it must have begun; None: it waits for as long as it
        takes. A request that has not begun by then ends with "timeout".
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    constraint: Constraint | None = None
    priority: int = 0
    cache_salt: str = ""
    deadline: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt must have at least one token")
        if min(self.prompt) < 0 or max(self.prompt) >= 2**31:
            raise ValueError("prompt must hold token ids, each in 0 … 2**31-1")


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """How likely one token of a prompt was, after those before it.

    Attributes:
      token: the token id.
      logprob: under the model's own distribution.
      rank: 1 for the likeliest token there.
      top: the likeliest tokens there and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class TokenEvent(NamedTuple):
    """One token of one request, perhaps its last.

    A tuple, since one is made for every token: a frozen dataclass takes almost thrice as long.

    Attributes:
      request_id: whose token this is.
      token: the token id; None when the request ends without one (cancelled, timeout, error).
      logprob: log-probability of the token under the model's own distribution (temperature 1,
        nothing filtered).
      finish_reason: None while more is to come.
      error: what went wrong, when finish_reason is "timeout" or "error".
      num_cached_tokens: prompt tokens that were not computed but found in the cache.
      began: time.monotonic() at which its first step was dispatched; None where none was.
      top_logprobs: the likeliest tokens and their log-probabilities, the likeliest first; as many
        as the request wants.
      prompt_logprobs: with the first token, if the request wants them: every token of the prompt but
        the first.
    """

    request_id: str
    token: int | None
    logprob: float = 0.0
    finish_reason: FinishReason | None = None
    error: str | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    num_cached_tokens: int = 0
    began: float | None = None
    prompt_logprobs: tuple[PromptLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of the engine brought to all requests.

    Most of it is one more token for requests that go on, and nothing else to tell: those come in
    columns, which cost less than an event each. No request is both in `events` and in the columns.

    Attributes:
      events: first tokens, last ones, and all that have more to tell than themselves.
      ids: requests that go on; the same object as in the turn before where they are the same.
      tokens, logprobs: of each of these, its next token and the log-probability.
    """

    events: list[TokenEvent]
    ids: tuple[str, ...] = ()
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()

    def __bool__(self) -> bool:
        return bool(self.events or self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine, for metrics and health.

    Attributes:
      num_waiting: requests accepted but without a slot yet (queue depth).
      num_running: sequences that hold a slot.
      num_pages_used: pages owned by sequences.
      num_pages: pages in the pool.
      num_prefill_steps, num_decode_steps: steps dispatched since the start.
      is_alive: False after the engine died; it then accepts nothing.
      num_pages_resting: pages nobody owns that hold a prefix for whoever comes with it.
      num_evicted: of these, those whose place was taken, since the start.
      num_preemptions: sequences that lost slot and pages for the sake of others.
      num_timeouts: requests that had not begun by their deadline.
      num_admitted_tokens: tokens of admitted sequences, each time they were admitted.
      num_cached_tokens: of them, those found in the cache.
      num_prefill_tokens, num_decode_tokens: tokens fed to steps.
      num_prefill_padding, num_decode_padding: tokens that steps computed beside them for nothing.
      num_offered: rows of decode steps that could gain a token, and one more by a first guess, by
        a second one, and so on.
      num_gained: of them, those that did.
      num_integrity_checks: times that the account of slots and pages was checked.
      integrity_seconds: what the checks took.
    """

    num_waiting: int
    num_running: int
    num_pages_used: int
    num_pages: int
    num_prefill_steps: int
    num_decode_steps: int
    is_alive: bool
    num_pages_resting: int = 0
    num_evicted: int = 0
    num_preemptions: int = 0
    num_timeouts: int = 0
    num_admitted_tokens: int = 0
    num_cached_tokens: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_prefill_padding: int = 0
    num_decode_padding: int = 0
    num_offered: tuple[int, ...] = ()
    num_gained: tuple[int, ...] = ()
    num_integrity_checks: int = 0
    integrity_seconds: float = 0.0


class QueueFullError(Exception):
    """The queue holds as many requests as it may; try again later."""


class EngineDeadError(Exception):
    """The engine has stopped and accepts nothing; the process must be restarted."""


class EngineDrainingError(EngineDeadError):
    """The engine finishes what it has accepted, accepts nothing new, and then stops."""
