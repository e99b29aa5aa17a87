"""A step's profile: kernels by what they are for, and the time in which none ran."""

import pytest

from tests.perf.step_profile import Kernel, group_of, summary


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("router_picks_dispatch", "router, sorting"),
        ("grouped_gate_up", "experts"),
        ("decode_attention_combine", "attention"),
        ("kv_write", "attention"),
        ("dense_matmul", "projections"),
        ("all_reduce_add_norm", "norms, sums"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "norms, sums"),
        ("gemm_fusion_dot_1", "lm_head"),
        ("nvjet_sm90_tst_128x64_64x9_1x2_h_bz_TNT", "lm_head"),
        ("input_reduce_fusion_21", "sampler, others of XLA"),
        ("MemcpyD2D", "copies"),
    ],
)
def test_a_kernel_is_grouped_by_its_name(name: str, group: str) -> None:
    assert group_of(name) == group


def test_gaps_are_the_time_in_which_no_kernel_ran() -> None:
    kernels = [
        Kernel("dense_matmul_mosaic_gpu_kernel", 0, 10_000),
        Kernel("router_picks_mosaic_gpu_kernel", 4_000, 8_000),  # beside the first
        Kernel("kv_write_mosaic_gpu_kernel", 6_000, 14_000),  # past its end
        Kernel("dense_matmul_mosaic_gpu_kernel", 15_000, 25_000),
        Kernel("loop_add_fusion", 25_000, 26_000),
    ]
    found = summary(kernels, 2)
    assert (found["us"], found["gaps_us"]) == (13.0, 0.5)
    assert found["groups_us"] == {
        "attention": 2.0,
        "projections": 10.0,
        "router, sorting": 0.0,
        "sampler, others of XLA": 0.5,
    }
    assert found["kernels"][0] == ["dense_matmul", 1.0, 10.0]
