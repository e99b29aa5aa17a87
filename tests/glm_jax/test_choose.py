"""The branch that a step takes when no row asks for anything: rows get there what they get beside others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import shapes as columns
from glm_jax.phases import Slots, choose
from glm_jax.sharding import shares_rows
from tests.glm_jax.tiny import BF16, compiled, make_config, on_mesh

ROWS, VOCAB, PAGE, PAGES = 4, 96, 8, 2
LOGITS = np.random.default_rng(3).normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
# The best twice: the first of them is to be taken.
LOGITS[1, [17, 60]] = 9.0
BANNED = int(LOGITS[2].argmax())


class Fixed:
    """A model with the same logits for whatever hidden state."""

    def choose(self, hidden: jax.Array, rows: Any, choose: Any) -> jax.Array:
        return choose(hidden, *rows)


@compiled
def chosen(batch: jax.Array, controls: jax.Array, logits: jax.Array) -> jax.Array:
    table = jnp.arange(ROWS * PAGES, dtype=jnp.int32).reshape(ROWS, PAGES)
    nothing = jnp.zeros(ROWS, jnp.int32)
    slots = Slots(nothing, nothing, jnp.zeros((ROWS * PAGES, PAGE), jnp.int32))
    model: Any = Fixed()
    return choose(model, slots, controls, batch, logits, jnp.full(ROWS, 5, jnp.int32), table)


def outputs(**asked: float) -> np.ndarray:
    """Of rows of which the third asks for these columns."""
    batch = np.zeros((ROWS, columns.NUM_FIELDS + PAGES), np.int32)
    batch[:, columns.SLOT] = np.arange(ROWS)
    batch[:, columns.TOP_P] = np.float32(0.9).view(np.int32)
    batch[:, columns.MIN_LENGTH] = 100
    controls = np.zeros((ROWS, 2 * columns.MAX_BIASES + VOCAB // 32), np.int32)
    controls[2, 0] = BANNED
    for name, value in asked.items():
        number = np.float32(value).view(np.int32) if isinstance(value, float) else value
        batch[2, getattr(columns, name)] = number
    return np.asarray(chosen(batch, controls, LOGITS))


def test_rows_that_ask_for_nothing_get_the_likeliest_and_its_logprob() -> None:
    found = outputs()
    np.testing.assert_array_equal(found[columns.OUTPUT_TOKENS], LOGITS.argmax(-1))
    shares = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum(-1)[:, None]
    logprobs = found[columns.OUTPUT_LOGPROBS].view(np.float32)
    np.testing.assert_allclose(logprobs, np.log(shares.max(-1)), rtol=1e-5)
    assert not found[2:].any()


@pytest.mark.parametrize(
    ("asked", "is_changed"),
    [
        ({"TEMPERATURE": 50.0}, True),
        ({"FREQUENCY_PENALTY": 1.0}, False),
        ({"PRESENCE_PENALTY": 1.0}, False),
        ({"REPETITION_PENALTY": 1.0}, False),
        ({"NUM_BANS": 1}, True),
        ({"NUM_BIASES": 1}, False),
        ({"NUM_LOGPROBS": 2}, False),
        ({"IS_MASKED": 1}, True),
    ],
)
def test_a_row_that_asks_leaves_the_bits_of_the_others(
    asked: dict[str, float], is_changed: bool
) -> None:
    # What is counted in an empty history, and a bias of zero, change nothing in the row that asks.
    alone, beside = outputs(), outputs(**asked)
    others = [0, 1, 3]
    np.testing.assert_array_equal(alone[:2, others], beside[:2, others])
    assert (alone[0, 2] != beside[0, 2]) == is_changed
    assert beside[columns.OUTPUT_TOP_TOKENS].any() == ("NUM_LOGPROBS" in asked)


def test_every_column_that_can_ask_is_looked_at() -> None:
    names = "TEMPERATURE FREQUENCY_PENALTY PRESENCE_PENALTY REPETITION_PENALTY NUM_BIASES NUM_BANS"
    expected = [getattr(columns, name) for name in [*names.split(), "NUM_LOGPROBS", "IS_MASKED"]]
    assert sorted(columns.ASKS) == sorted(expected)


def of_many_rows(num_devices: int, num_rows: int) -> tuple[bool, np.ndarray]:
    """Whether devices share rows out, and what is chosen: every other row asks for something."""
    config, rng = make_config(vocab_size=256), np.random.default_rng(4)
    history = rng.integers(0, 256, (num_rows * PAGES, PAGE), np.int32)
    table = np.arange(num_rows * PAGES, dtype=np.int32).reshape(num_rows, PAGES)[::-1].copy()
    batch = np.zeros((num_rows, columns.NUM_FIELDS + PAGES), np.int32)
    batch[:, columns.SLOT] = np.arange(num_rows)
    batch[:, columns.TOP_P] = np.float32(1).view(np.int32)
    batch[:, columns.SEED_LOW] = np.arange(num_rows)
    batch[::2, columns.TEMPERATURE] = np.float32(1.5).view(np.int32)
    batch[::4, columns.TOP_P] = np.float32(0.9).view(np.int32)
    batch[::6, columns.FREQUENCY_PENALTY] = np.float32(1.0).view(np.int32)
    batch[::8, columns.NUM_LOGPROBS] = 3
    controls = np.zeros((num_rows, 2 * columns.MAX_BIASES + 256 // 32), np.int32)
    hidden = rng.normal(size=(num_rows, config.hidden_size)).astype(BF16)
    shared: list[bool] = []

    def body(model: Any, hidden: Any, history: Any, table: Any, batch: Any, controls: Any) -> Any:
        shared.append(shares_rows(num_rows))
        nothing = jnp.zeros(num_rows, jnp.int32)
        slots, lengths = Slots(nothing, nothing, history), jnp.full(num_rows, 11, jnp.int32)
        return choose(model, slots, controls, batch, hidden, lengths, table)

    found = on_mesh(config, BF16, num_devices, body)(hidden, history, table, batch, controls)
    return shared[0], np.asarray(found)


@pytest.mark.parametrize(("num_rows", "is_shared"), [(64, True), (12, False)])
def test_rows_that_devices_share_out_get_what_they_get_on_one(
    num_rows: int, is_shared: bool
) -> None:
    (one, expected), (eight, found) = (of_many_rows(number, num_rows) for number in (1, 8))
    assert (one, eight) == (False, is_shared)
    np.testing.assert_array_equal(found, expected)
    tokens = expected[columns.OUTPUT_TOKENS]
    assert len(set(tokens)) > num_rows // 2 and expected[columns.OUTPUT_TOP_TOKENS].any()
