"""Sampling: what may be drawn, how often, and that a draw is the row's own business."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.sampling import SamplingRows, log_sum_exp, sample
from tests.glm_jax.tiny import compiled

VOCAB = 12
DRAWS = 4000  # enough that a token with a share of 1/200 is missed once in 500 million

run = compiled(sample)


def rows_of(count: int, **fields: Any) -> SamplingRows:
    """Rows with these parameters, one value for all or one each; drawn at temperature 1 otherwise."""
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0}
    values |= {"seed_high": 0, "seed_low": np.arange(count), "position": 0} | fields

    def column(name: str, dtype: type) -> jax.Array:
        with np.errstate(over="ignore", under="ignore"):
            return jnp.asarray(np.broadcast_to(np.asarray(values[name]).astype(dtype), (count,)))

    seed = jnp.stack([column(name, np.uint32) for name in ("seed_high", "seed_low")], axis=1)
    return SamplingRows(
        temperature=column("temperature", np.float32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        top_k=column("top_k", np.int32),
        seed=seed,
        position=column("position", np.int32),
    )


def draw(logits: np.ndarray, **fields: Any) -> np.ndarray:
    """DRAWS tokens for the same logits, each from a seed of its own unless told otherwise."""
    repeated = np.broadcast_to(logits.astype(np.float32), (DRAWS, len(logits)))
    return run(repeated, rows_of(DRAWS, **fields))[0]


def support(logits: np.ndarray, **fields: Any) -> set[int]:
    return set(draw(logits, **fields).tolist())


def shares(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def chi_square(tokens: np.ndarray, expected: np.ndarray) -> float:
    counts = np.bincount(tokens, minlength=len(expected))
    return float(((counts - len(tokens) * expected) ** 2 / (len(tokens) * expected)).sum())


# A true draw exceeds it once in 10 000 times, with the 11 degrees of freedom of 12 tokens.
CHI_SQUARE_LIMIT = 37.4


def kept(
    logits: np.ndarray,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> set[int]:
    """What the filters leave, by sorting, in float64."""
    p = shares(logits, temperature)
    p = np.where(p >= min_p * p.max(), p, 0)
    if top_k:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
    p = p / p.sum()
    if top_p < 1:
        descending = np.sort(p)[::-1]
        p = np.where(p >= descending[np.searchsorted(np.cumsum(descending), top_p)], p, 0)
    return set(np.flatnonzero(p).tolist())


def some_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=VOCAB)


def test_zero_temperature_takes_the_first_of_the_best() -> None:
    logits = np.array([[1, 5, 2, 5], [-3, -9, -2, -4]], np.float32)
    tokens, _ = run(logits, rows_of(2, temperature=0, top_p=0.1, top_k=3, min_p=0.5))
    np.testing.assert_array_equal(tokens, [1, 2])


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-37, 1.2e-38, 1e-45])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = (10 * np.random.default_rng(0).normal(size=(50, VOCAB))).astype(np.float32)
    for filters in ({}, {"top_p": 0.9, "top_k": 5, "min_p": 0.1}):
        tokens, _ = run(logits, rows_of(50, temperature=temperature, **filters))
        np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e30, 3e38, np.inf])
def test_an_enormous_temperature_draws_evenly(temperature: float) -> None:
    tokens = draw(some_logits(0), temperature=temperature)
    assert chi_square(tokens, np.full(VOCAB, 1 / VOCAB)) < CHI_SQUARE_LIMIT


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("varying", ["seed_low", "seed_high", "position"])
def test_draws_follow_the_softmax(varying: str, temperature: float) -> None:
    logits = some_logits(1)
    fields: dict[str, Any] = {"seed_low": 7, "position": 3}
    tokens = draw(logits, temperature=temperature, **fields | {varying: np.arange(DRAWS)})
    assert chi_square(tokens, shares(logits, temperature)) < CHI_SQUARE_LIMIT
    if temperature != 1:  # the draws are enough to tell it apart from no temperature
        assert chi_square(tokens, shares(logits)) > 5 * CHI_SQUARE_LIMIT


def test_draws_at_neighboring_positions_are_unrelated() -> None:
    logits = np.log(np.array([0.5, 0.5]))
    first, second = (draw(logits, position=p) for p in (10, 11))
    assert abs((first == second).mean() - 0.5) < 0.04
    stream = draw(logits, seed_low=5, position=np.arange(DRAWS))
    assert abs((stream[1:] == stream[:-1]).mean() - 0.5) < 0.04


@pytest.mark.parametrize("top_k", [1, 2, 5, VOCAB - 1, VOCAB, VOCAB + 1, 2**31 - 1])
def test_top_k_keeps_the_k_best(top_k: int) -> None:
    logits = some_logits(2)
    assert support(logits, top_k=top_k) == kept(logits, top_k=top_k)
    assert len(kept(logits, top_k=top_k)) == min(top_k, VOCAB)


def test_top_k_keeps_all_that_equal_the_last_one_kept() -> None:
    logits = np.array([1, 3, 2, 2, 0, 2, -1, -1, -2, -2, -2, -2])
    assert support(logits, top_k=1) == {1}
    assert support(logits, top_k=2) == support(logits, top_k=4) == {1, 2, 3, 5}
    assert support(logits, top_k=5) == {0, 1, 2, 3, 5}


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
def test_filters_do_not_care_where_zero_is(offset: float) -> None:
    logits = np.round(some_logits(3) * 64) / 64 + offset  # exact at every offset
    filters = {"top_k": 7, "top_p": 0.8, "min_p": 0.05}
    assert support(logits, **filters) == kept(logits, **filters)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("seed", [4, 5])
def test_top_p_keeps_the_fewest_that_hold_the_mass(seed: int, top_p: float) -> None:
    logits = some_logits(seed)
    assert support(logits, top_p=top_p) == kept(logits, top_p=top_p)


def test_top_p_at_its_edges() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125] + [1e-30] * 8)
    assert support(logits, top_p=0.49) == {0}
    assert support(logits, top_p=0.51) == {0, 1}
    assert support(logits, top_p=0.76) == {0, 1, 2, 3}  # equals are kept together
    assert support(np.zeros(VOCAB), top_p=0.01) == set(range(VOCAB))


@pytest.mark.parametrize("top_p", [1e-6, 1e-30, 1e-45, 1e-60])
def test_the_least_top_p_keeps_the_best(top_p: float) -> None:
    logits = some_logits(6)
    assert support(logits, top_p=top_p) == {int(logits.argmax())}


def test_a_top_p_of_one_leaves_nothing_out() -> None:
    logits = np.array([0.0] * 11 + [-4.5])
    assert support(logits, top_p=1.0) == set(range(VOCAB))
    # Beside a row that asks for less, too.
    mixed = np.where(np.arange(DRAWS) % 2, 1.0, 0.5)
    tokens = draw(logits, top_p=mixed)
    assert 11 in tokens[1::2] and 11 not in tokens[::2]


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.6, 0.999])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_min_p_is_relative_to_the_best_after_temperature(temperature: float, min_p: float) -> None:
    logits = some_logits(7)
    expected = kept(logits, temperature, min_p=min_p)
    drawn = support(logits, temperature=temperature, min_p=min_p)
    likely = {token for token in expected if shares(logits, temperature)[token] > 0.005}
    assert likely <= drawn <= expected


@pytest.mark.parametrize("seed", range(8, 14))
def test_filters_apply_in_their_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = some_logits(seed)
    filters = {
        "temperature": float(rng.uniform(0.8, 2)),
        "min_p": float(rng.uniform(0.05, 0.3)),
        "top_k": int(rng.integers(3, 8)),
        "top_p": float(rng.uniform(0.4, 0.9)),
    }
    assert support(logits, **filters) == kept(logits, **filters)


def test_top_p_counts_the_mass_of_what_top_k_left() -> None:
    logits = np.log([0.3, 0.2, 0.1] + [0.4 / 9] * 9)
    # Of the three left the best hold 1/2 and 5/6; of all of them 0.3, 0.5 and 0.6.
    assert support(logits, top_k=3, top_p=0.7) == {0, 1}
    assert support(logits, top_p=0.55) == {0, 1, 2}


def test_what_is_left_keeps_its_proportions() -> None:
    logits = some_logits(14)
    tokens = draw(logits, top_k=4, temperature=1.3)
    best = sorted(kept(logits, top_k=4))
    p = shares(logits[best], 1.3)
    assert chi_square(np.searchsorted(best, tokens), p) < 21.1  # 3 degrees of freedom


def a_mixed_batch() -> tuple[np.ndarray, SamplingRows]:
    """Eight rows of all kinds; neighbors must not matter to any."""
    logits = 2 * np.random.default_rng(15).normal(size=(8, 300)).astype(np.float32)
    rows = rows_of(
        8,
        temperature=[0.0, 1.0, 0.7, 1.0, 0.0, 1.5, 1.0, 0.2],
        top_p=[1.0, 0.9, 1.0, 0.5, 0.0, 1.0, 0.99, 1.0],
        top_k=[0, 0, 20, 50, 0, 0, 5, 0],
        min_p=[0.0, 0.0, 0.1, 0.0, 0.0, 0.05, 0.0, 0.0],
        seed_high=np.arange(8) * 3,
        position=np.arange(8) * 11,
    )
    return logits, rows


def test_a_row_draws_the_same_in_any_company() -> None:
    logits, rows = a_mixed_batch()
    tokens, logprobs = run(logits, rows)
    for part in (*([row] for row in range(8)), [5, 1, 2], [7, 6, 5, 4, 3, 2, 1, 0]):
        chosen = np.array(part)
        alone = run(logits[part], jax.tree.map(operator.itemgetter(chosen), rows))
        np.testing.assert_array_equal(alone[0], tokens[part])
        np.testing.assert_allclose(alone[1], logprobs[part], atol=1e-6)


@pytest.mark.parametrize("field", ["seed_low", "seed_high", "position"])
def test_another_seed_or_position_is_another_draw(field: str) -> None:
    logits = np.zeros((64, 5000), np.float32)
    fields: dict[str, Any] = {"seed_low": 1, "seed_high": 2, "position": 3}
    tokens, _ = run(logits, rows_of(64, **fields))
    assert len(set(tokens.tolist())) == 1
    tokens, _ = run(logits, rows_of(64, **fields | {field: np.arange(64)}))
    assert len(set(tokens.tolist())) > 60


def test_the_whole_seed_counts() -> None:
    logits = np.zeros((4, 5000), np.float32)
    top = 2**31  # the high bit of either half, as an int32 column carries it
    tokens, _ = run(logits, rows_of(4, seed_low=[0, top, 0, top], seed_high=[0, 0, top, top]))
    assert len(set(tokens.tolist())) == 4


def test_the_logprob_is_the_models_own_whatever_was_filtered() -> None:
    logits, rows = a_mixed_batch()
    tokens, logprobs = run(logits, rows)
    expected = [np.log(shares(row)[token]) for row, token in zip(logits, tokens, strict=True)]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_a_masked_token_is_never_drawn() -> None:
    logits = np.zeros(VOCAB)
    logits[3], logits[8] = -np.inf, -1e30
    for filters in ({}, {"top_k": 11}, {"top_p": 0.999}, {"min_p": 1e-6}):
        assert support(logits, **filters) <= set(range(VOCAB)) - {3, 8}


def test_a_vocabulary_of_full_size_is_filtered_exactly() -> None:
    logits = np.random.default_rng(16).normal(size=151_552).astype(np.float32)
    many = np.broadcast_to(logits, (6, logits.size))
    top_k, top_p = [1, 3, 40, 0, 0, 0], [1.0, 1.0, 1.0, 1e-5, 0.01, 0.5]
    tokens, _ = run(many, rows_of(6, top_k=top_k, top_p=top_p))
    descending = np.argsort(-logits)
    mass = np.cumsum(shares(logits)[descending])
    sizes = [1, 3, 40, *(np.searchsorted(mass, p) + 1 for p in top_p[3:])]
    places = np.argsort(descending)[tokens]
    assert (places <= 1.001 * np.array(sizes)).all() and places[0] == 0


def test_padding_rows_come_to_no_harm_and_do_none() -> None:
    logits, rows = a_mixed_batch()
    tokens, logprobs = run(logits, rows)
    padding = jax.tree.map(jnp.zeros_like, rows)
    both = jax.tree.map(lambda *pair: jnp.concatenate(pair), rows, padding)
    padded, padded_logprobs = run(np.concatenate([logits, np.zeros_like(logits)]), both)
    np.testing.assert_array_equal(padded[:8], tokens)
    np.testing.assert_array_equal(padded[8:], 0)
    assert np.isfinite(padded_logprobs).all()
    alone, alone_logprobs = run(np.zeros_like(logits), padding)
    np.testing.assert_array_equal(alone, 0)
    assert np.isfinite(alone_logprobs).all()
    np.testing.assert_allclose(padded_logprobs[:8], logprobs, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 1000, 151_552])
def test_masses_are_whole_whatever_the_size_of_the_vocabulary(size: int) -> None:
    logits = 5 * np.random.default_rng(size).standard_normal((2, size), np.float32)
    expected = np.log(np.exp(logits.astype(np.float64)).sum(1))
    np.testing.assert_allclose(compiled(log_sum_exp)(logits), expected, rtol=1e-6)


def test_no_order_of_a_sum_over_the_vocabulary_is_left_to_the_compiler() -> None:
    # XLA's depends on what a sum is fused with, so a row's bits did on the number of rows.
    logits = jnp.zeros((4, 151_552), jnp.float32)
    jaxpr = str(jax.make_jaxpr(sample)(logits, rows_of(4, top_p=0.5)))
    assert "optimization_barrier" in jaxpr
    assert "reduce_sum" not in jaxpr and "cumsum" not in jaxpr
