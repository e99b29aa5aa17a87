"""A runner whose tokens depend on everything its row may see: the oracle of the engine's tests.

Knows no model: what it caches of a token is a hash of it and of all before it, as keys and values
are; the next token is a sum over these and the sampling columns. So a page given away too early,
shared by what only looks alike, a stale table or a column in the wrong row changes it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams, TokenEvent
from glm_jax.shapes import (
    IS_LAST,
    MIN_P,
    NO_TOKEN,
    NUM_FIELDS,
    NUM_TOKENS,
    SEED_HIGH,
    SEED_LOW,
    SLOT,
    START,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Phase,
    StepShapes,
)

VOCAB_SIZE = 50


def columns_of(sampling: SamplingParams) -> tuple[int, ...]:
    """The sampling columns of a row, worked out apart from the engine."""
    floats = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32)
    seed = np.array([sampling.seed], np.uint64).view(np.int32)
    return (*map(int, floats.view(np.int32)), sampling.top_k, int(seed[0]), int(seed[1]))


def cached_after(state: int, token: int) -> int:
    """What the cache holds of a token that follows what left `state`."""
    return (state * 0x9E3779B97F4A7C15 + token + 1) % 2**61


def answer_after(states: list[int], sampling_columns: tuple[int, ...]) -> tuple[int, float]:
    """The token that follows what the cache holds, and its log-probability."""
    weighted = sum((2 * i + 3) * number for i, number in enumerate((*sampling_columns, *states)))
    mixed = weighted * 2654435761 % 2**32
    return (mixed >> 8) % VOCAB_SIZE, -(mixed % 4096) / 256


def expected_answers(request: Request, shapes: StepShapes) -> list[tuple[int, float]]:
    """Tokens and log-probabilities of a request that has the device to itself."""
    states: list[int] = []
    for token in request.prompt:
        states.append(cached_after(states[-1] if states else 0, token))
    sampling = request.sampling
    columns = columns_of(sampling)
    limit = min(sampling.max_new_tokens, shapes.max_seq_len - len(request.prompt))
    answers: list[tuple[int, float]] = []
    while len(answers) < limit:
        answers.append(answer_after(states, columns))
        states.append(cached_after(states[-1], answers[-1][0]))
        if answers[-1][0] in sampling.stop_token_ids:
            break
    return answers


def expected_tokens(request: Request, shapes: StepShapes) -> list[int]:
    """The completion of a request that has the device to itself."""
    return [token for token, _ in expected_answers(request, shapes)]


class AttentiveRunner:
    """Keeps a paged cache, and calls `before_step` with the step's number first.

    Where a row may gain several tokens, chance says how many it does. The places that its guesses
    would have had are written first, with what no token leaves there.
    """

    def __init__(
        self, shapes: StepShapes, before_step: Callable[[int], None] = lambda step: None
    ) -> None:
        self.shapes = shapes
        self.phases: list[Phase] = []
        self.batches: list[NDArray[np.int32]] = []
        self._before_step = before_step
        self._cache = np.full((shapes.num_pages, shapes.page_size), -1, np.int64)
        self._last_tokens = np.full(shapes.num_slots, -1)
        self._lengths = np.full(shapes.num_slots, -1)
        self._random = random.Random(0)

    def control(self, controls: NDArray[np.int32]) -> None:
        raise AssertionError("no request of these tests has controls")

    def score(self, batch: NDArray[np.int32], targets: NDArray[np.int32]) -> NDArray[np.int32]:
        raise AssertionError("no request of these tests wants scores")

    def prepare_scores(self) -> None:
        raise AssertionError("no request of these tests wants scores")

    def dispatch(self, phase: Phase, batch: NDArray[np.int32]) -> NDArray[np.int32]:
        """Runs a step: every row is written, in order, before any row is sampled."""
        self._before_step(len(self.phases))
        self.phases.append(phase)
        self.batches.append(batch)
        assert batch.dtype == np.int32
        assert batch.shape == (self.shapes.rows(phase, len(batch)), self.shapes.columns(phase))
        most = self.shapes.tokens_per_step
        if phase == "prefill" or most == 1:
            return self._run(phase, batch, [True] * len(batch))
        gains = [self._guess(row) for row in batch]
        return np.stack(
            [self._run(phase, batch, [gain > place for gain in gains]) for place in range(most)]
        )

    def _run(
        self, phase: Phase, batch: NDArray[np.int32], is_live: list[bool]
    ) -> NDArray[np.int32]:
        ends = [
            self._write(phase, row) if live else None
            for row, live in zip(batch, is_live, strict=True)
        ]
        output = np.full((2, len(batch)), NO_TOKEN, np.int32)
        for index, (row, end) in enumerate(zip(batch, ends, strict=True)):
            if end is not None:
                output[:, index] = self._sample(row, end)
        return output

    def _guess(self, row: NDArray[np.int32]) -> int:
        """Writes guesses wherever a row may; returns how many tokens it gains."""
        slot, most = int(row[SLOT]), int(row[NUM_TOKENS])
        if slot == self.shapes.num_slots:
            assert most == 0
            return 1
        assert 1 <= most <= self.shapes.tokens_per_step
        start = int(self._lengths[slot])
        for position in range(start, start + most):
            self._cache[self._place(row, position)] = -7 - position
        return self._random.randint(1, most)

    def _write(self, phase: Phase, row: NDArray[np.int32]) -> int | None:
        """Caches a row's tokens; returns the length to sample after, None for no sample."""
        slot = int(row[SLOT])
        if slot == self.shapes.num_slots:
            assert row[NUM_TOKENS] == 0
            return None
        if phase == "decode":
            assert 1 <= row[NUM_TOKENS] <= self.shapes.tokens_per_step
            start, tokens = int(self._lengths[slot]), [int(self._last_tokens[slot])]
        else:
            start = int(row[START])
            assert start % self.shapes.prefill_tile == 0
            tokens = row[-self.shapes.prefill_tile :][: row[NUM_TOKENS]].tolist()
        assert tokens
        state = int(self._cache[self._place(row, start - 1)]) if start else 0
        for position, token in enumerate(tokens, start):
            state = cached_after(state, token)
            self._cache[self._place(row, position)] = state
        return start + len(tokens) if phase == "decode" or row[IS_LAST] else None

    def _sample(self, row: NDArray[np.int32], length: int) -> tuple[int, int]:
        states = [int(self._cache[self._place(row, position)]) for position in range(length)]
        columns = (TEMPERATURE, TOP_P, MIN_P, TOP_K, SEED_LOW, SEED_HIGH)
        token, logprob = answer_after(states, tuple(int(row[column]) for column in columns))
        self._last_tokens[row[SLOT]] = token
        self._lengths[row[SLOT]] = length
        return token, int(np.float32(logprob).view(np.int32))

    def _place(self, row: NDArray[np.int32], position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.shapes.page_size)
        return int(row[NUM_FIELDS + page]), offset


class Events:
    """Collects what an engine delivers, and refuses what it must never deliver."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.num_cached: dict[str, int] = {}
        self.last: dict[str, TokenEvent] = {}
        self.order: list[TokenEvent] = []
        self.deliveries: list[list[TokenEvent]] = []

    def __call__(self, events: list[TokenEvent]) -> None:
        assert events, "an empty delivery"
        self.deliveries.append(events)
        for event in events:
            assert event.request_id not in self.last, f"{event} after the last event"
            self.order.append(event)
            if event.token is not None:
                self.tokens.setdefault(event.request_id, []).append(event.token)
                self.logprobs.setdefault(event.request_id, []).append(event.logprob)
                self.num_cached[event.request_id] = event.num_cached_tokens
            if event.finish_reason is not None:
                self.last[event.request_id] = event

    def answers(self, request_id: str) -> list[tuple[int, float]]:
        """The tokens and log-probabilities of a request."""
        tokens, logprobs = self.tokens.get(request_id, []), self.logprobs.get(request_id, [])
        return list(zip(tokens, logprobs, strict=True))

    def reason(self, request_id: str) -> str | None:
        """Why the request ended."""
        return self.last[request_id].finish_reason


def run_to_end(engine: Engine) -> Events:
    """Runs an engine, on this thread, until all it has accepted is finished."""
    events = Events()
    engine.stop()
    engine.run(events)
    return events


def engine_for(
    shapes: StepShapes,
    before_step: Callable[[int, Engine], None] = lambda step, engine: None,
    max_queue: int = 100,
) -> tuple[Engine, AttentiveRunner]:
    """An engine whose account is checked before every step, when `before_step` is called too."""

    def hook(step: int) -> None:
        engine.check_integrity()
        before_step(step, engine)

    runner = AttentiveRunner(shapes, hook)
    engine = Engine(runner, shapes, max_queue)
    return engine, runner


def assert_clean(engine: Engine) -> None:
    """Nothing is held any more."""
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_pages_used) == (0, 0, 0)


def small_shapes(
    *,
    num_slots: int = 3,
    num_pages: int = 24,
    page_size: int = 4,
    max_seq_len: int = 32,
    prefill_tile: int = 4,
    max_prefill_rows: int = 2,
    num_drafts: int = 0,
) -> StepShapes:
    """Shapes so small that every limit is met."""
    return StepShapes(
        num_slots=num_slots,
        num_pages=num_pages,
        page_size=page_size,
        max_seq_len=max_seq_len,
        prefill_tile=prefill_tile,
        prefill_buckets=tuple(sorted({1, max_prefill_rows})),
        decode_buckets=tuple(sorted({1, num_slots})),
        num_drafts=num_drafts,
    )


def request(
    id: str, prompt_len: int = 5, max_new_tokens: int = 6, *, stop: frozenset[int] = frozenset()
) -> Request:
    """A request whose prompt and sampling differ from those of any other id."""
    seed = int.from_bytes(id.encode()[-8:].rjust(8, b"\xf7"))
    prompt = tuple((seed + 7 * i * i) % VOCAB_SIZE for i in range(prompt_len))
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=seed % 5 / 4,
        top_p=0.5 + seed % 7 / 14,
        top_k=seed % 11,
        min_p=seed % 3 / 9,
        seed=seed,
        stop_token_ids=stop,
    )
    return Request(id=id, prompt=prompt, sampling=sampling)
