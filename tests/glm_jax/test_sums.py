"""A sum over devices has the same bits however many rows are summed with it, and whichever way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array

from glm_jax.kernels import Kernels
from glm_jax.operands import ExpertRows
from glm_jax.pallas.chip import Chip
from glm_jax.sharding import MESH_AXIS, make_mesh, sum_in_order
from glm_jax.steps import COMPILER_OPTIONS

GPU = Chip("sm90", num_cores=4)
WIDTH, CHOICES = 256, 3


def on_devices(num_devices: int, body: Any, *operands: Array) -> Any:
    """What each device makes of its own operands, by device."""

    def on_one(*mine: Array) -> Any:
        own = [operand[0] for operand in mine]
        return jax.tree.map(lambda out: out[None], body(*own))

    split = PartitionSpec(MESH_AXIS)
    mesh = make_mesh(num_devices)
    step = jax.shard_map(on_one, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return jax.jit(step, compiler_options=COMPILER_OPTIONS)(*operands)


def draw(seed: int, *shape: int) -> Array:
    """Rows of magnitudes so different that the order of a sum shows."""
    keys = jax.random.split(jax.random.key(seed), 2)
    exponents = jax.random.randint(keys[0], (*shape[:1], 1, 1), -8, 8).astype(jnp.float32)
    return (jax.random.normal(keys[1], shape) * 2**exponents).astype(jnp.bfloat16)


@pytest.mark.parametrize(("num_devices", "num_rows"), [(1, 5), (2, 5), (8, 16), (8, 21)])
def test_rows_are_added_in_float32_from_device_0_on(num_devices: int, num_rows: int) -> None:
    x = draw(num_rows, num_devices, num_rows, WIDTH)
    expected = np.zeros((num_rows, WIDTH), np.float32)
    for device in range(num_devices):
        expected = expected + np.asarray(x[device], np.float32)
    found = on_devices(num_devices, sum_in_order, x)
    for device in range(num_devices):
        np.testing.assert_array_equal(
            np.asarray(found[device], np.float32),
            np.asarray(jnp.asarray(expected).astype(jnp.bfloat16), np.float32),
        )


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("are_experts", [False, True])
def test_a_sum_apart_has_the_bits_of_the_fused_one(num_devices: int, are_experts: bool) -> None:
    num_rows, rows = 16, 24
    residual, weight = draw(1, 1, num_rows, WIDTH)[0], jnp.ones((2, WIDTH), jnp.bfloat16)
    pending: list[Array] = [draw(2, num_devices, num_rows, WIDTH)]
    if are_experts:
        keys = jax.random.split(jax.random.key(3), 2)
        shape = (num_devices, num_rows, CHOICES)
        pending = [draw(4, num_devices, rows, WIDTH), *pending]
        # One place in nine is another device's.
        pending += [jax.random.randint(keys[0], shape, 0, rows + 3).clip(max=rows)]
        pending += [jax.random.uniform(keys[1], shape)]

    def summed(*mine: Array, fused: bool) -> tuple[Array, Array]:
        kernels = Kernels(interpreted=GPU, fused_all_reduce=fused)
        what = ExpertRows(*mine) if are_experts else mine[0][None]
        normed, _ = kernels.sum_add_norm(what, residual, weight, 1, eps=1e-5, is_fp8=True)
        assert normed.rows.values is not None
        return normed.residual, normed.rows.values

    fused, apart = (
        on_devices(num_devices, lambda *mine, way=way: summed(*mine, fused=way), *pending)
        for way in (True, False)
    )
    for one, other in zip(fused, apart, strict=True):
        np.testing.assert_array_equal(
            np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8)
        )
