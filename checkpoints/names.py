"""Checkpoint name <-> place in the parameter tree: one table, both directions, no fallbacks.

Knows neither files nor devices: a tensor is a rectangle of one stacked parameter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from glm_jax.config import ModelConfig

# values: a linear layer's weight, FP8 in a quantized checkpoint; scale: its scales;
# plain: whatever is never quantized.
Kind = Literal["values", "scale", "plain"]


class Overlap(NamedTuple):
    """The common part of a tensor's rectangle and of another, as an index into either."""

    inside: tuple[slice, ...]
    outside: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rectangle of which parameter a tensor of the checkpoint is.

    Attributes:
      path: the parameter's dotted path.
      start: the rectangle's first index in each dimension of the parameter.
      block: the rectangle's size in each dimension; the tensor, reshaped to it, is the rectangle.
      shape: the tensor's shape in the checkpoint.
      kind: what the tensor is, which decides the dtypes it may have.
    """

    path: str
    start: tuple[int, ...]
    block: tuple[int, ...]
    shape: tuple[int, ...]
    kind: Kind

    def overlap(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Overlap | None:
        """What the rectangle and another one, given by its first index and size, have in common.

        Returns None when that is nothing.
        """
        inside, outside = [], []
        for first, size, other_first, other_size in zip(
            self.start, self.block, start, shape, strict=True
        ):
            low = max(first, other_first)
            high = min(first + size, other_first + other_size)
            if low >= high:
                return None
            inside.append(slice(low - first, high - first))
            outside.append(slice(low - other_first, high - other_first))
        return Overlap(tuple(inside), tuple(outside))


Entry = tuple[str, Placement]

MTP_PREFIX = "mtp."  # of the paths of the MTP layer's parameters, as glm_jax.mtp has them


def placements(config: ModelConfig, *, with_mtp: bool = False) -> dict[str, Placement]:
    """Every tensor that a checkpoint of this config must hold; the MTP layer's only if it is wanted.

    They come in the order of a published checkpoint: embeddings, layers, norm, head.
    """
    V, D = config.vocab_size, config.hidden_size
    table = dict([_plain("model.embed_tokens.weight", "embed_tokens.values", (), (V, D))])
    for layer in range(config.num_hidden_layers):
        table.update(_layer(config, layer))
    table.update([_plain("model.norm.weight", "norm.weight", (), (D,))])
    table.update([_plain("lm_head.weight", "lm_head.values", (), (V, D))])
    return table | (mtp_placements(config) if with_mtp else {})


def mtp_placements(config: ModelConfig) -> dict[str, Placement]:
    """Every tensor of the MTP layer, as parameters of glm_jax.mtp; empty where the model has none.

    Not those that are copies of the model's own embedding and head: the model's serve for both.
    """
    if not config.num_nextn_predict_layers:
        return {}
    D = config.hidden_size
    prefix = f"model.layers.{config.num_hidden_layers}."
    alone = replace(config, num_hidden_layers=1, first_k_dense_replace=0)
    table = {
        prefix + name.removeprefix("model.layers.0."): replace(place, path=MTP_PREFIX + place.path)
        for name, place in _layer(alone, 0)
    }
    for module, path in (("enorm", "enorm"), ("hnorm", "hnorm"), ("shared_head.norm", "norm")):
        table.update([_plain(f"{prefix}{module}.weight", f"{MTP_PREFIX}{path}.weight", (), (D,))])
    joined = _plain(f"{prefix}eh_proj.weight", f"{MTP_PREFIX}eh_proj.values", (0,), (D, 2 * D))
    table.update([joined])
    return table


def mtp_kinds(config: ModelConfig) -> dict[str, Kind]:
    """Every name the MTP layers may use: an expert layer's, and those of the draft head.

    The copies of the embedding and of the head are there in some releases and not in others.
    """
    kinds: dict[str, Kind] = {}
    for index in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + index
        prefix = f"model.layers.{layer}"
        kinds |= {name: placement.kind for name, placement in _layer(config, layer)}
        for module in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm"):
            kinds[f"{prefix}.{module}.weight"] = "plain"
        kinds[f"{prefix}.shared_head.head.weight"] = "values"
        if config.is_fp8:
            kinds[f"{prefix}.shared_head.head.weight_scale"] = "scale"
    return kinds


def compare(
    config: ModelConfig, names: Collection[str], *, with_mtp: bool = False
) -> tuple[list[str], list[str]]:
    """The tensors that are missing from these names, and the names that are no tensor's.

    Nothing is missing when the MTP layer is not there, or not whole, unless it is to be loaded.
    """
    table = placements(config, with_mtp=with_mtp)
    optional = mtp_kinds(config)
    missing = [name for name in table if name not in names]
    return missing, [name for name in names if name not in table and name not in optional]


def _layer(config: ModelConfig, layer: int) -> Iterator[Entry]:
    prefix, D = f"model.layers.{layer}", config.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _plain(f"{prefix}.{norm}.weight", f"layers.{norm}.weight", (layer,), (D,))
    yield from _attention(config, f"{prefix}.self_attn", layer)
    if layer < config.first_k_dense_replace:
        width = config.intermediate_size
        yield from _mlp(config, f"{prefix}.mlp", "layers.dense_mlp", (layer,), width)
    else:
        yield from _moe(config, f"{prefix}.mlp", layer - config.first_k_dense_replace)


def _attention(config: ModelConfig, prefix: str, layer: int) -> Iterator[Entry]:
    D, N, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    H = config.head_dim
    Q = N // K * H
    path, bias = "layers.self_attn.qkv_proj", config.attention_bias
    # In: q [K*G*H, D] and k, v [K*H, D]. Out: per kv head its G query heads, its key, its value,
    # so that splitting kv heads over devices splits all three alike.
    for module, first, rows in (("q_proj", 0, Q), ("k_proj", Q, H), ("v_proj", Q + H, H)):
        yield from _linear(
            config, f"{prefix}.{module}", path, (layer,), (0, first), (K, rows), D, bias
        )
    yield from _linear(
        config, f"{prefix}.o_proj", "layers.self_attn.o_proj", (layer,), (0,), (D,), N * H
    )
    if config.use_qk_norm:
        for norm in ("q_norm", "k_norm"):
            path = f"layers.self_attn.{norm}.weight"
            yield _plain(f"{prefix}.{norm}.weight", path, (layer,), (H,))


def _moe(config: ModelConfig, prefix: str, layer: int) -> Iterator[Entry]:
    E, D = config.n_routed_experts, config.hidden_size
    path = "layers.moe"
    for name, shape in (("weight", (E, D)), ("e_score_correction_bias", (E,))):
        yield _plain(f"{prefix}.gate.{name}", f"{path}.gate.{name}", (layer,), shape)
    for expert in range(E):
        lead, width = (layer, expert), config.moe_intermediate_size
        yield from _mlp(config, f"{prefix}.experts.{expert}", f"{path}.experts", lead, width)
    width = config.shared_width
    shared = "shared_experts"
    yield from _mlp(config, f"{prefix}.{shared}", f"{path}.{shared}", (layer,), width)


def _mlp(
    config: ModelConfig, prefix: str, path: str, lead: tuple[int, ...], width: int
) -> Iterator[Entry]:
    D, F = config.hidden_size, width
    for index, module in enumerate(("gate_proj", "up_proj")):
        where = (*lead, index)
        yield from _linear(
            config, f"{prefix}.{module}", f"{path}.gate_up_proj", where, (0,), (F,), D
        )
    yield from _linear(config, f"{prefix}.down_proj", f"{path}.down_proj", lead, (0,), (D,), F)


def _linear(
    config: ModelConfig,
    module: str,
    path: str,
    lead: tuple[int, ...],
    start: tuple[int, ...],
    rows: tuple[int, ...],
    columns: int,
    use_bias: bool = False,
) -> Iterator[Entry]:
    """A linear layer's weight, scale and bias: rows from `start` on, under the stack index `lead`."""
    first, block = (*lead, *start), (1,) * len(lead) + rows
    outputs = math.prod(rows)
    weight = Placement(
        f"{path}.values", (*first, 0), (*block, columns), (outputs, columns), "values"
    )
    yield f"{module}.weight", weight
    if config.is_fp8:
        yield (
            f"{module}.weight_scale",
            Placement(f"{path}.scale", first, block, (outputs, 1), "scale"),
        )
    if use_bias:
        yield f"{module}.bias", Placement(f"{path}.bias", first, block, (outputs,), "plain")


def _plain(name: str, path: str, lead: tuple[int, ...], shape: tuple[int, ...]) -> Entry:
    start, block = (*lead, *(0 for _ in shape)), (1,) * len(lead) + shape
    return name, Placement(path, start, block, shape, "plain")
