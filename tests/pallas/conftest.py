"""What tests of kernels may ask for.

Knows no kernel.
"""

import functools
import inspect

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@pytest.fixture(autouse=True)
def races_are_errors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels fail where two accesses of one memory have no order that is enforced.

    The order is that of warpgroups, copies and tensor cores by barriers; threads of a warpgroup are one.
    jax 0.11.2 can only warn of races, so there they are let pass, as in tests marked order_misread.
    """
    if request.node.get_closest_marker("order_misread"):
        return
    if "on_race" in inspect.signature(plgpu.InterpretGPUParams).parameters:
        params = functools.partial(plgpu.InterpretGPUParams, detect_races=True, on_race="raise")
        monkeypatch.setattr(plgpu, "InterpretGPUParams", params)
