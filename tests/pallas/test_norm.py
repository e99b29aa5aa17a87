"""The norm kernel against the layer's own arithmetic, bit by bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from glm_jax.fp8 import quantize_rows
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.norm import NormedRows, add_norm_quantize

EPS = 1e-5
# XLA's CPU compiler may skip roundings to bfloat16 that a GPU kernel does make.
rounded = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
run = rounded(partial(add_norm_quantize, eps=EPS, chip=Chip("sm90", 4), interpret=True))


@rounded
def norm_reference(x: Array, added: Array | None, weight: Array, layer: int) -> NormedRows:
    """What layers.RMSNorm and fp8.quantize_rows make of x + added."""
    residual = x if added is None else x + added
    wide = residual.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    normed = wide.astype(x.dtype) * weight[layer][None]
    return NormedRows(residual, normed, *quantize_rows(normed))


def draw(seed: int, num_rows: int, width: int, num_layers: int = 3) -> tuple[Array, Array, Array]:
    """x, added and weight, of magnitudes as they occur deep in the model."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x, added = (jax.random.normal(key, (num_rows, width), jnp.bfloat16) * 8 for key in keys[:2])
    weight = 1 + jax.random.normal(keys[2], (num_layers, width), jnp.bfloat16) / 4
    return x, added, weight


def assert_same(got: NormedRows, expected: NormedRows) -> None:
    """Equal but for values that round the other way: the order of a row's sum is the kernel's own,
    and a division may end in another last bit."""
    np.testing.assert_array_equal(got.residual, expected.residual)
    normed, wanted = (np.asarray(rows.normed, np.float32) for rows in (got, expected))
    np.testing.assert_allclose(normed, wanted, rtol=2**-7, atol=0)
    assert np.mean(normed != wanted) < 0.01
    values, scale = (np.asarray(array, np.float32) for array in quantize_rows(got.normed))
    np.testing.assert_allclose(got.scale, scale, rtol=2**-22)
    assert np.mean(np.asarray(got.values, np.float32) != values) < 0.002
    dequantized = np.asarray(got.values, np.float32) * np.asarray(got.scale)
    np.testing.assert_allclose(dequantized, normed, rtol=2**-4, atol=float(scale.max()) * 2**-10)


@pytest.mark.parametrize(("num_rows", "width"), [(1, 128), (3, 640), (2, 1024)])
@pytest.mark.parametrize("seed", range(2))
def test_adds_norms_and_quantizes_as_the_layers_do(seed: int, num_rows: int, width: int) -> None:
    x, added, weight = draw(seed, num_rows, width)
    got = run(x, added, weight, jnp.int32(1))
    assert_same(got, norm_reference(x, added, weight, 1))


def test_without_an_addend_the_residual_is_the_input() -> None:
    x, _, weight = draw(0, 2, 256)
    got = run(x, None, weight, jnp.int32(2))
    assert_same(got, norm_reference(x, None, weight, 2))


@pytest.mark.parametrize("is_sum", [True, False])
def test_a_place_that_is_known_when_traced_is_as_good_as_one_that_is_read(is_sum: bool) -> None:
    x, other, weight = draw(1, 3, 384)
    added = other if is_sum else None
    norm = partial(add_norm_quantize, eps=EPS, chip=Chip("sm90", 4), shift=1, interpret=True)
    known = rounded(lambda x, added, weight: norm(x, added, weight, 1))(x, added, weight)
    for mine, read in zip(known[:4], run(x, added, weight, jnp.int32(2))[:4], strict=True):
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(read, np.float32))


def test_a_row_of_zeros_stays_zeros_with_scale_one() -> None:
    x, added, weight = draw(0, 3, 256)
    x, added = x.at[1].set(0), added.at[1].set(0)
    got = run(x, added, weight, jnp.int32(0))
    assert got.scale[1, 0] == 1
    assert not np.asarray(got.values[1], np.float32).any()
    assert_same(got, norm_reference(x, added, weight, 0))


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it() -> None:
    x, added, weight = draw(3, 4, 384)
    together = run(x, added, weight, jnp.int32(0))
    alone = run(x[2:3], added[2:3], weight, jnp.int32(0))
    for many, one in zip(together[:4], alone[:4], strict=True):
        np.testing.assert_array_equal(
            np.asarray(many[2:3], np.float32), np.asarray(one, np.float32)
        )


def test_widths_that_threads_cannot_share_are_refused() -> None:
    x, added, weight = draw(0, 1, 192)
    with pytest.raises(NotImplementedError, match="width=192"):
        run(x, added, weight, jnp.int32(0))
