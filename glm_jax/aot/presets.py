"""Published models by name, so that a plan needs no checkpoint.

Knows shapes only; a checkpoint's own config.json is read where there is one.
"""

from pathlib import Path
from typing import Any

from glm_jax.config import ConfigError, ModelConfig

_FP8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
_GLM_4_7: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "hidden_size": 5120,
    "num_hidden_layers": 92,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "first_k_dense_replace": 3,
    "n_routed_experts": 160,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1536,
    "max_position_embeddings": 202752,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "norm_topk_prob": True,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "dtype": "bfloat16",
}
# The published FP8 checkpoint is what is served, so the plain name means it.
PRESETS: dict[str, dict[str, Any]] = {
    "glm-4.7": _GLM_4_7 | {"quantization_config": _FP8},
    "glm-4.7-bf16": _GLM_4_7,
}


def find_config(name: str) -> ModelConfig:
    """The hyper-parameters of a preset, or of a checkpoint's directory.

    Raises:
      ConfigError: it is neither, or the directory's config.json is not supported.
    """
    if name in PRESETS:
        return ModelConfig.from_dict(PRESETS[name])
    if not Path(name).is_dir():
        raise ConfigError(
            f"{name} is neither a directory with a config.json nor one of the published shapes "
            f"{', '.join(PRESETS)}"
        )
    return ModelConfig.from_directory(name)
