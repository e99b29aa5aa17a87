"""Penalties, biases, bans, masks and likeliest tokens: what they do, and to whom."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.sampling import Adjustments, adjust, top_logprobs
from tests.glm_jax.tiny import compiled

B, V, S = 4, 70, 12
GENERATOR = np.random.default_rng(5)
LOGITS = GENERATOR.normal(size=(B, V)).astype(np.float32) * 3
HISTORY = GENERATOR.integers(0, V, (B, S)).astype(np.int32)
POSITION = np.array([12, 9, 5, 3], np.int32)

run = compiled(
    lambda logits, rows, position, history: adjust(logits, rows, position, lambda: history)
)


def rows_of(**fields: Any) -> Adjustments:
    """Rows that ask for nothing but `fields`, one value for all or one each."""
    words = -(-V // 32)
    kinds: dict[str, tuple[type, tuple[int, ...]]] = {
        **dict.fromkeys(("frequency", "presence", "repetition"), (np.float32, (B,))),
        **dict.fromkeys(
            ("prompt_length", "num_biases", "num_bans", "min_length", "is_masked"), (np.int32, (B,))
        ),
        "tokens": (np.int32, (B, 6)),
        "biases": (np.float32, (B, 6)),
        "mask": (np.int32, (B, words)),
    }
    return Adjustments(
        **{
            name: jnp.asarray(np.broadcast_to(np.asarray(fields.get(name, 0), dtype), shape))
            for name, (dtype, shape) in kinds.items()
        }
    )


def adjusted(**fields: Any) -> np.ndarray:
    return np.asarray(run(LOGITS, rows_of(**fields), POSITION, HISTORY))


def test_rows_that_ask_for_nothing_keep_their_bits():
    np.testing.assert_array_equal(adjusted(), LOGITS)


@pytest.mark.parametrize("prompt_length", [0, 4])
def test_penalties_count_as_a_loop_would(prompt_length: int):
    frequency, presence, repetition = 0.7, -0.4, 1.3
    expected = LOGITS.copy()
    for row in range(B):
        past = HISTORY[row, : POSITION[row]].tolist()
        completion = past[prompt_length:]
        for token in set(past):
            logit = expected[row, token]
            expected[row, token] = logit / repetition if logit > 0 else logit * repetition
        for token in set(completion):
            expected[row, token] -= frequency * completion.count(token) + presence
    found = adjusted(
        frequency=frequency,
        presence=presence,
        repetition=np.log(repetition),
        prompt_length=prompt_length,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_neighbors_penalty_is_none_of_a_rows_business():
    alone = adjusted(frequency=[0.5, 0, 0, 0], is_masked=[0, 0, 1, 0], mask=-1)
    np.testing.assert_array_equal(alone[1:], LOGITS[1:])
    together = adjusted(frequency=[0.5, 1, 2, 3], repetition=[0, 1, 1, 1])
    np.testing.assert_array_equal(alone[0], together[0])


def test_biases_are_added_and_bans_end_at_their_position():
    found = adjusted(
        tokens=[3, 9, 40, 41, 50, 51],
        biases=[2.5, -100, 7, 7, 7, 7],
        num_biases=2,
        num_bans=2,
        min_length=[13, 9, 0, 4],
    )
    expected = LOGITS.copy()
    expected[:, 3] += 2.5
    expected[:, 9] -= 100
    for row in (0, 3):  # below their min_length
        expected[row, [40, 41]] = -np.inf
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_mask_leaves_what_it_allows():
    allowed = GENERATOR.integers(0, 2, (B, 96)).astype(np.uint8)
    allowed[:, V:] = 1  # beyond the vocabulary, without effect
    mask = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    found = adjusted(mask=mask, is_masked=[1, 0, 1, 1])
    expected = np.where(allowed[:, :V] == 1, LOGITS, -np.inf)
    expected[1] = LOGITS[1]
    np.testing.assert_array_equal(found, expected)


def test_the_likeliest_tokens_come_in_order_and_only_when_asked_for():
    top = jax.jit(top_logprobs, static_argnums=2)
    tokens, logprobs = map(np.asarray, top(LOGITS, np.array([0, 2, 0, 0], np.int32), 5))
    assert tokens.shape == logprobs.shape == (5, B)
    order = np.argsort(-LOGITS, axis=1)[:, :5]
    np.testing.assert_array_equal(tokens.T, order)
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(logprobs.T, np.take_along_axis(exact, order, 1), rtol=1e-5)
    tokens, logprobs = map(np.asarray, top(LOGITS, np.zeros(B, np.int32), 5))
    assert not tokens.any() and not logprobs.any()
