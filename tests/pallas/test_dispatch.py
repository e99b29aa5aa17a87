"""Picks sorted by expert: every local pick has one row, in a tile of its own expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.fp8 import quantize_rows
from glm_jax.pallas import dispatch as dispatch_module
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Dispatch, default_tile, dispatch, max_tiles, stage


def random_picks(seed: int, num_tokens: int, num_choices: int, num_experts: int) -> np.ndarray:
    scores = np.random.default_rng(seed).random((num_tokens, num_experts))
    return np.argsort(scores, axis=1)[:, :num_choices].astype(np.int32)


def assert_sorted(found: Dispatch, picks: np.ndarray, first: int, num_local: int) -> None:
    """The promises of Dispatch, counted out one pick after the other."""
    rows, tokens = np.asarray(found.rows), np.asarray(found.tokens)
    tile_experts, tile = np.asarray(found.tile_experts), found.tile
    row, tiles = 0, []
    for expert in range(first, first + num_local):
        takers = np.flatnonzero((picks == expert).any(1))
        for number, token in enumerate(takers):
            assert rows[token][picks[token] == expert] == row + number
            assert tokens[row + number] == token
        num_tiles = -(-len(takers) // tile)
        tiles += [expert - first] * num_tiles
        row += num_tiles * tile
    assert found.num_tiles.tolist() == [len(tiles)]
    assert tile_experts[: len(tiles)].tolist() == tiles
    assert ((tile_experts >= 0) & (tile_experts < num_local)).all()
    assert ((tokens >= 0) & (tokens < len(picks))).all()
    elsewhere = (picks < first) | (picks >= first + num_local)
    assert (rows[elsewhere] == len(tokens)).all()


@pytest.mark.parametrize(
    ("seed", "num_tokens", "num_choices", "num_experts", "first", "num_local", "tile"),
    [
        (0, 1, 3, 8, 2, 4, 16),
        (1, 37, 3, 8, 4, 4, 4),
        (2, 64, 8, 16, 0, 16, 16),
        (3, 5, 8, 8, 6, 2, 2),
        (4, 33, 2, 6, 0, 3, 8),
    ],
)
def test_picks_are_sorted_by_expert_then_token(
    seed: int,
    num_tokens: int,
    num_choices: int,
    num_experts: int,
    first: int,
    num_local: int,
    tile: int,
) -> None:
    picks = random_picks(seed, num_tokens, num_choices, num_experts)
    found = dispatch(jnp.asarray(picks), jnp.int32(first), num_local, tile=tile)
    assert_sorted(found, picks, first, num_local)


def test_all_tokens_on_one_expert_and_none_on_any() -> None:
    picks = np.tile(np.array([[3, 0]], np.int32), (21, 1))
    assert_sorted(dispatch(jnp.asarray(picks), jnp.int32(2), 2, tile=4), picks, 2, 2)
    found = dispatch(jnp.asarray(picks), jnp.int32(4), 4, tile=4)
    assert_sorted(found, picks, 4, 4)
    assert found.num_tiles.tolist() == [0]


def test_the_first_expert_may_be_known_on_the_device_only() -> None:
    picks = random_picks(5, 9, 2, 4)
    found = jax.jit(lambda picks, first: dispatch(picks, first, 2))(
        jnp.asarray(picks), jnp.int32(2)
    )
    assert_sorted(found, picks, 2, 2)


@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize(("num_tokens", "num_choices", "num_local"), [(5, 2, 4), (16, 1, 3)])
def test_the_worst_picks_fill_no_more_tiles_than_there_are(
    num_tokens: int, num_choices: int, num_local: int, tile: int
) -> None:
    bound = max_tiles(num_tokens, num_choices, num_local, tile)
    for seed in range(50):
        picks = random_picks(seed, num_tokens, num_choices, num_local)
        assert (-(-np.bincount(picks.ravel()) // tile)).sum() <= bound


def test_tiles_grow_with_the_step() -> None:
    steps = (1, 64, 65, 256, 1024, 8192)
    assert [default_tile(step, Chip("sm90", 132)) for step in steps] == [8, 8, 16, 32, 64, 128]
    assert [default_tile(step, Chip("sm100", 148)) for step in steps] == [16, 16, 16, 32, 64, 128]


@pytest.mark.parametrize("most_counted", [0, 256])
@pytest.mark.parametrize(
    ("seed", "num_tokens", "num_choices", "num_experts", "first", "num_local", "tile"),
    [(0, 5, 2, 6, 2, 3, 4), (1, 21, 3, 4, 0, 4, 16), (2, 1, 2, 4, 0, 1, 16)],
)
def test_staged_rows_are_the_tokens_that_were_sorted(
    monkeypatch: pytest.MonkeyPatch,
    most_counted: int,
    seed: int,
    num_tokens: int,
    num_choices: int,
    num_experts: int,
    first: int,
    num_local: int,
    tile: int,
) -> None:
    """Whether a kernel sorts them too, or only copies them."""
    monkeypatch.setattr(dispatch_module, "_MOST_COUNTED", most_counted)
    picks = random_picks(seed, num_tokens, num_choices, num_experts)
    x, x_scale = quantize_rows(jax.random.normal(jax.random.key(seed), (num_tokens, 128)))
    found = stage(
        x, x_scale, jnp.asarray(picks), jnp.int32(first), num_local,
        chip=Chip("sm90", 3), tile=tile, interpret=True,
    )  # fmt: skip
    wanted = dispatch(jnp.asarray(picks), jnp.int32(first), num_local, tile=tile)
    num_tiles = int(wanted.num_tiles[0])
    num_rows = num_tiles * tile
    assert found.tile == tile
    assert found.num_tiles.tolist() == [num_tiles]
    assert found.rows.tolist() == wanted.rows.tolist()
    assert found.tile_experts[:num_tiles].tolist() == wanted.tile_experts[:num_tiles].tolist()
    tokens = np.asarray(wanted.tokens[:num_rows])
    assert found.tokens[:num_rows].tolist() == tokens.tolist()
    assert found.values is not None and found.scale is not None
    np.testing.assert_array_equal(np.asarray(found.values[:num_rows]), np.asarray(x)[tokens])
    np.testing.assert_array_equal(np.asarray(found.scale[:num_rows]), np.asarray(x_scale)[tokens])
