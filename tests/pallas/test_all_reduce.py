"""The fused all-reduce's arithmetic on eight fake devices; how devices wait, only real ones can show.

The interpreter has neither peers' memory nor counters, so here XLA gathers the rows. What the compiled
kernel does in their stead, test_compile.py reads in its code.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array

from glm_jax.pallas.all_reduce import Summands, all_reduce_add_norm
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.grouped_down import combine
from glm_jax.pallas.norm import NormedRows
from glm_jax.sharding import MESH_AXIS, make_mesh
from tests.pallas.test_norm import assert_same, draw, norm_reference, rounded

CHIP = Chip("sm90", 132)
EPS = 1e-5


def run(partials: Array, residual: Array, weight: Array, layer: int) -> NormedRows:
    """Every device's answer: each output has a leading dimension of devices."""
    num_devices = partials.shape[0]

    def on_device(partial_rows: Array, *operands: Array) -> NormedRows:
        rows = all_reduce_add_norm(
            partial_rows[0],
            *operands,
            eps=EPS,
            axis_name=MESH_AXIS,
            num_devices=num_devices,
            chip=CHIP,
            interpret=True,
        )
        return jax.tree.map(lambda output: output[None], rows)

    split, whole = PartitionSpec(MESH_AXIS), PartitionSpec()
    step = jax.shard_map(
        on_device,
        mesh=make_mesh(num_devices),
        in_specs=(split, whole, whole, whole),
        out_specs=split,
        check_vma=False,
    )
    return rounded(step)(partials, residual, weight, jnp.int32(layer))


def draw_partials(seed: int, num_devices: int, num_rows: int, width: int) -> Array:
    """Partial sums of magnitudes so different that the order they are added in shows."""
    keys = jax.random.split(jax.random.key(seed), 2)
    shape = (num_devices, num_rows, width)
    exponents = jax.random.randint(keys[0], (num_devices, 1, 1), -8, 8).astype(jnp.float32)
    partials = jax.random.normal(keys[1], shape, jnp.float32) * 2**exponents
    return partials.astype(jnp.bfloat16)


def sum_in_order(partials: Array) -> Array:
    """Device 0 first, in float32, rounded once."""
    total = partials[0].astype(jnp.float32)
    for rows in partials[1:]:
        total = total + rows.astype(jnp.float32)
    return total.astype(jnp.bfloat16)


@pytest.mark.parametrize(("seed", "num_devices"), [(0, 1), (1, 2), (2, 8)])
def test_sums_in_order_and_norms_as_the_layers_do(seed: int, num_devices: int) -> None:
    residual, _, weight = draw(seed, 3, 256)
    partials = draw_partials(seed, num_devices, 3, 256)
    got = run(partials, residual, weight, 1)
    expected = norm_reference(residual, rounded(sum_in_order)(partials), weight, 1)
    for device in range(num_devices):
        assert_same(NormedRows(*(output[device] for output in got[:4])), expected)


def test_every_device_gets_the_same_bits_and_a_row_the_same_in_any_company() -> None:
    residual, _, weight = draw(5, 4, 128)
    partials = draw_partials(5, 4, 4, 128)
    together = run(partials, residual, weight, 0)
    alone = run(partials[:, 2:3], residual[2:3], weight, 0)
    for many, one in zip(together[:4], alone[:4], strict=True):
        many, one = np.asarray(many, np.float32), np.asarray(one, np.float32)
        for device in range(4):
            np.testing.assert_array_equal(many[device], many[0])
            np.testing.assert_array_equal(one[device], many[0, 2:3])


@pytest.mark.parametrize("num_devices", [1, 2])
def test_what_experts_made_is_added_up_before_devices_are(num_devices: int) -> None:
    num_rows, num_tokens, width = 12, 3, 256
    residual, _, weight = draw(7, num_tokens, width)
    rows = draw_partials(8, num_devices, num_rows, width)
    shared = draw_partials(9, num_devices, num_tokens, width)
    # Rows from 9 on belong to nobody, and 12 is the place of what another device has.
    places = jnp.array([[0, 12, 8, 3], [12, 12, 12, 12], [1, 2, 4, 7]], jnp.int32)
    rows = rows.at[:, 9:].set(jnp.nan)
    weights = jax.random.uniform(jax.random.key(3), (num_devices, num_tokens, 4))
    each = [
        Summands(rows[device], shared[device], places, weights[device])
        for device in range(num_devices)
    ]
    partials = jnp.stack([rounded(combine)(*summands).astype(jnp.bfloat16) for summands in each])
    expected = norm_reference(residual, rounded(sum_in_order)(partials), weight, 1)

    def on_device(summands: Summands, *operands: Array) -> NormedRows:
        mine = Summands(*(array[0] for array in summands))
        found = all_reduce_add_norm(
            mine, *operands, eps=EPS, axis_name=MESH_AXIS, num_devices=num_devices, chip=CHIP,
            shift=-1, interpret=True,
        )  # fmt: skip
        return jax.tree.map(lambda output: output[None], found)

    split, whole = PartitionSpec(MESH_AXIS), PartitionSpec()
    step = jax.shard_map(
        on_device,
        mesh=make_mesh(num_devices),
        in_specs=(split, whole, whole, whole),
        out_specs=split,
        check_vma=False,
    )
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    got = rounded(step)(stacked, residual, weight, jnp.int32(2))
    for device in range(num_devices):
        assert_same(NormedRows(*(output[device] for output in got[:4])), expected)


@pytest.mark.parametrize(("layer", "shift", "tells"), [(2, 0, 1), (2, 1, 1), (4, -3, 0)])
def test_a_place_is_told_where_it_is_asked_for(layer: int, shift: int, tells: int) -> None:
    residual, added, weight = draw(11, 3, 128)
    mesh, whole = make_mesh(1), PartitionSpec()

    def on_device(*operands: Array) -> NormedRows:
        return all_reduce_add_norm(
            *operands, eps=EPS, axis_name=MESH_AXIS, num_devices=1, chip=CHIP, shift=shift,
            tells=tells, interpret=True,
        )  # fmt: skip

    step = jax.shard_map(on_device, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    weights = jnp.tile(weight, (3, 1))
    got = rounded(step)(added, residual, weights, jnp.int32(layer))
    assert got.place is not None and got.place.shape == () and int(got.place) == layer + tells
    expected = norm_reference(residual, added, weights, layer + shift)
    assert_same(got._replace(place=None), expected)


@pytest.mark.parametrize(
    ("num_rows", "chip", "said"),
    [
        (257, CHIP, "up to 256 rows"),
        (133, Chip("sm90", 66), "up to 132 rows"),
        (1, CHIP, "have no inbox"),
    ],
)
def test_what_one_exchange_is_not_for_is_refused(num_rows: int, chip: Chip, said: str) -> None:
    rows = jnp.zeros((num_rows, 128), jnp.bfloat16)
    kernel = partial(all_reduce_add_norm, eps=EPS, num_devices=8, chip=chip)
    with pytest.raises(NotImplementedError, match=said):
        kernel(rows, rows, jnp.ones((1, 128), jnp.bfloat16), jnp.int32(0))
