"""config.json: the published ones load, and whatever would have to be guessed at is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm_jax.config import ConfigError, ModelConfig
from tests.glm_jax.tiny import QUANTIZATION, config_json, make_config

# As the published files spell it: rope at the top level, and GLM-4.7 with the new key `dtype`.
GLM_4_7: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
_OLD_DTYPE = {"dtype": None, "torch_dtype": "bfloat16"}
FAMILY = {
    "GLM-4.7": GLM_4_7,
    "GLM-4.6": GLM_4_7 | _OLD_DTYPE,
    "GLM-4.5": GLM_4_7 | _OLD_DTYPE | {"max_position_embeddings": 131072},
    "GLM-4.5-Air": GLM_4_7
    | _OLD_DTYPE
    | {
        "first_k_dense_replace": 1,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_hidden_layers": 46,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
}
OPTIONAL = {"attention_dropout", "scoring_func", "topk_method", "pad_token_id", "rope_scaling"}
SIZES = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    "moe_intermediate_size", "max_position_embeddings",
]  # fmt: skip


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_every_published_glm4_moe_config_loads(name: str, is_fp8: bool) -> None:
    raw = FAMILY[name] | ({"quantization_config": QUANTIZATION} if is_fp8 else {})
    config = ModelConfig.from_dict(raw)
    assert (config.dtype, config.is_fp8) == ("bfloat16", is_fp8)
    assert config.eos_token_id == (151329, 151336, 151338)
    others = set(config.__slots__) - {"dtype", "is_fp8", "eos_token_id"}
    assert {key: getattr(config, key) for key in others} == {key: raw[key] for key in others}


def test_derived_sizes_of_glm_4_7() -> None:
    config = ModelConfig.from_dict(GLM_4_7)
    assert config.rotary_dim == 64
    assert config.num_query_groups == 12
    assert config.num_moe_layers == 89
    assert config.shared_width == 1536


def test_flash_is_refused_with_the_reason() -> None:
    raw = {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"}
    for keys in (raw, without(raw, "architectures"), without(raw, "model_type")):
        message = refusal(GLM_4_7 | {"architectures": None, "model_type": None} | keys)
        assert "GLM-4.7-Flash" in message and "multi-head latent attention" in message


@pytest.mark.parametrize("key", sorted(config_json().keys() - OPTIONAL))
def test_a_missing_key_is_named(key: str) -> None:
    assert f"key {key}" in refusal(without(config_json(), key))
    assert "missing" in refusal(without(config_json(), key))


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_keys_without_a_say_in_the_mathematics_may_be_missing(key: str) -> None:
    ModelConfig.from_dict(without(config_json(), key))


def test_an_unknown_key_is_named_with_its_value() -> None:
    assert "sliding_window = 4096" in refusal(config_json(sliding_window=4096))


def test_keys_every_transformers_file_carries_are_ignored() -> None:
    extra = {"bos_token_id": None, "return_dict": True, "id2label": {}, "use_cache": False}
    assert ModelConfig.from_dict(config_json(**extra)) == make_config()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", "Glm4MoeForCausalLM"),
        ("architectures", 5),
        ("model_type", "llama"),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("attention_dropout", 0.1),
        ("n_group", 2),
        ("topk_group", 4),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("dtype", "float8_e4m3fn"),
    ],
)
def test_a_value_the_code_does_not_do_is_named(key: str, value: Any) -> None:
    message = refusal(config_json(**{key: value}))
    assert f"{key} = {value!r} is not supported, only " in message


def test_fixed_values_may_be_spelled_out() -> None:
    spelled = config_json(scoring_func="sigmoid", topk_method="noaux_tc", attention_dropout=0)
    assert ModelConfig.from_dict(spelled) == make_config()


@pytest.mark.parametrize("value", ["64", 64.0, True, None, [64], -64, 0, float("nan")])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_must_be_a_whole_number_above_zero(key: str, value: Any) -> None:
    assert f"{key} = {value!r} must be a finite int" in refusal(config_json(**{key: value}))


@pytest.mark.parametrize("value", ["1.0", True, None, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key", ["routed_scaling_factor", "rms_norm_eps", "rope_theta", "partial_rotary_factor"]
)
def test_a_factor_must_be_a_finite_number(key: str, value: Any) -> None:
    assert f"{key} = {value!r} must be a finite float" in refusal(config_json(**{key: value}))


def test_a_whole_number_serves_as_a_factor() -> None:
    config = make_config(routed_scaling_factor=1, rope_theta=10000)
    assert (config.routed_scaling_factor, config.rope_theta) == (1.0, 10000.0)
    assert isinstance(config.rope_theta, float)


@pytest.mark.parametrize("value", [0, 1, "true", None])
@pytest.mark.parametrize("key", ["attention_bias", "use_qk_norm", "norm_topk_prob"])
def test_a_switch_must_be_true_or_false(key: str, value: Any) -> None:
    assert f"{key} = {value!r} must be true or false" in refusal(config_json(**{key: value}))


@pytest.mark.parametrize("value", [None, "</s>", True, [], [1, "2"], [1, False], -1, 1.0])
def test_end_tokens_must_be_token_ids(value: Any) -> None:
    assert f"eos_token_id = {value!r}" in refusal(config_json(eos_token_id=value))


def test_one_end_token_needs_no_list() -> None:
    assert make_config(eos_token_id=7).eos_token_id == (7,)


def test_pad_token_may_be_null_or_zero_but_not_text() -> None:
    assert make_config(pad_token_id=None).pad_token_id is None
    assert make_config(pad_token_id=0).pad_token_id == 0
    assert "pad_token_id = '<pad>'" in refusal(config_json(pad_token_id="<pad>"))


def rope_parameters(**overrides: Any) -> dict[str, Any]:
    """config.json with rotary in transformers 5's dialect."""
    rope = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25} | overrides
    raw = without(config_json(head_dim=16), "rope_theta", "partial_rotary_factor")
    return raw | {"rope_parameters": rope}


def test_rotary_is_read_from_either_dialect() -> None:
    old = make_config(head_dim=16, rope_theta=5e5, partial_rotary_factor=0.25)
    assert ModelConfig.from_dict(rope_parameters()) == old
    assert (old.rope_theta, old.rotary_dim) == (5e5, 4)
    assert ModelConfig.from_dict(rope_parameters() | {"rope_theta": 5e5}) == old
    mixed = rope_parameters()
    mixed["partial_rotary_factor"] = mixed["rope_parameters"].pop("partial_rotary_factor")
    assert ModelConfig.from_dict(mixed) == old
    assert ModelConfig.from_dict(config_json(rope_parameters=None)) == make_config()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (rope_parameters(rope_type="yarn"), "rope_parameters.rope_type = 'yarn'"),
        (rope_parameters(factor=4.0), "unknown key rope_parameters.factor = 4.0"),
        (
            rope_parameters() | {"rope_theta": 1e6},
            "rope_theta = 1000000.0 and rope_parameters.rope",
        ),
        (rope_parameters() | {"rope_parameters": "default"}, "rope_parameters = 'default'"),
        (rope_parameters() | {"rope_parameters": {}}, "key rope_theta is missing"),
        (rope_parameters(partial_rotary_factor=0.1), "even number of dimensions"),
        (rope_parameters(partial_rotary_factor=1.5), "even number of dimensions"),
    ],
)
def test_rotary_that_would_be_guessed_at_is_refused(raw: dict[str, Any], said: str) -> None:
    assert said in refusal(raw)


def test_dtype_is_read_from_either_dialect_and_may_not_disagree() -> None:
    raw = without(config_json(), "dtype")
    assert ModelConfig.from_dict(raw | {"torch_dtype": "float32"}).dtype == "float32"
    both = {"dtype": "float16", "torch_dtype": "float16"}
    assert ModelConfig.from_dict(raw | both).dtype == "float16"
    message = refusal(raw | {"dtype": "bfloat16", "torch_dtype": "float32"})
    assert "dtype = 'bfloat16' and torch_dtype = 'float32' disagree" in message


def test_mtp_layers_are_read_from_either_spelling_and_may_not_disagree() -> None:
    raw = without(config_json(), "num_nextn_predict_layers")
    assert ModelConfig.from_dict(raw | {"num_mtp_layers": 0}).num_nextn_predict_layers == 0
    assert ModelConfig.from_dict(raw | {"num_mtp_layers": 1}).num_nextn_predict_layers == 1
    message = refusal(raw | {"num_nextn_predict_layers": 1, "num_mtp_layers": 0})
    assert "num_nextn_predict_layers = 1 and num_mtp_layers = 0 disagree" in message
    assert "only 0 and 1 are supported" in refusal(raw | {"num_mtp_layers": 2})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"num_attention_heads": 12}, "num_attention_heads = 12 is not a multiple"),
        ({"intermediate_size": 60}, "intermediate_size = 60 is not a multiple"),
        ({"moe_intermediate_size": 12}, "shared experts' width = 12 is not a multiple"),
        ({"n_routed_experts": 12}, "n_routed_experts = 12 is not a multiple"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace = 2 must be less than"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok = 17 must be between 1 and"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named(overrides: dict[str, Any], said: str) -> None:
    assert said in refusal(config_json(**overrides))


def test_a_config_saved_by_transformers_loads_once_it_is_complete(tmp_path: Path) -> None:
    from transformers import Glm4MoeConfig

    Glm4MoeConfig(use_qk_norm=True, routed_scaling_factor=2.5).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    with pytest.raises(ConfigError, match="key architectures is missing"):
        ModelConfig.from_directory(tmp_path)
    completion = {
        "architectures": ["Glm4MoeForCausalLM"],
        "dtype": "bfloat16",
        "head_dim": 128,
        "eos_token_id": [151329, 151336, 151338],
    }
    path.write_text(json.dumps(saved | completion))
    config = ModelConfig.from_directory(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 46)
    assert (config.rope_theta, config.rotary_dim) == (10000.0, 64)
    assert (config.use_qk_norm, config.routed_scaling_factor) == (True, 2.5)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="does not exist: give the directory") as caught:
        ModelConfig.from_directory(tmp_path)
    assert str(path) in str(caught.value)
    for content, said in ((b'{"a": ', "not valid JSON"), (b"\xff", "not valid JSON")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=said) as caught:
            ModelConfig.from_directory(tmp_path)
        assert str(path) in str(caught.value)


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_json(n_group=8)))
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_directory(tmp_path)
    assert str(caught.value).startswith(f"{path}: n_group = 8")
    path.write_text("[]")
    with pytest.raises(ConfigError, match="the top level must be an object, got list"):
        ModelConfig.from_directory(tmp_path)
