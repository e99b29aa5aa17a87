"""The roofline against sums done by hand from the published shape."""

import ml_dtypes
import numpy as np
import pytest

from glm_jax.aot.presets import PRESETS, find_config
from glm_jax.aot.roofline import Assumptions, Roofline, busiest_device_experts
from glm_jax.config import ConfigError, ModelConfig
from glm_jax.targets.target import parse_target

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
CONFIG = find_config("glm-4.7")


def roofline(target: str = "b200x8", kv_dtype: np.dtype = FP8, **assumed: float) -> Roofline:
    parsed = parse_target(target)
    assert parsed.peaks is not None
    assumptions = Assumptions(**assumed)  # type: ignore[arg-type]
    return Roofline(CONFIG, BF16, kv_dtype, parsed.peaks, parsed.num_devices, assumptions)


def test_every_preset_is_a_config_we_run() -> None:
    for name in PRESETS:
        assert isinstance(find_config(name), ModelConfig)
    assert find_config("glm-4.7").is_fp8 and not find_config("glm-4.7-bf16").is_fp8


def test_a_model_that_is_neither_preset_nor_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a directory .* glm-4.7"):
        find_config("glm-9")


def test_the_busiest_device_touches_more_experts_than_the_mean() -> None:
    assert busiest_device_experts(CONFIG, 1, 1) == pytest.approx(8)
    assert busiest_device_experts(CONFIG, 10**6, 8) == pytest.approx(20)
    # Eight binomials over 20 experts at 5 %: their largest, drawn by hand.
    drawn = np.random.default_rng(0).binomial(20, 0.05, (100_000, 8)).max(1).mean()
    assert busiest_device_experts(CONFIG, 1, 8) == pytest.approx(drawn, rel=0.01)


def test_decode_reads_each_weight_once_and_each_key_once() -> None:
    model = roofline(hbm_share=1.0)
    at_peak = model.decode(256, 2048).hbm
    # Per layer: attention 136.3 MB, 160 experts of 23.6 MB and one shared; a bf16 head; a router.
    layers = 92 * 136.3e6 + 89 * (161 * 23.6e6) + 3 * 3 * 5120 * 12288
    replicated = 89 * 1.64e6
    weights = layers / 8 + 151552 * 5120 * 2 / 8 + replicated
    keys = 256 * 2048 * 92 * 2 * 8 * 128 / 8
    assert at_peak == pytest.approx((weights + keys) / 8.0e12, rel=0.01)
    longer = model.decode(256, 4096).hbm - at_peak
    assert longer == pytest.approx(keys / 8.0e12, rel=1e-6)


def test_a_cache_of_twice_the_bytes_takes_twice_as_long_to_read() -> None:
    times = [roofline(kv_dtype=kind) for kind in (FP8, BF16)]
    fp8, bf16 = (model.decode(64, 8192).hbm - model.decode(64, 1).hbm for model in times)
    assert bf16 == pytest.approx(2 * fp8, rel=1e-3)


def test_a_step_sums_twice_a_layer_and_starts_its_kernels() -> None:
    step = roofline(kernels_per_layer=20, launch_seconds=2e-6).decode(64, 2048)
    assert step.launches == pytest.approx(92 * 20 * 2e-6)
    assert step.all_reduce == pytest.approx(184 * 12e-6, rel=0.01)
    assert step.total == step.hbm + step.compute + step.all_reduce + step.launches
    assert step.limit == "HBM"


def test_one_device_sums_nothing() -> None:
    assert roofline("b200x1").decode(1, 128).all_reduce == 0.0


def test_one_sequence_waits_for_sums_and_a_crowd_for_memory() -> None:
    assert roofline().decode(1, 2048).limit == "all-reduce"
    assert roofline().decode(256, 8192).limit == "HBM"


def test_the_numbers_are_those_of_the_design() -> None:
    # Per token 64.2 GFLOP and attention; the table of the design for B = 64 and 256 at 2k.
    assert 64 / roofline().decode(64, 2048).total == pytest.approx(6400, rel=0.03)
    assert 256 / roofline().decode(256, 2048).total == pytest.approx(19746, rel=0.03)
    assert 64 / roofline("h200x8").decode(64, 2048).total == pytest.approx(4450, rel=0.03)


def test_prefill_is_bound_by_arithmetic_and_long_prompts_by_attention() -> None:
    model = roofline()
    short, long = model.prefill(8192, 2048), model.prefill(8192, 32768)
    # 8192 tokens, 64.2 GFLOP each, at 45 % of 8 x 4.5 PFLOP/s, attention of 4.6 GFLOP at half bf16.
    linear = 8192 * 64.2e9 / (0.45 * 8 * 4.5e15)
    attention = 8192 * 4.6e9 / (0.5 * 8 * 2.25e15)
    assert short.hbm + short.compute == pytest.approx(linear + attention, rel=0.02)
    assert long.compute - short.compute == pytest.approx(15 * attention, rel=0.02)
    assert long.limit == "compute"
