"""Where kernels wait for the one ahead of them, as they are traced; test_compile reads the PTX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm_jax.pallas import launch_order

X = np.arange(128, dtype=np.float32)
ROW = jax.ShapeDtypeStruct(X.shape, jnp.float32)


def double(x: jax.Ref, out: jax.Ref) -> None:
    out[...] = x[...] * 2.0


def double_late(x: jax.Ref, out: jax.Ref) -> None:
    launch_order.wait(interpret=False)
    out[...] = x[...] * 2.0


@pytest.mark.parametrize(("body", "waits"), [(double, True), (double_late, False)])
def test_a_kernel_waits_once_then_lets_the_next_begin(
    body: Callable[..., None], waits: bool
) -> None:
    doubled = launch_order.kernel(body, waits=waits, out_type=ROW, grid=(2,), grid_names=("cta",))
    with launch_order.overlapping():
        traced = str(jax.make_jaxpr(doubled)(X))
    before, _, after = traced.partition("griddepcontrol_wait")
    assert "griddepcontrol" not in before and "mul" not in before
    assert after.count("griddepcontrol_launch_dependents") == 1
    assert after.count("griddepcontrol_wait") == 0
    assert after.index("griddepcontrol") < after.index("mul")


def test_who_is_followed_by_others_kernels_lets_none_begin() -> None:
    def traced() -> str:
        doubled = launch_order.kernel(double, out_type=ROW, grid=(2,), grid_names=("cta",))
        return str(jax.make_jaxpr(doubled)(X))

    assert "launch_dependents" not in traced()
    with launch_order.overlapping():
        assert "launch_dependents" in traced()
        with launch_order.overlapping(False):
            assert "launch_dependents" not in traced()
        assert "launch_dependents" in traced()


def test_the_interpreter_knows_no_waiting() -> None:
    interpret = plgpu.InterpretGPUParams()
    doubled = launch_order.kernel(double, interpret=interpret, out_type=ROW)
    np.testing.assert_array_equal(doubled(X), 2 * X)


def test_a_kernel_keeps_the_name_of_its_body() -> None:
    doubled = launch_order.kernel(double, out_type=ROW, grid=(2,), grid_names=("cta",))
    assert "double" in str(jax.make_jaxpr(doubled)(X))
