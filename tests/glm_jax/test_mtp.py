"""The MTP layer with a cache, against the same layer as it is trained, without one."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from checkpoints.nano_training.draft import Draft
from glm_jax.attention import Pages, attend_causal
from glm_jax.cache import KVCache
from glm_jax.model import bind, specs_of
from glm_jax.mtp import PREFIX, MtpLayer, abstract_mtp, bind_mtp, weight_specs
from glm_jax.sharding import make_mesh
from glm_jax.steps import COMPILER_OPTIONS
from tests.glm_jax.tiny import F32, bits, make_arrays, make_config

CONFIG = make_config()
ROWS, LENGTH, PAGE_SIZE, PAGES = 2, 11, 4, 3
WEIGHTS = make_arrays(specs_of(abstract_mtp(CONFIG, F32)))
RNG = np.random.default_rng(0)
EMBEDDED, HIDDEN = RNG.normal(size=(2, ROWS, LENGTH, CONFIG.hidden_size)).astype(np.float32)
POSITIONS = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
TABLE = np.arange(ROWS * PAGES, dtype=np.int32).reshape(ROWS, PAGES)[::-1]


def on_a_device(body: Callable[..., Any], *arrays: Any) -> Any:
    sharded = jax.shard_map(
        body, mesh=make_mesh(1), in_specs=PartitionSpec(), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    return jax.tree.map(np.asarray, jax.jit(sharded, compiler_options=COMPILER_OPTIONS)(*arrays))


def empty() -> KVCache:
    shape = (1, ROWS * PAGES, CONFIG.num_key_value_heads, PAGE_SIZE, CONFIG.head_dim)
    return KVCache(*np.zeros((2, *shape), np.float32))  # type: ignore[arg-type]


def layer() -> MtpLayer:
    return bind(abstract_mtp(CONFIG, F32), WEIGHTS)  # type: ignore[arg-type]


def whole(embedded: Array, hidden: Array, cache: KVCache) -> tuple[Array, KVCache]:
    return layer()(embedded, hidden, POSITIONS, cache, Pages(TABLE))  # type: ignore[arg-type]


def test_states_are_those_of_the_layer_as_it_is_trained() -> None:
    trained = nnx.eval_shape(lambda: Draft(CONFIG, F32, rngs=nnx.Rngs(0)))
    assert specs_of(trained).keys() == WEIGHTS.keys()

    def expected(embedded: Array, hidden: Array) -> Array:
        visible = np.tile(np.tril(np.ones((LENGTH, LENGTH), bool)), (ROWS, 1, 1))
        attend = attend_causal(visible)  # type: ignore[arg-type]
        draft = bind(trained, WEIGHTS)  # type: ignore[arg-type]
        return draft(embedded, hidden, POSITIONS, attend)[0]  # type: ignore[arg-type]

    found, _ = on_a_device(whole, EMBEDDED, HIDDEN, empty())
    np.testing.assert_allclose(found, on_a_device(expected, EMBEDDED, HIDDEN), rtol=2e-4, atol=2e-5)


def test_tokens_one_by_one_after_remembered_ones_get_the_bits_of_all_at_once() -> None:
    first = 7

    def piecewise(embedded: Array, hidden: Array, cache: KVCache) -> tuple[list[Array], KVCache]:
        mtp, pages = layer(), Pages(TABLE)  # type: ignore[arg-type]

        def at(start: int, end: int) -> tuple[Array, Array, Array]:
            return embedded[:, start:end], hidden[:, start:end], POSITIONS[:, start:end]  # type: ignore[return-value]

        cache = mtp.remember(*at(0, first), cache, pages)
        states = []
        for position in range(first, LENGTH):
            state, cache = mtp(*at(position, position + 1), cache, pages)
            states.append(state[:, 0])
        return states, cache

    expected, expected_cache = on_a_device(whole, EMBEDDED, HIDDEN, empty())
    states, cache = on_a_device(piecewise, EMBEDDED, HIDDEN, empty())
    for position, state in enumerate(states, first):
        assert (bits(state) == bits(expected[:, position])).all(), position
    for found, wanted in zip(cache, expected_cache, strict=True):
        assert (bits(found) == bits(wanted)).all()
        assert np.abs(found).sum() > 0


def test_the_embedding_comes_first_and_the_hidden_state_second() -> None:
    found, _ = on_a_device(whole, EMBEDDED, HIDDEN, empty())
    swapped, _ = on_a_device(whole, HIDDEN, EMBEDDED, empty())
    assert np.abs(found - swapped).max() > 0.1


def test_its_weights_stand_among_the_models_under_their_prefix() -> None:
    specs = weight_specs(CONFIG, F32, with_mtp=True)
    own = {path: spec for path, spec in specs.items() if path.startswith(PREFIX)}
    assert {path.removeprefix(PREFIX) for path in own} == WEIGHTS.keys()
    assert specs.keys() - own.keys() == weight_specs(CONFIG, F32, with_mtp=False).keys()
    weights = {path: np.zeros(1) for path in specs} | {f"{PREFIX}norm.weight": np.ones(3)}
    bound = bind_mtp(abstract_mtp(CONFIG, F32), weights)  # type: ignore[arg-type]
    assert bound.norm.weight[...].shape == (3,)
