"""Looking inside changes nothing, and shows the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.dummy import dummy_weights
from glm_jax.forward import Forward, forward_function
from glm_jax.model import abstract_weights
from glm_jax.sharding import make_mesh
from tests.glm_jax.tiny import BF16, make_config

CONFIG = make_config(is_fp8=True, vocab_size=256)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)


def run(num_devices: int, with_attention: bool) -> Forward:
    mesh = make_mesh(num_devices)
    weights = dummy_weights(abstract_weights(CONFIG, BF16), mesh, seed=1)
    forward = forward_function(CONFIG, mesh, jnp.bfloat16, with_attention=with_attention)
    return jax.tree.map(np.asarray, forward(weights, TOKENS))


@pytest.fixture(scope="module")
def seen() -> Forward:
    return run(1, with_attention=True)


def test_attention_is_shared_out_among_the_positions_before(seen: Forward):
    shares = np.asarray(seen.attention)
    assert shares.shape == (CONFIG.num_hidden_layers, 2, CONFIG.num_attention_heads, 12, 12)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    assert not np.triu(shares, 1).any()
    assert shares[..., 0, 0].min() == 1
    # Layers and heads look at different places.
    assert shares[:, :, :, -1].std(axis=(0, 2)).max() > 0.01


def test_recording_attention_leaves_the_rest_as_it_was(seen: Forward):
    plain = run(1, with_attention=False)
    assert plain.attention is None
    np.testing.assert_array_equal(seen.logits, plain.logits)
    np.testing.assert_array_equal(seen.trace.hidden, plain.trace.hidden)


def test_eight_devices_show_the_heads_in_the_order_of_one(seen: Forward):
    eight = run(8, with_attention=True)
    np.testing.assert_array_equal(np.asarray(eight.attention), np.asarray(seen.attention))
