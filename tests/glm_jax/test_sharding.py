"""One table from logical axes to the mesh, and a sum over devices that the mesh does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from glm_jax.model import abstract_weights
from glm_jax.sharding import (
    MESH_AXIS,
    RULES,
    WeightSpec,
    all_gather,
    check_divisible,
    device_index,
    make_mesh,
    partition_spec,
    sharding_for,
    sum_partials,
)
from glm_jax.steps import COMPILER_OPTIONS
from tests.glm_jax.tiny import BF16, F32, bits, make_config

NUM_PARTIALS = 8


def summing(dtype: np.dtype, num_devices: int) -> jax.stages.Wrapped:
    """sum_partials of [8, T, D], the partials shared out over the devices."""
    sharded = jax.shard_map(
        lambda partials: sum_partials(partials, jnp.dtype(dtype)),
        mesh=make_mesh(num_devices),
        in_specs=PartitionSpec(MESH_AXIS),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.jit(sharded, compiler_options=COMPILER_OPTIONS)


def partials_of(seed: int) -> np.ndarray:
    """Partial products of very different sizes, as float32."""
    rng = np.random.default_rng(seed)
    shape = (NUM_PARTIALS, 16, 32)
    return (rng.normal(size=shape) * 10.0 ** rng.integers(-2, 2, shape)).astype(np.float32)


def test_an_axis_without_a_rule_is_an_error() -> None:
    with pytest.raises(KeyError, match="headz"):
        partition_spec(("layers", "headz"))


def test_two_dimensions_cannot_share_a_mesh_axis() -> None:
    with pytest.raises(ValueError, match=r"axes \('vocab', 'experts'\) use a mesh axis twice"):
        partition_spec(("vocab", "experts"))


def test_axes_are_placed_by_the_table_and_nameless_ones_stay_whole() -> None:
    assert partition_spec(("layers", "experts", None, "expert_mlp", "embed")) == PartitionSpec(
        None, MESH_AXIS, None, None, None
    )
    assert set(RULES.values()) == {None, MESH_AXIS}
    sharding = sharding_for(("vocab", "embed"), make_mesh(4))
    assert sharding.shard_shape((64, 6)) == (16, 6)


def test_the_mesh_takes_as_many_devices_as_asked_for_and_no_more() -> None:
    assert make_mesh(2).shape == {MESH_AXIS: 2}
    assert make_mesh().size == len(jax.devices()) == 8
    with pytest.raises(ValueError, match=r"9 devices were asked for and 8 exist \(cpu\)"):
        make_mesh(9)


def test_every_weight_of_the_model_has_a_place() -> None:
    for is_fp8 in (False, True):
        specs = abstract_weights(make_config(is_fp8=is_fp8), BF16)
        check_divisible(specs, make_mesh(8))
        for spec in specs.values():
            assert len(spec.axes) == len(spec.shape)


def test_a_mesh_that_does_not_divide_is_refused_by_array_and_size() -> None:
    specs = {
        "norm.weight": WeightSpec((7,), F32, ("embed",)),
        "experts.values": WeightSpec((3, 12, 5), F32, ("layers", "experts", None)),
    }
    check_divisible(specs, make_mesh(4))
    with pytest.raises(ValueError) as caught:
        check_divisible(specs, make_mesh(8))
    assert str(caught.value) == (
        "8 devices cannot share experts.values: its experts dimension is 12; "
        "use a number of devices that divides 12"
    )


def test_devices_are_numbered_and_gathered_in_order() -> None:
    def body() -> jax.Array:
        number = device_index().astype(jnp.float32)
        return all_gather(number[None], axis=0)[None]

    each = PartitionSpec(MESH_AXIS)
    gathered = jax.shard_map(body, mesh=make_mesh(4), in_specs=(), out_specs=each, check_vma=False)
    np.testing.assert_array_equal(jax.jit(gathered)(), np.tile(np.arange(4.0), (4, 1)))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sum_of_partials_has_the_same_bits_on_every_mesh(seed: int) -> None:
    partials = partials_of(seed)
    sums = [np.asarray(summing(BF16, n)(partials)) for n in (1, 2, 4, 8)]
    for other in sums[1:]:
        np.testing.assert_array_equal(bits(sums[0]), bits(other))


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_sum_of_partials_is_the_sum_of_what_was_rounded(
    dtype: np.dtype, num_devices: int
) -> None:
    partials = partials_of(2)
    total = np.asarray(summing(dtype, num_devices)(partials))
    assert total.dtype == dtype
    rounded = partials.astype(dtype).astype(np.float64)
    eps = float(jnp.finfo(dtype).eps)
    # Half a unit in the last place of the answer, and float32's own rounding of the terms.
    allowed = 0.501 * eps * np.abs(rounded.sum(0)) + 8 * 2**-24 * np.abs(rounded).sum(0)
    assert (np.abs(total.astype(np.float64) - rounded.sum(0)) <= allowed).all()


def test_each_partial_is_rounded_before_the_sum() -> None:
    partials = np.zeros((NUM_PARTIALS, 1, 1), np.float32)
    partials[:2, 0, 0] = 1 + 2**-9  # bfloat16 has 1 and 1 + 2**-7 here
    for num_devices in (1, 8):
        assert np.asarray(summing(BF16, num_devices)(partials)).item() == 2.0


def test_one_partial_a_device_travels_in_the_activations_dtype() -> None:
    shape = jax.ShapeDtypeStruct((NUM_PARTIALS, 16, 32), jnp.float32)
    for num_devices, wire in ((8, "bf16"), (4, "f32")):
        text = summing(BF16, num_devices).lower(shape).as_text()
        (reduction,) = text.split("stablehlo.all_reduce")[1:]
        assert f"tensor<16x32x{wire}>) -> tensor<16x32x{wire}>" in reduction
