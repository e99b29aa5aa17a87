"""The measurement of kernels: rehearsed on a CPU in every run, made on a GPU where perf is asked for."""

import jax
import pytest

from glm_jax.pallas.chip import Chip
from tests.perf import kernels
from tests.perf.card import Card
from tests.perf.sizes import GLM_4_7

_CARD = Card("no card", Chip("sm90", 4), 1.0, {"fp8": 1.0, "bf16": 1.0})


@pytest.mark.slow
def test_every_case_is_right_at_tiny_sizes() -> None:
    assert not kernels.rehearse()


def test_a_result_is_a_row_that_names_the_best_alternative() -> None:
    result = {
        "kernel": "norm",
        "shape": "T=64",
        "error": 1e-4,
        "is_right": True,
        "us": 4.0,
        "us_graph": 4.5,
        "floor_us": 1.0,
        "small_floor_us": 2.5,
        "alternatives": {"XLA": {"us": 9.0}},
        "peers": {"torch": {"us": 6.0, "us_graph": 6.4}},
    }
    cells = "1.0e-04 | 4.0 (4.5) | 25% | 62% | 6.0 (6.4) (torch) |"
    assert kernels.row(result) == f"| norm | T=64 | {cells}"
    assert "**wrong**" in kernels.row({**result, "is_right": False})
    assert "no such shape" in kernels.row({**result, "failed": "no such shape"})


def test_a_part_is_its_kernels_and_those_of_peers() -> None:
    case = next(kernels.cases(GLM_4_7, _CARD.chip, False, "router … norm"))
    names = ("router_picks_dispatch", "grouped_gate_up", "grouped_down", "all_reduce_add_norm")
    result = {"us": 10.0, "error": 0.0, "is_right": True, "alternatives": {},
              "kernels_us": dict(zip(names, (1.0, 2.0, 3.0, 4.0), strict=True))}  # fmt: skip
    theirs = (
        "router_products",
        "router_picks",
        "align",
        "gate_up",
        "quantize",
        "down",
        "combine_norm",
    )
    peer = {"us": 28.0, "kernels_us": dict(zip(theirs, range(1, 8), strict=True))}
    whole, *parts = kernels.of_case(case, _CARD, result, {"Triton": peer})
    assert [part["us"] for part in parts] == [1.0, 5.0, 4.0]
    assert [part["peers"]["Triton"]["us"] for part in parts] == [6, 15, 7]
    assert sum(part["bytes"] for part in parts) == whole["bytes"]


@pytest.mark.perf
@pytest.mark.gpu
def test_every_case_is_right_and_timed_on_this_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    assert not [
        result
        for result in kernels.run(only="", seconds=480)["results"]
        if not result.get("is_right")
    ]
