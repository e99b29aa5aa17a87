"""What a layer's kernels take, from steps of few and of many layers."""

import pytest

from tests.perf.layer_floors import Floor, compare, purpose, text


def test_a_layer_is_the_difference_of_few_and_many() -> None:
    one = {
        "grouped_gate_up": (1.0, 80.0),
        "router_picks_dispatch": (1.0, 8.0),
        "argmax": (1.0, 30.0),
    }
    five = {
        "grouped_gate_up": (5.0, 404.0),
        "router_picks_dispatch": (5.0, 44.0),
        "argmax": (1.0, 30.1),
    }
    overlapping, apart = {1: 190.0, 5: 550.0}, {1: 200.0, 5: 620.0}
    floors = {"gate_up": Floor(3e8, 70.0)}
    found = compare(overlapping, apart, {1: one, 5: five}, 1, 5, floors)
    assert (found["layer_us"], found["alone_us"]) == (90.0, 105.0)
    assert found["kernels"] == [
        {"kernel": "gate_up", "runs": 1.0, "us": 81.0, "floor_us": 70.0, "bytes": 300_000_000},
        {"kernel": "picks, sorting", "runs": 1.0, "us": 9.0, "floor_us": 0.0, "bytes": 0},
    ]
    assert (found["floor_us"], found["kernels_us"], found["launches"]) == (70.0, 90.0, 2.0)
    assert found["gaps_us"] == pytest.approx(15.0)
    assert "a layer: 90.0 us; one by one 105.0, kernels 90.0, gaps 15.0" in text(found)


def test_fused_kernels_have_a_purpose_of_their_own() -> None:
    assert purpose("grouped_mlp") == "gate_up, down"
    assert purpose("decode_attention") == "attention"
    assert purpose("all_reduce_add_norm") == "norms, sums"
    assert purpose("loop_add_fusion") == "others of XLA"
