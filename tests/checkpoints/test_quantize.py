"""Quantizing: values fit the format, the config that describes them is accepted, names are strict."""

import numpy as np
import pytest

from checkpoints.names import compare
from checkpoints.quantize import ignore_list, quantization_config, quantize, quantize_channels
from glm_jax.config import ModelConfig
from tests.checkpoints.samples import BF16, F32, FP8, config_json, make_config, make_tensors


def test_each_row_uses_the_whole_range_and_keeps_its_values() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    weight *= np.exp(np.random.default_rng(1).normal(size=(64, 1)) * 10).astype(np.float32)
    values, scale = quantize_channels(weight)
    assert (values.dtype, values.shape) == (FP8, weight.shape)
    assert (scale.dtype, scale.shape) == (F32, (64, 1))
    assert (np.abs(values.astype(np.float32)).max(axis=1) == 448).all()
    error = np.abs(values.astype(np.float32) * scale - weight)
    # Three bits of mantissa round by 1/16 at most; below 2^-6 the step is 2^-9.
    assert (error <= np.maximum(np.abs(weight) / 16, scale * 2**-10) * 1.001).all()


def test_rows_of_zeros_and_of_tiny_numbers_stay_finite() -> None:
    weight = np.array([[0, 0], [1e-44, -1e-44], [3e38, -3e38], [1, 0]], np.float32)
    values, scale = quantize_channels(weight)
    assert np.isfinite(values.astype(np.float32)).all()
    assert (scale > 0).all()
    real = values.astype(np.float32) * scale
    assert np.allclose(real[[0, 2, 3]], weight[[0, 2, 3]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    config = make_config(is_fp8=False)
    tensors = make_tensors(config)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 4] = bad
    with pytest.raises(ValueError, match=f"{name}: .* infinity or a NaN"):
        list(quantize(config, tensors.items()))


def test_a_plain_checkpoint_becomes_exactly_an_fp8_checkpoint() -> None:
    plain, fp8 = make_config(is_fp8=False), make_config()
    quantized = dict(quantize(plain, make_tensors(plain, plain=F32).items()))
    expected = make_tensors(fp8)
    assert compare(fp8, quantized) == ([], [])
    assert {n: (a.dtype, a.shape) for n, a in quantized.items()} == {
        n: (a.dtype, a.shape) for n, a in expected.items()
    }


def test_an_unknown_or_quantized_tensor_is_refused() -> None:
    config = make_config()
    for name in (
        "model.layers.7.input_layernorm.weight",
        "model.layers.0.mlp.up_proj.weight_scale",
    ):
        with pytest.raises(ValueError, match=f"{name} is not a tensor of an unquantized"):
            list(quantize(config, [(name, np.ones((2, 2), BF16))]))


def test_the_config_parser_takes_the_quantization_config() -> None:
    config = make_config(is_fp8=False)
    ignore = ignore_list(config)
    raw = config_json() | {"quantization_config": quantization_config(ignore)}
    assert ModelConfig.from_dict(raw).is_fp8


def test_the_ignore_list_is_the_published_one() -> None:
    ignore = ignore_list(make_config())
    for module in (
        "lm_head",
        "model.embed_tokens",
        "model.norm",
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.3.eh_proj",
        "model.layers.3.embed_tokens",
        "model.layers.3.shared_head.norm",
    ):
        assert module in ignore
    assert not [m for m in ignore if m.endswith(("_proj", ".head")) and not m.endswith("eh_proj")]
