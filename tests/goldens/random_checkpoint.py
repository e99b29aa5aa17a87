"""Random Glm4Moe checkpoints in the published layout, the same bytes on every machine.

Knows neither torch nor JAX, so the script that makes the goldens and the tests that read them
write the very same weights, and only the outputs need to be committed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from tests.goldens.cases import Case

Tensors = dict[str, NDArray[Any]]

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
_FP8_MAX = 448.0


def raw_bits(key: str, count: int) -> NDArray[np.uint64]:
    """`count` random 64-bit words that depend on nothing but the key.

    Only the generator's raw words are used: NumPy promises those never change, unlike the
    distributions made of them.
    """
    digest = hashlib.sha256(key.encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.asarray(words, np.uint64)


def normal(key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Nearly normal numbers, mean 0 and deviation 1: each the sum of a word's four 16-bit parts."""
    words = raw_bits(key, int(np.prod(shape)))
    parts = [(words >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    total = np.sum(parts, axis=0, dtype=np.int64)
    centered = (total - 2 * 0xFFFF) / (0x10000 / 3**0.5)
    return centered.astype(np.float32).reshape(shape)


def uniform(key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1)."""
    words = raw_bits(key, int(np.prod(shape))) >> np.uint64(40)
    return (words.astype(np.float64) / 2**24).astype(np.float32).reshape(shape)


def token_ids(case: Case, rows: int, length: int) -> NDArray[np.int32]:
    """Random prompts, int32[rows, length], without the eight highest ids (the special tokens)."""
    words = raw_bits(f"{case.name}/{case.seed}/ids", rows * length)
    return (words % np.uint64(case.vocab_size - 8)).astype(np.int32).reshape(rows, length)


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor before quantization, the MTP layer included."""
    D, V = case.hidden_size, case.vocab_size
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for layer in range(case.num_hidden_layers + 1):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}": shape for name, shape in _attention_shapes(case)}
        found |= {f"{prefix}.mlp.{name}": shape for name, shape in _mlp_shapes(case, layer)}
        found[f"{prefix}.input_layernorm.weight"] = (D,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (D,)
    mtp = f"model.layers.{case.mtp_layer}"
    found |= {f"{mtp}.{name}.weight": (D,) for name in ("enorm", "hnorm", "shared_head.norm")}
    found[f"{mtp}.eh_proj.weight"] = (D, 2 * D)
    if case.has_mtp_copies:
        found[f"{mtp}.embed_tokens.weight"] = (V, D)
        found[f"{mtp}.shared_head.head.weight"] = (V, D)
    return found


def _attention_shapes(case: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, H = case.hidden_size, case.head_dim
    query_width, kv_width = case.num_attention_heads * H, case.num_key_value_heads * H
    for name, width in (("q_proj", query_width), ("k_proj", kv_width), ("v_proj", kv_width)):
        yield f"self_attn.{name}.weight", (width, D)
        if case.attention_bias:
            yield f"self_attn.{name}.bias", (width,)
    yield "self_attn.o_proj.weight", (D, query_width)
    if case.use_qk_norm:
        yield "self_attn.q_norm.weight", (H,)
        yield "self_attn.k_norm.weight", (H,)


def _mlp_shapes(case: Case, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, E = case.hidden_size, case.n_routed_experts
    if layer < case.first_k_dense_replace:
        owners, width = [""], case.intermediate_size
    else:
        yield "gate.weight", (E, D)
        yield "gate.e_score_correction_bias", (E,)
        owners = [*(f"experts.{e}." for e in range(E)), "shared_experts."]
        width = case.moe_intermediate_size
    for owner in owners:
        yield f"{owner}gate_proj.weight", (width, D)
        yield f"{owner}up_proj.weight", (width, D)
        yield f"{owner}down_proj.weight", (D, width)


def _is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight") and "eh_proj" not in name or "shared_head.head" in name


def _draw(case: Case, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    key = f"{case.name}/{case.seed}/{name}"
    if name.endswith("e_score_correction_bias"):
        return np.float32(0.2) * uniform(key, shape)
    if "norm" in name:
        return 1 + np.float32(0.2) * normal(key, shape)
    if name.endswith(".bias"):
        return np.float32(0.1) * normal(key, shape)
    if "embed_tokens" in name:
        return normal(key, shape)
    return np.float32(0.7 / shape[-1] ** 0.5) * normal(key, shape)


def _quantize(weight: NDArray[np.float32], scale_dtype: DTypeLike) -> tuple[NDArray, NDArray]:
    scale = (np.abs(weight).max(axis=1, keepdims=True) / np.float32(_FP8_MAX)).astype(scale_dtype)
    values = np.clip(weight / scale.astype(np.float32), -_FP8_MAX, _FP8_MAX)
    return values.astype(ml_dtypes.float8_e4m3fn), scale


def tensors(case: Case) -> Tensors:
    """Every tensor of the checkpoint by its published name, as it is stored.

    Norms are 1 + 0.2n, biases 0.1n, the router's correction uniform in [0, 0.2), the embedding n,
    every other matrix 0.7n / sqrt(columns), n nearly normal: nothing is left at 0 or 1, where a
    forgotten term would not show.
    """
    mtp = f"model.layers.{case.mtp_layer}"
    copied = {
        f"{mtp}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{mtp}.shared_head.head.weight": "lm_head.weight",
    }
    stored: Tensors = {}
    for name, shape in shapes(case).items():
        drawn = _draw(case, copied.get(name, name), shape)
        if name.endswith("e_score_correction_bias"):
            stored[name] = drawn
        elif case.is_fp8 and _is_quantized(name):
            rounded = drawn.astype(ml_dtypes.bfloat16).astype(np.float32)
            values, scale = _quantize(rounded, np.dtype(case.scale_dtype))
            stored[name] = values
            stored[f"{name}_scale"] = scale if case.scale_is_column else scale[:, 0]
        else:
            stored[name] = drawn.astype(ml_dtypes.bfloat16)
    return stored


def digest(stored: Tensors) -> str:
    """A hash of every name, dtype, shape and byte: proves that two machines drew the same weights."""
    total = hashlib.sha256()
    for name in sorted(stored):
        array = stored[name]
        total.update(f"{name} {array.dtype.name} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def config(case: Case) -> dict[str, Any]:
    """The content of config.json, in the case's dialect."""
    eos = [case.vocab_size - 3, case.vocab_size - 2, case.vocab_size - 1]
    sizes = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
        "first_k_dense_replace num_attention_heads num_key_value_heads head_dim n_routed_experts "
        "num_experts_per_tok use_qk_norm attention_bias norm_topk_prob routed_scaling_factor"
    ).split()
    content: dict[str, Any] = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 1024,
        "n_group": 1,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_cache": True,
        "eos_token_id": eos,
        "pad_token_id": case.vocab_size - 4,
        **{name: getattr(case, name) for name in sizes},
    }
    rope = {"rope_theta": case.rope_theta, "partial_rotary_factor": 0.5}
    if case.config_dialect == "published":
        content |= {**rope, "rope_scaling": None, "torch_dtype": "bfloat16"}
    else:
        content |= {"rope_parameters": {"rope_type": "default", **rope}, "dtype": "bfloat16"}
    if case.is_fp8:
        content["quantization_config"] = _quantization_config(case)
    return content


def _quantization_config(case: Case) -> dict[str, Any]:
    common = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "num_bits": 8,
        "observer_kwargs": {},
        "symmetric": True,
        "type": "float",
    }
    moe_layers = range(case.first_k_dense_replace, case.mtp_layer + 1)
    mtp = f"model.layers.{case.mtp_layer}"
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [
            "lm_head",
            *(f"model.layers.{n}.mlp.gate" for n in moe_layers),
            f"{mtp}.eh_proj",
        ],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "output_activations": None,
                "weights": {
                    **common,
                    "dynamic": False,
                    "observer": "minmax",
                    "strategy": "channel",
                },
                "input_activations": {
                    **common,
                    "dynamic": True,
                    "observer": None,
                    "strategy": "token",
                },
            }
        },
    }


def _write_shard(path: Path, stored: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in stored.items():
        begin, end = end, end + array.nbytes
        dtype = _SAFETENSORS_DTYPES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for array in stored.values():
            file.write(array.tobytes())


def write_checkpoint(case: Case, directory: Path) -> str:
    """Writes config.json, two shards, mtp.safetensors and the index; returns `digest(tensors)`."""
    stored = tensors(case)
    mtp = f"model.layers.{case.mtp_layer}."
    main = [name for name in stored if not name.startswith(mtp)]
    half = len(main) // 2
    files = {
        "model-00001-of-00002.safetensors": main[:half],
        "model-00002-of-00002.safetensors": main[half:],
        "mtp.safetensors": [name for name in stored if name.startswith(mtp)],
    }
    directory.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        _write_shard(directory / file, {name: stored[name] for name in names})
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in stored.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(config(case), indent=2))
    return digest(stored)
