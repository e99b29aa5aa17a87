"""The PTX of picks and places, run on this machine, does what router and dispatch say."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.pallas import places
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.dispatch import Sizes, default_tile, dispatch, max_tiles
from glm_jax.pallas.router import Choice
from tests.pallas import ptx_machine
from tests.pallas.ptx_machine import Memory

WIDTH, SCALING, CALLS, MAKERS = 128, 2.5, 2, 3
_SHARED = ("scores", "biases", "known", "parts", "row")
_EACH = ("experts", "weights", "rows")


def codes(monkeypatch: pytest.MonkeyPatch, sizes: Sizes, choice: Choice) -> list[Any]:
    """The PTX of what a token's CTA runs, with the names of its operands."""
    found: list[Any] = []

    def keep(code: str, device_refs: list[Any], shared_refs: list[Any]) -> None:
        found.append((code, [*device_refs, *shared_refs]))

    monkeypatch.setattr(places, "_inline", keep)
    inputs = places.Inputs(*places.Inputs._fields)
    outputs = places.Outputs(*places.Outputs._fields)
    shared = {name: f"shared {name}" for name in _SHARED}
    places.ask(inputs, shared, choice.num_experts)
    places.place(inputs, outputs, shared, sizes, choice, MAKERS)
    return found


def outputs_of(sizes: Sizes) -> dict[str, np.ndarray]:
    rows, tokens = sizes.tiles * sizes.tile, sizes.num_tokens
    kinds = {
        "experts": ((tokens, 8), "i4"), "weights": ((tokens, 8), "f4"), "rows": ((tokens, 8), "i4"),
        "values": ((rows, WIDTH), "u1"), "scale": ((rows,), "f4"), "tokens": ((rows,), "i4"),
        "tile_experts": ((sizes.tiles,), "i4"), "num_tiles": ((1,), "i4"),
    }  # fmt: skip
    return {name: np.full(shape, 77, dtype) for name, (shape, dtype) in kinds.items()}


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_local", "first", "num_picks", "kind"),
    [
        (1, 160, 20, 20, 8, "plain"),
        (5, 160, 20, 20, 8, "equal"),
        (19, 32, 8, 8, 8, "all here"),
        (17, 160, 20, 140, 8, "plain"),
        (9, 24, 24, 0, 3, "plain"),
        (10, 160, 80, 80, 8, "all of one"),
        (7, 160, 20, 20, 8, "none here"),
        (131, 64, 40, 24, 8, "plain"),
    ],
)
def test_tokens_come_to_their_places(
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    num_experts: int,
    num_local: int,
    first: int,
    num_picks: int,
    kind: str,
) -> None:
    draw = np.random.default_rng(num_tokens)
    choice = Choice(num_experts, num_picks, norm_topk_prob=True, routed_scaling_factor=SCALING)
    tile = default_tile(num_tokens, Chip("sm90", 132))
    tiles = max_tiles(num_tokens, num_picks, num_local, tile)
    sizes = Sizes(num_tokens, num_picks, choice.padded_picks, num_local, tile, tiles, WIDTH)
    device, arrays = Memory(1 << 32), outputs_of(sizes)
    arrays["words"] = np.zeros(places.num_words(num_tokens, num_local), np.int32)
    arrays |= {"first": np.array([first], np.int32), "biases": np.zeros(num_experts, np.float32)}
    arrays["x_scale"] = draw.random(num_tokens, np.float32)
    addresses = {name: device.add(array) for name, array in arrays.items()}
    code = codes(monkeypatch, sizes, choice)
    for call in range(CALLS):
        scores, x = drawn(draw, kind, arrays["biases"], num_tokens, range(first, first + num_local))

        def operands(cta: int, shared: Memory, scores=scores, x=x) -> Mapping[str, int]:
            token = cta - MAKERS
            own = {name: addresses[name] + 32 * token for name in _EACH}
            for name, size in (("scores", 256), ("biases", 256), ("known", 4), ("parts", 512)):
                array = np.full(size, np.nan, np.float32)
                if name == "scores":
                    array[:num_experts] = scores[token]
                own[f"shared {name}"] = shared.add(array)
            return addresses | own | {"shared row": shared.add(x[token].copy())}

        ptx_machine.run(code, range(MAKERS, MAKERS + num_tokens), device, operands, seed=call)
        check(sizes, choice, first, arrays, scores, x)
        assert arrays["words"][0] == call + 1


def drawn(
    draw: np.random.Generator, kind: str, biases: np.ndarray, num_tokens: int, local: range
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and tokens; biases are set."""
    scores = draw.random((num_tokens, len(biases)), np.float32)
    biases[:] = draw.random(len(biases), np.float32) - np.float32(0.5)
    if kind == "equal":
        scores, biases[:] = np.round(scores * 8) / np.float32(8), 0
    biases[local.start : local.stop] += {"all here": 5, "none here": -5}.get(kind, 0)
    biases[local.start + 3] += 5 * (kind == "all of one")
    return scores, draw.integers(0, 256, (num_tokens, WIDTH), np.uint8)


def check(
    sizes: Sizes,
    choice: Choice,
    first: int,
    arrays: dict[str, np.ndarray],
    scores: np.ndarray,
    x: np.ndarray,
) -> None:
    picks = np.argsort(-(scores + arrays["biases"]), axis=1, kind="stable")[:, : choice.num_picks]
    wanted = dispatch(
        jnp.asarray(picks.astype(np.int32)), jnp.int32(first), sizes.num_local, tile=sizes.tile
    )
    num_tiles, rows = int(wanted.num_tiles[0]), np.asarray(wanted.rows)
    asked = slice(None, choice.num_picks)
    np.testing.assert_array_equal(arrays["experts"][:, asked], picks)
    np.testing.assert_array_equal(arrays["rows"][:, asked], rows)
    assert arrays["num_tiles"] == num_tiles
    in_use = np.asarray(wanted.tile_experts)[:num_tiles]
    np.testing.assert_array_equal(arrays["tile_experts"][:num_tiles], in_use)
    token, number = np.nonzero(rows < len(wanted.tokens))
    places_of = rows[token, number]
    np.testing.assert_array_equal(arrays["tokens"][places_of], token)
    np.testing.assert_array_equal(arrays["scale"][places_of], arrays["x_scale"][token])
    np.testing.assert_array_equal(arrays["values"][places_of], x[token])
    shares = np.take_along_axis(scores, picks, axis=1)
    shares = SCALING * shares / shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(arrays["weights"][:, asked], shares, rtol=1e-6)
