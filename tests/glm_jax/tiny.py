"""Tiny models for the tests of the device rooms: their config, random weights, a mesh to run on.

Knows no checkpoints: weights are drawn where they live, by their dotted paths.
"""

from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec

from glm_jax.config import ModelConfig
from glm_jax.model import abstract_model, abstract_weights, bind
from glm_jax.sharding import WeightSpec, make_mesh, partition_spec, sharding_for
from glm_jax.steps import COMPILER_OPTIONS

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

_SCHEME = {"num_bits": 8, "type": "float", "symmetric": True}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _SCHEME | {"strategy": "channel", "dynamic": False},
            "input_activations": _SCHEME | {"strategy": "token", "dynamic": True},
        }
    },
}


def config_json(*, is_fp8: bool = False, **overrides: Any) -> dict[str, Any]:
    """config.json of a model that eight devices can share: 16 query heads, 8 kv heads, 16 experts."""
    raw = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "max_position_embeddings": 4096,
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
        "eos_token_id": [61, 62],
        "pad_token_id": 60,
        "dtype": "bfloat16",
    }
    return raw | ({"quantization_config": QUANTIZATION} if is_fp8 else {}) | overrides


def make_config(*, is_fp8: bool = False, **overrides: Any) -> ModelConfig:
    """The parsed config of a tiny model."""
    return ModelConfig.from_dict(config_json(is_fp8=is_fp8, **overrides))


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP8 values and float32 scales of the rows (last dimension) of a weight."""
    scale = np.abs(weight).max(-1, keepdims=True).astype(np.float32) / np.float32(448)
    return np.clip(weight / scale, -448, 448).astype(FP8), scale[..., 0]


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values near those of a trained model; nothing at 0 or 1, where a lost term would not show."""
    if path.endswith("e_score_correction_bias"):
        return rng.uniform(0, 0.2, shape)
    if path.endswith(".bias"):
        return 0.1 * rng.normal(size=shape)
    if "norm" in path:
        return 1 + 0.2 * rng.normal(size=shape)
    if path.startswith("embed_tokens"):
        return rng.normal(size=shape)
    return rng.normal(size=shape) * 0.7 / np.sqrt(shape[-1])


def make_arrays(specs: dict[str, WeightSpec], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by dotted path, the same whatever the mesh; FP8 ones with fitting scales."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for path, spec in sorted(specs.items()):
        if path.endswith(".scale"):
            continue
        drawn = _draw(rng, path, spec.shape)
        if spec.dtype == FP8:
            arrays[path], scale = quantize(drawn)
            arrays[path.removesuffix("values") + "scale"] = scale
        else:
            arrays[path] = drawn.astype(spec.dtype)
    return arrays


def on_mesh(
    config: ModelConfig, dtype: np.dtype, num_devices: int, body: Callable[..., Any], seed: int = 0
) -> Callable[..., Any]:
    """body(model, *arrays), compiled as the steps are: the model shared out, the rest on all devices.

    Returns a function of the arrays; it gives NumPy arrays back.
    """
    mesh, replicated = make_mesh(num_devices), PartitionSpec()
    abstract, specs = abstract_model(config, dtype), abstract_weights(config, dtype)
    weights = {
        path: jax.device_put(array, sharding_for(specs[path].axes, mesh))
        for path, array in make_arrays(specs, seed).items()
    }
    weight_specs = {path: partition_spec(spec.axes) for path, spec in specs.items()}

    def run(weights: dict[str, jax.Array], arrays: tuple[jax.Array, ...]) -> Any:
        return body(bind(abstract, weights), *arrays)

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(weight_specs, replicated), out_specs=replicated, check_vma=False
    )
    jitted = jax.jit(sharded, compiler_options=COMPILER_OPTIONS)
    return lambda *arrays: jax.tree.map(np.asarray, jitted(weights, arrays))


def compiled(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """function with its keywords bound, compiled as the steps are; it gives NumPy arrays back."""
    jitted = jax.jit(lambda *arrays: function(*arrays, **static), compiler_options=COMPILER_OPTIONS)
    return lambda *arrays: jax.tree.map(np.asarray, jitted(*arrays))


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bit patterns: equal only where -0 is -0 and a NaN the same NaN."""
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


def wide(array: Any) -> np.ndarray:
    """The array in float64, for an oracle."""
    return np.asarray(array).astype(np.float32).astype(np.float64)
