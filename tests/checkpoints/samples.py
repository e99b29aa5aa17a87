"""Small random checkpoints for the tests: their tensors, and the weights they stand for.

Written without the code under test: names and places are spelled out once more, as plain NumPy.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.config import ModelConfig

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
TAGS = {FP8: "F8_E4M3", BF16: "BF16", F32: "F32", np.dtype(np.float16): "F16"}

Tensors = dict[str, np.ndarray]


def config_json(**overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model whose kv heads, experts and widths divide by 8."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 4,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "max_position_embeddings": 128,
        "num_nextn_predict_layers": 1,
    }
    rest = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
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
    return sizes | rest | overrides


def make_config(*, is_fp8: bool = True, **overrides: Any) -> ModelConfig:
    """The parsed config of a tiny model."""
    return ModelConfig.from_dict(raw_config(is_fp8=is_fp8, **overrides))


def raw_config(*, is_fp8: bool = True, **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model, with the published quantization_config if it is FP8."""
    raw = config_json(**overrides)
    if is_fp8:
        scheme = {"num_bits": 8, "type": "float", "symmetric": True}
        raw["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": scheme | {"strategy": "channel", "dynamic": False},
                    "input_activations": scheme | {"strategy": "token", "dynamic": True},
                }
            },
        }
    return raw


class _Maker:
    def __init__(self, config: ModelConfig, plain: np.dtype, scale: np.dtype, flat: bool) -> None:
        self.rng = np.random.default_rng(7)
        self.config, self.plain_dtype, self.scale_dtype, self.flat = config, plain, scale, flat
        self.tensors: Tensors = {}

    def plain(self, name: str, *shape: int, dtype: np.dtype | None = None) -> None:
        values = self.rng.normal(size=shape)
        self.tensors[name] = values.astype(np.float32).astype(dtype or self.plain_dtype)

    def linear(self, name: str, out: int, inputs: int, bias: bool = False) -> None:
        dtype = FP8 if self.config.is_fp8 else self.plain_dtype
        self.plain(f"{name}.weight", out, inputs, dtype=dtype)
        if self.config.is_fp8:
            shape = (out,) if self.flat else (out, 1)
            self.plain(f"{name}.weight_scale", *shape, dtype=self.scale_dtype)
        if bias:
            self.plain(f"{name}.bias", out)

    def mlp(self, name: str, width: int) -> None:
        for module in ("gate_proj", "up_proj"):
            self.linear(f"{name}.{module}", width, self.config.hidden_size)
        self.linear(f"{name}.down_proj", self.config.hidden_size, width)

    def layer(self, number: int) -> None:
        c, name = self.config, f"model.layers.{number}"
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.plain(f"{name}.input_layernorm.weight", D)
        for module, heads in (("q_proj", N), ("k_proj", K), ("v_proj", K)):
            self.linear(f"{name}.self_attn.{module}", heads * H, D, bias=c.attention_bias)
        self.linear(f"{name}.self_attn.o_proj", D, N * H)
        if c.use_qk_norm:
            self.plain(f"{name}.self_attn.q_norm.weight", H)
            self.plain(f"{name}.self_attn.k_norm.weight", H)
        self.plain(f"{name}.post_attention_layernorm.weight", D)
        if number < c.first_k_dense_replace:
            self.mlp(f"{name}.mlp", c.intermediate_size)
            return
        self.plain(f"{name}.mlp.gate.weight", c.n_routed_experts, D)
        self.plain(f"{name}.mlp.gate.e_score_correction_bias", c.n_routed_experts, dtype=F32)
        for expert in range(c.n_routed_experts):
            self.mlp(f"{name}.mlp.experts.{expert}", c.moe_intermediate_size)
        self.mlp(f"{name}.mlp.shared_experts", c.n_shared_experts * c.moe_intermediate_size)

    def mtp(self) -> None:
        c, name = self.config, f"model.layers.{self.config.num_hidden_layers}"
        self.layer(c.num_hidden_layers)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            self.plain(f"{name}.{norm}.weight", c.hidden_size)
        self.plain(f"{name}.eh_proj.weight", c.hidden_size, 2 * c.hidden_size)
        self.plain(f"{name}.embed_tokens.weight", c.vocab_size, c.hidden_size)
        self.linear(f"{name}.shared_head.head", c.vocab_size, c.hidden_size)


def make_tensors(
    config: ModelConfig,
    *,
    has_mtp: bool = True,
    plain: np.dtype = BF16,
    scale: np.dtype = F32,
    flat_scales: bool = False,
) -> Tensors:
    """Every tensor of a checkpoint, random, nothing symmetric or zero."""
    maker = _Maker(config, plain, scale, flat_scales)
    maker.plain("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    for number in range(config.num_hidden_layers):
        maker.layer(number)
    maker.plain("model.norm.weight", config.hidden_size)
    maker.plain("lm_head.weight", config.vocab_size, config.hidden_size)
    if has_mtp:
        maker.mtp()
    return maker.tensors


def assemble(config: ModelConfig, t: Tensors) -> Tensors:
    """The weights that the tensors stand for, by dotted path, in the tensors' own dtypes."""
    K, H, G = config.num_key_value_heads, config.head_dim, config.num_query_groups
    layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    dense, moe = layers[: config.first_k_dense_replace], layers[config.first_k_dense_replace :]
    experts = range(config.n_routed_experts)
    ends = [("weight", "values")] + [("weight_scale", "scale")] * config.is_fp8
    weights = {
        "embed_tokens.values": t["model.embed_tokens.weight"],
        "lm_head.values": t["lm_head.weight"],
        "norm.weight": t["model.norm.weight"],
    }

    def get(name: str) -> np.ndarray:
        array = t[name]
        return array.reshape(-1).astype(F32) if name.endswith("weight_scale") else array

    def qkv(layer: str, end: str) -> np.ndarray:
        q, k, v = (get(f"{layer}.self_attn.{p}_proj.{end}") for p in "qkv")
        rows = []
        for head in range(K):
            rows += [q[head * G * H : (head + 1) * G * H]]
            rows += [k[head * H : (head + 1) * H], v[head * H : (head + 1) * H]]
        return np.concatenate(rows).reshape(K, (G + 2) * H, *q.shape[1:])

    def gate_up(mlp: str, end: str) -> np.ndarray:
        return np.stack([get(f"{mlp}.gate_proj.{end}"), get(f"{mlp}.up_proj.{end}")])

    def stack(path: str, arrays: list[np.ndarray]) -> None:
        if arrays:
            weights[path] = np.stack(arrays)

    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn.q_norm", "self_attn.k_norm"] * config.use_qk_norm
    for norm in norms:
        stack(f"layers.{norm}.weight", [get(f"{n}.{norm}.weight") for n in layers])
    attention = "layers.self_attn"
    for end, leaf in ends + [("bias", "bias")] * config.attention_bias:
        stack(f"{attention}.qkv_proj.{leaf}", [qkv(n, end) for n in layers])
    for name in ("weight", "e_score_correction_bias"):
        stack(f"layers.moe.gate.{name}", [get(f"{n}.mlp.gate.{name}") for n in moe])
    for end, leaf in ends:
        stack(f"{attention}.o_proj.{leaf}", [get(f"{n}.self_attn.o_proj.{end}") for n in layers])
        for path, names in (("dense_mlp", dense), ("moe.shared_experts", moe)):
            names = [f"{n}.mlp" + ".shared_experts" * (path != "dense_mlp") for n in names]
            stack(f"layers.{path}.gate_up_proj.{leaf}", [gate_up(n, end) for n in names])
            stack(f"layers.{path}.down_proj.{leaf}", [get(f"{n}.down_proj.{end}") for n in names])
        path, of_layer = (
            "layers.moe.experts",
            [[f"{n}.mlp.experts.{e}" for e in experts] for n in moe],
        )
        ups = [np.stack([gate_up(e, end) for e in names]) for names in of_layer]
        downs = [np.stack([get(f"{e}.down_proj.{end}") for e in names]) for names in of_layer]
        stack(f"{path}.gate_up_proj.{leaf}", ups)
        stack(f"{path}.down_proj.{leaf}", downs)
    return weights


def header_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A safetensors header for these tensors, in this order."""
    header, end = {}, 0
    for name, array in tensors.items():
        offsets = [end, end + array.nbytes]
        header[name] = {
            "dtype": TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    return header


def write_file(path: Path, tensors: Mapping[str, np.ndarray], header: Any = None) -> None:
    """Writes a safetensors file, with a header of its own making if one is given (text or JSON)."""
    header = header_of(tensors) if header is None else header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_sharded(directory: Path, files: Mapping[str, Tensors], indexed: Tensors) -> None:
    """Writes files, and an index that places `indexed` where they are."""
    for file, tensors in files.items():
        write_file(directory / file, tensors)
    where = {name: file for file, tensors in files.items() for name in tensors if name in indexed}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
