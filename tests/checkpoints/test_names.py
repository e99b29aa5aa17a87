"""Names: every tensor has one place, every place one tensor, and the real model's counts come out."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.names import compare, mtp_kinds, mtp_placements, placements
from glm_jax.config import ModelConfig
from glm_jax.mtp import weight_specs
from tests.checkpoints.samples import make_config, make_tensors

GLM_4_7: dict[str, Any] = {
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
    "moe_intermediate_size": 1536,
}
CONFIGS = [
    make_config(),
    make_config(is_fp8=False),
    make_config(use_qk_norm=False),  # GLM-4.5-Air
    make_config(attention_bias=False, first_k_dense_replace=2),
    make_config(n_shared_experts=2, num_nextn_predict_layers=0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_table_names_exactly_a_checkpoints_tensors(config: ModelConfig) -> None:
    tensors = make_tensors(config, has_mtp=False)
    assert set(placements(config)) == set(tensors)
    assert {n: p.shape for n, p in placements(config).items()} == {
        n: t.shape for n, t in tensors.items()
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_every_element_of_every_weight_has_exactly_one_source(config: ModelConfig) -> None:
    with_mtp = config.num_nextn_predict_layers > 0
    specs = weight_specs(config, np.dtype(jnp.bfloat16), with_mtp=with_mtp)
    written = {path: np.zeros(spec.shape, np.int32) for path, spec in specs.items()}
    for placement in placements(config, with_mtp=with_mtp).values():
        assert math.prod(placement.block) == math.prod(placement.shape)
        where = zip(placement.start, placement.block, strict=True)
        region = written[placement.path][tuple(slice(s, s + n) for s, n in where)]
        assert region.shape == placement.block
        region += 1
    assert all((count == 1).all() for count in written.values())


def test_the_mtp_layers_tensors_have_places_unless_they_are_copies_of_the_models() -> None:
    config = make_config()
    tensors = make_tensors(config)
    table = mtp_placements(config)
    assert {name: place.shape for name, place in table.items()} == {
        name: tensors[name].shape for name in tensors.keys() & table.keys()
    }
    copies = {f"model.layers.3.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
    left = tensors.keys() - table.keys() - placements(config).keys()
    assert left == copies | {"model.layers.3.shared_head.head.weight_scale"}
    assert not mtp_placements(make_config(num_nextn_predict_layers=0))


def test_an_mtp_layer_is_missing_only_where_it_is_wanted() -> None:
    config = make_config()
    tensors = make_tensors(config, has_mtp=False)
    assert compare(config, tensors) == ([], [])
    missing, _ = compare(config, tensors, with_mtp=True)
    assert missing == list(mtp_placements(config))


def test_the_published_model_has_the_published_counts_and_bytes() -> None:
    config = make_config(is_fp8=True, **GLM_4_7)
    table = placements(config)
    assert len(table) == 87_553
    widths = {"values": 1, "scale": 4, "plain": 2}
    nbytes = sum(math.prod(p.shape) * widths[p.kind] for p in table.values())
    assert nbytes == pytest.approx(354.90e9, rel=1e-4)
    # 987 tensors, and copies of the embedding and of the head with its scale.
    assert len(mtp_kinds(config)) == 987 + 3


def test_a_whole_checkpoint_compares_clean_with_and_without_its_mtp_layer() -> None:
    config = make_config()
    for has_mtp in (True, False):
        assert compare(config, make_tensors(config, has_mtp=has_mtp)) == ([], [])


def test_missing_and_unexpected_names_are_told_apart() -> None:
    config = make_config()
    tensors = make_tensors(config)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale"]
    del tensors["model.norm.weight"]
    tensors["model.layers.4.input_layernorm.weight"] = np.zeros(1)
    tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"] = np.zeros(1)
    missing, unexpected = compare(config, tensors)
    assert missing == ["model.layers.1.mlp.experts.3.up_proj.weight_scale", "model.norm.weight"]
    assert unexpected == [
        "model.layers.4.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
    ]


def test_an_mtp_layer_that_the_config_does_not_announce_is_unexpected() -> None:
    config = make_config()
    silent = make_config(num_nextn_predict_layers=0)
    _, unexpected = compare(silent, make_tensors(config))
    assert len(unexpected) == len(mtp_kinds(config))


def test_overlap_gives_the_common_part_in_both_coordinates() -> None:
    placement = placements(make_config())["model.layers.2.self_attn.k_proj.weight"]
    assert (placement.start, placement.block) == ((2, 0, 12, 0), (1, 8, 4, 32))
    overlap = placement.overlap((0, 6, 0, 0), (3, 1, 20, 32))
    assert overlap is not None
    assert overlap.inside == (slice(0, 1), slice(6, 7), slice(0, 4), slice(0, 32))
    assert overlap.outside == (slice(2, 3), slice(0, 1), slice(12, 16), slice(0, 32))
    assert placement.overlap((0, 0, 0, 0), (3, 8, 12, 32)) is None
