"""GLM-4's hyper-parameters, parsed strictly from config.json.

Knows no arrays. Every key is known or refused: a value this code would have to guess at never loads.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Keys that transformers writes into every config.json and that say nothing about the mathematics.
_GENERIC_KEYS = frozenset(
    """_name_or_path auto_map bos_token_id chunk_size_feed_forward id2label initializer_range
    is_encoder_decoder label2id output_attentions output_hidden_states output_router_logits
    problem_type return_dict transformers_version use_cache""".split()
)
# Keys whose only supported value is fixed in the code.
_FIXED_VALUES: dict[str, tuple[Any, ...]] = {
    "architectures": (["Glm4MoeForCausalLM"],),
    "model_type": ("glm4_moe",),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_dropout": (0, 0.0),
    "n_group": (1,),
    "topk_group": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
_OPTIONAL_FIXED = frozenset({"attention_dropout", "scoring_func", "topk_method"})
_INT_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "first_k_dense_replace", "n_routed_experts",
    "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "max_position_embeddings",
)  # fmt: skip
_MAY_BE_ZERO = frozenset(
    {"first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_layers", "pad_token_id"}
)
_FLOAT_KEYS = ("routed_scaling_factor", "rms_norm_eps")
_BOOL_KEYS = ("attention_bias", "use_qk_norm", "norm_topk_prob")
_ROPE_KEYS = frozenset({"rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"})
_DTYPES = ("bfloat16", "float32", "float16")
# The modules a published FP8 checkpoint leaves in bf16; ignoring any other Linear is another format.
_UNQUANTIZED = re.compile(
    r"(lm_head|.*embed_tokens|.*norm|.*\.bias|.*\.mlp\.gate(\..*)?|.*eh_proj|.*shared_head(\.head)?)"
)


class ConfigError(ValueError):
    """config.json asks for something this code does not do, or lacks something it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The hyper-parameters of a Glm4Moe model; fields keep config.json's spelling.

    Attributes:
      eos_token_id: every token that ends a completion.
      dtype: the checkpoint's own dtype for what is not quantized, "bfloat16" as published.
      is_fp8: linear layers are stored as float8_e4m3fn with one scale per output channel.
      num_nextn_predict_layers: MTP layers stored after the last decoder layer.

    Raises:
      ConfigError: sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    first_k_dense_replace: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    max_position_embeddings: int
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    attention_bias: bool
    use_qk_norm: bool
    norm_topk_prob: bool
    num_nextn_predict_layers: int
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    dtype: str
    is_fp8: bool

    def __post_init__(self) -> None:
        groups = self.num_key_value_heads
        checks = (
            (
                self.num_attention_heads % groups == 0,
                "num_attention_heads",
                self.num_attention_heads,
            ),
            (self.intermediate_size % groups == 0, "intermediate_size", self.intermediate_size),
            (self.shared_width % groups == 0, "the shared experts' width", self.shared_width),
            (self.n_routed_experts % groups == 0, "n_routed_experts", self.n_routed_experts),
        )
        for fits, name, value in checks:
            if not fits:
                raise ConfigError(
                    f"{name} = {value} is not a multiple of num_key_value_heads = {groups}"
                )
        if not 0 <= self.first_k_dense_replace < self.num_hidden_layers:
            raise ConfigError(
                f"first_k_dense_replace = {self.first_k_dense_replace} must be less than "
                f"num_hidden_layers = {self.num_hidden_layers}: the model has no expert layer otherwise"
            )
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok = {self.num_experts_per_tok} must be between 1 and "
                f"n_routed_experts = {self.n_routed_experts}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                f"head_dim * partial_rotary_factor = {self.head_dim} * {self.partial_rotary_factor} "
                "must be an even number of dimensions, at most head_dim"
            )
        if self.num_nextn_predict_layers not in (0, 1):
            raise ConfigError(
                f"num_nextn_predict_layers = {self.num_nextn_predict_layers}: only 0 and 1 are supported"
            )

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that rotary turns; the rest pass through."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_query_groups(self) -> int:
        """Query heads per kv head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with experts; they follow the dense ones."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def shared_width(self) -> int:
        """Width of the shared experts taken together."""
        return self.n_shared_experts * self.moe_intermediate_size

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Reads directory/config.json.

        Raises:
          ConfigError: the file is missing, is not JSON, or asks for what is not supported.
        """
        path = Path(directory) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: give the directory of a GLM-4.5/4.6/4.7 checkpoint"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Parses the content of a config.json, in either rope and dtype dialect.

        Raises:
          ConfigError: a key is missing, unknown, or has a value that is not supported.
        """
        if not isinstance(raw, dict):
            raise ConfigError(f"the top level must be an object, got {type(raw).__name__}")
        _refuse_other_architectures(raw)
        for key, allowed in _FIXED_VALUES.items():
            if key not in raw and key in _OPTIONAL_FIXED:
                continue
            if _require(raw, key) not in allowed:
                raise ConfigError(f"{key} = {raw[key]!r} is not supported, only {allowed[0]!r} is")
        fields: dict[str, Any] = {key: _number(raw, key, int) for key in _INT_KEYS}
        fields |= {key: _number(raw, key, float) for key in _FLOAT_KEYS}
        fields |= {key: _boolean(raw, key) for key in _BOOL_KEYS}
        known = set(_GENERIC_KEYS) | set(_FIXED_VALUES) | set(fields) | _ROPE_KEYS
        known |= {"dtype", "torch_dtype", "eos_token_id", "pad_token_id", "quantization_config"}
        known |= {"num_nextn_predict_layers", "num_mtp_layers"}
        for key in sorted(raw.keys() - known):
            raise ConfigError(
                f"unknown key {key} = {raw[key]!r}: its meaning would have to be guessed"
            )
        return cls(
            **fields,
            **_parse_rope(raw),
            num_nextn_predict_layers=_one_spelling(
                raw, ("num_nextn_predict_layers", "num_mtp_layers"), int
            ),
            eos_token_id=_parse_eos(raw),
            pad_token_id=None
            if raw.get("pad_token_id") is None
            else _number(raw, "pad_token_id", int),
            dtype=_parse_dtype(raw),
            is_fp8=_parse_quantization(raw.get("quantization_config")),
        )


def _refuse_other_architectures(raw: dict[str, Any]) -> None:
    kinds = (raw.get("model_type"), raw.get("architectures"))
    if "glm4_moe_lite" in kinds or ["Glm4MoeLiteForCausalLM"] in kinds:
        raise ConfigError(
            "GLM-4.7-Flash (Glm4MoeLite) is not supported: it uses multi-head latent attention and "
            "interleaved rotary, another architecture. GLM-4.5, 4.6, 4.7 and 4.5-Air are supported"
        )


def _require(raw: dict[str, Any], key: str) -> Any:
    if key not in raw:
        raise ConfigError(f"key {key} is missing")
    return raw[key]


def _number(raw: dict[str, Any], key: str, kind: type) -> Any:
    value = _require(raw, key)
    kinds = (int,) if kind is int else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
        limit = "0 or more" if key in _MAY_BE_ZERO else "more than 0"
        raise ConfigError(f"{key} = {value!r} must be a finite {kind.__name__}, {limit}")
    return kind(value)


def _boolean(raw: dict[str, Any], key: str) -> bool:
    value = _require(raw, key)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} = {value!r} must be true or false")
    return value


def _one_spelling(raw: dict[str, Any], spellings: tuple[str, ...], kind: type) -> Any:
    """The value under whichever of the spellings is there; two that disagree are refused."""
    present = [key for key in spellings if raw.get(key) is not None]
    if not present:
        raise ConfigError(f"key {spellings[0]} is missing")
    values = [_number(raw, key, kind) for key in present]
    if len(set(values)) > 1:
        raise ConfigError(f"{present[0]} = {values[0]!r} and {present[1]} = {values[1]!r} disagree")
    return values[0]


def _parse_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Reads rope_theta and partial_rotary_factor from rope_parameters or from the top level."""
    parameters = raw.get("rope_parameters")
    if raw.get("rope_scaling") is not None:
        raise ConfigError(f"rope_scaling = {raw['rope_scaling']!r} is not supported, only null is")
    keys = ("rope_theta", "partial_rotary_factor")
    if parameters is None:
        return {key: _number(raw, key, float) for key in keys}
    if not isinstance(parameters, dict):
        raise ConfigError(f"rope_parameters = {parameters!r} must be an object")
    for key in sorted(parameters.keys() - {*keys, "rope_type"}):
        raise ConfigError(f"unknown key rope_parameters.{key} = {parameters[key]!r}")
    if parameters.get("rope_type", "default") != "default":
        raise ConfigError(
            f"rope_parameters.rope_type = {parameters['rope_type']!r} is not supported, "
            "only 'default' is"
        )
    merged: dict[str, Any] = {}
    for key in keys:
        merged[key] = _number(parameters if key in parameters else raw, key, float)
        if key in parameters and raw.get(key) is not None and raw[key] != parameters[key]:
            raise ConfigError(
                f"{key} = {raw[key]!r} and rope_parameters.{key} = {parameters[key]!r} disagree"
            )
    return merged


def _parse_eos(raw: dict[str, Any]) -> tuple[int, ...]:
    value = _require(raw, "eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"eos_token_id = {value!r} must be a token id or a list of them")
    return tuple(ids)


def _parse_dtype(raw: dict[str, Any]) -> str:
    present = [raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None]
    if not present:
        raise ConfigError("key dtype (or torch_dtype) is missing")
    if any(value != present[0] for value in present):
        raise ConfigError(f"dtype = {present[0]!r} and torch_dtype = {present[1]!r} disagree")
    if present[0] not in _DTYPES:
        raise ConfigError(f"dtype = {present[0]!r} is not supported, only {', '.join(_DTYPES)}")
    return present[0]


# compressed-tensors' float-quantized scheme as GLM-4.5/4.6/4.7-FP8 use it: what each key must hold.
# Beside them only the quantizer's bookkeeping may stand, and keys that are null or empty.
_SCHEME: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None,
                           "block_structure": None, "actorder": None}  # fmt: skip
_WEIGHTS = _SCHEME | {"strategy": "channel", "dynamic": False}
_ACTIVATIONS = _SCHEME | {"strategy": "token", "dynamic": True}
_GROUP: dict[str, Any] = {"targets": ["Linear"], "output_activations": None,
                          "format": "float-quantized"}  # fmt: skip
_WHOLE: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized",
                          "quantization_status": "compressed", "kv_cache_scheme": None}  # fmt: skip
_MUST_BE_GIVEN = frozenset(
    "quant_method num_bits type symmetric strategy dynamic targets weights input_activations".split()
)
_BOOKKEEPING = frozenset(
    """config_groups global_compression_ratio ignore input_activations observer observer_kwargs
    scale_dtype version weights zp_dtype""".split()
)


def _parse_quantization(raw: Any) -> bool:
    """True for the FP8 scheme this code runs, False for none; anything else is refused."""
    if raw is None:
        return False
    if not isinstance(raw, dict):
        raise ConfigError(f"quantization_config = {raw!r} must be an object")
    where = "quantization_config"
    if raw.get("format") is None:  # a group's own may be missing
        raise ConfigError(f"key {where}.format is missing")
    _expect(raw, _WHOLE, where)
    groups = _require(raw, "config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ConfigError(f"{where}.config_groups must hold exactly one group, got {groups!r}")
    name, group = next(iter(groups.items()))
    where = f"{where}.config_groups.{name}"
    _expect(group, _GROUP, where)
    for part, scheme in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        _expect(_require(group, part), scheme, f"{where}.{part}")
    ignored = raw.get("ignore") or []
    for module in ignored if isinstance(ignored, list) else [ignored]:
        if not (isinstance(module, str) and _UNQUANTIZED.fullmatch(module)):
            raise ConfigError(
                f"quantization_config.ignore leaves {module!r} unquantized: only lm_head, embeddings, "
                "norms, biases, routers and the MTP layer's own projections can be"
            )
    return True


def _expect(raw: Any, expected: dict[str, Any], where: str) -> None:
    """Refuses an object that lacks a value it must give, differs from one, or has one unknown."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} = {raw!r} must be an object")
    given = {key: value for key, value in raw.items() if value not in (None, {}, [])}
    for key, value in expected.items():
        if key not in given and key in _MUST_BE_GIVEN:
            raise ConfigError(f"key {where}.{key} is missing")
        if key in given and given[key] != value:
            raise ConfigError(f"{where}.{key} = {given[key]!r} is not supported, only {value!r} is")
    for key in sorted(given.keys() - expected.keys() - _BOOKKEEPING):
        raise ConfigError(f"unknown key {where}.{key} = {given[key]!r} is not supported")
