"""quantization_config: the published FP8 scheme loads, any other is refused by key and value."""

import copy
from typing import Any

import pytest

from glm_jax.config import ConfigError, ModelConfig
from tests.glm_jax.tiny import QUANTIZATION, config_json, make_config


def refusal(quantization: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(config_json(quantization_config=quantization))
    return str(caught.value)


# How a deviation is made: (path into quantization_config, value), and what the refusal says.
DEVIATIONS: list[tuple[tuple[str, ...], Any, str]] = [
    (("quant_method",), "fp8", "quant_method = 'fp8' is not supported"),
    (("format",), "pack-quantized", "format = 'pack-quantized' is not supported"),
    (("quantization_status",), "frozen", "quantization_status = 'frozen' is not supported"),
    (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme = {'num_bits': 8} is not supported"),
    (("sparsity_config",), {"format": "dense"}, "sparsity_config = {'format': 'dense'}"),
    (("transform_config",), {"R1": {}}, "transform_config = {'R1': {}}"),
    (("ignore",), ["model.layers.3.mlp.experts.0.up_proj"], "'model.layers.3.mlp.experts.0.up_proj'"),
    (("ignore",), ["lm_head", "model.layers.1.self_attn.q_proj"], "'model.layers.1.self_attn.q_proj'"),
    (("ignore",), 5, "5"),
    (("rotation",), "hadamard", "unknown key quantization_config.rotation = 'hadamard'"),
    (("config_groups", "group_0", "format"), "int-quantized", "format = 'int-quantized'"),
    (("config_groups", "group_0", "weights", "bias_bits"), 4, "unknown key"),
    (("config_groups",), {}, "exactly one group, got {}"),
    (("config_groups",), ["Linear"], "exactly one group, got ['Linear']"),
    (("config_groups", "group_1"), {}, "exactly one group"),
    (("config_groups", "group_0"), None, "group_0 = None must be an object"),
    (("config_groups", "group_0", "targets"), ["MoE"], "group_0.targets = ['MoE'] is not supported"),
    (("config_groups", "group_0", "output_activations"), {"num_bits": 8}, "output_activations = {'num"),
    (("config_groups", "group_0", "weights"), None, "group_0.weights = None must be an object"),
    (("config_groups", "group_0", "input_activations"), None, "input_activations = None must be"),
]  # fmt: skip
for _part, _strategy, _other, _is_dynamic in (
    ("weights", "block", "tensor", True),
    ("input_activations", "tensor", "group", False),
):
    _values = {
        "num_bits": [4],
        "type": ["int"],
        "symmetric": [False],
        "strategy": [_strategy, _other],
        "dynamic": [_is_dynamic],
        "group_size": [128],
        "block_structure": [[128, 128]],
        "actorder": ["group"],
    }
    DEVIATIONS += [
        (("config_groups", "group_0", _part, key), value, f"{_part}.{key} = {value!r} is not supported")
        for key, values in _values.items()
        for value in values
    ]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "said"), DEVIATIONS)
def test_any_other_quantization_is_refused_by_key_and_value(
    path: tuple[str, ...], value: Any, said: str
) -> None:
    quantization = copy.deepcopy(QUANTIZATION)
    place = quantization
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    message = refusal(quantization)
    assert "quantization_config" in message and said in message


@pytest.mark.parametrize("key", ["num_bits", "type", "symmetric", "strategy", "dynamic"])
@pytest.mark.parametrize("part", ["weights", "input_activations"])
def test_quantization_takes_nothing_for_granted(part: str, key: str) -> None:
    quantization = copy.deepcopy(QUANTIZATION)
    del quantization["config_groups"]["group_0"][part][key]
    message = refusal(quantization)
    assert message == f"key quantization_config.config_groups.group_0.{part}.{key} is missing"


def test_quantization_without_activations_is_refused() -> None:
    quantization = copy.deepcopy(QUANTIZATION)
    del quantization["config_groups"]["group_0"]["input_activations"]
    assert "input_activations" in refusal(quantization)
    assert "= 'fp8' must be an object" in refusal("fp8")


def test_quantization_spelled_out_as_published_is_accepted() -> None:
    quantization = copy.deepcopy(QUANTIZATION) | {
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
        "ignore": [
            "lm_head",
            "model.embed_tokens",
            "model.norm",
            "model.layers.0.input_layernorm",
            "model.layers.0.self_attn.q_norm",
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.3.mlp.gate",
            "model.layers.3.mlp.gate.e_score_correction_bias",
            "model.layers.92.eh_proj",
            "model.layers.92.shared_head.head",
        ],
    }
    details = {"group_size": None, "actorder": None, "block_structure": None, "observer": "minmax"}
    for part in ("weights", "input_activations"):
        quantization["config_groups"]["group_0"][part] |= details
    quantization["config_groups"]["group_0"]["output_activations"] = None
    assert make_config(quantization_config=quantization).is_fp8
    assert not make_config(quantization_config=None).is_fp8
