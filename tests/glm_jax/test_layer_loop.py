"""The loop over layers: each once and in order, however many a turn has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from glm_jax.model import Carry, Layerwise, _walk
from glm_jax.ops import NormedRows, Rows


def mark(carry: Carry, _: None) -> tuple[Carry, Layerwise | None]:
    """A layer that writes its number behind those before it."""
    layer, normed, cache = carry
    seen = jnp.roll(normed.residual, -1).at[-1].set(layer.astype(jnp.float32))
    return (layer + 1, NormedRows(seen, normed.rows), cache), (seen, None)


@pytest.mark.parametrize("at_a_time", [1, 2, 4])
@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 4), (3, 8), (3, 12), (2, 4)])
def test_layers_come_once_and_in_order(first: int, end: int, at_a_time: int) -> None:
    def walk(seen: Array) -> tuple[Array, Array]:
        carry: Carry = (jnp.int32(7), NormedRows(seen, Rows(None)), None)
        (layer, normed, _), _ = _walk(mark, carry, first, end, at_a_time, with_trace=False)
        return layer, normed.residual

    layer, seen = jax.jit(walk)(jnp.full(16, -1.0))
    expected = [*[-1] * (16 - (end - first)), *range(first, end)]
    np.testing.assert_array_equal(seen, expected)
    assert int(layer) == end


def test_a_trace_has_every_layer() -> None:
    carry: Carry = (jnp.int32(0), NormedRows(jnp.full(4, -1.0), Rows(None)), None)
    _, traced = _walk(mark, carry, 1, 4, 2, with_trace=True)
    assert traced is not None
    np.testing.assert_array_equal(traced[0][:, -1], [1, 2, 3])
