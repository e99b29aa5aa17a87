"""The checkpoints the goldens are made of: sizes, spelling and seed of each.

Knows no arrays; `random_checkpoint` turns a case into files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One random checkpoint: the sizes that vary, how it is spelled, and its seed.

    Attributes:
      is_fp8: linear weights are float8_e4m3fn with a scale per output channel.
      has_mtp_copies: the MTP layer carries its own embed_tokens and shared_head.head, as GLM-4.5
        and 4.7 do and 4.6 does not.
      scale_dtype: how weight_scale is stored, "float32" or "bfloat16".
      scale_is_column: weight_scale is [out, 1] when true, [out] when false.
      config_dialect: "published" spells rope_theta, partial_rotary_factor and torch_dtype at the
        top level, "rope_parameters" is what transformers 5 writes.
    """

    name: str
    seed: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    use_qk_norm: bool
    attention_bias: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    rope_theta: float
    is_fp8: bool
    has_mtp_copies: bool
    scale_dtype: str = "float32"
    scale_is_column: bool = True
    config_dialect: str = "published"
    vocab_size: int = 256

    @property
    def shards_over_eight_devices(self) -> bool:
        """Every sharded dimension is a multiple of eight."""
        return self.num_key_value_heads % 8 == 0 and self.n_routed_experts % 8 == 0

    @property
    def mtp_layer(self) -> int:
        """Index of the MTP layer, the one after the last."""
        return self.num_hidden_layers


CASES = {
    case.name: case
    for case in (
        Case(
            name="three_dense_qk_norm",
            seed=0,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_hidden_layers=5,
            first_k_dense_replace=3,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=32,
            n_routed_experts=16,
            num_experts_per_tok=4,
            use_qk_norm=True,
            attention_bias=True,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            rope_theta=1e6,
            is_fp8=False,
            has_mtp_copies=True,
        ),
        Case(
            name="one_dense_no_qk_norm",
            seed=0,
            hidden_size=128,
            intermediate_size=192,
            moe_intermediate_size=64,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            use_qk_norm=False,
            attention_bias=True,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            rope_theta=1e4,
            is_fp8=False,
            has_mtp_copies=False,
        ),
        Case(
            name="head_dim_128_group_12",
            seed=1,
            hidden_size=96,
            intermediate_size=192,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=24,
            num_key_value_heads=2,
            head_dim=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            use_qk_norm=True,
            attention_bias=True,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            rope_theta=1e6,
            is_fp8=False,
            has_mtp_copies=True,
            config_dialect="rope_parameters",
        ),
        Case(
            name="no_bias_raw_router_weights",
            seed=6,
            hidden_size=96,
            intermediate_size=128,
            moe_intermediate_size=64,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=32,
            n_routed_experts=16,
            num_experts_per_tok=3,
            use_qk_norm=True,
            attention_bias=False,
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            rope_theta=1e6,
            is_fp8=False,
            has_mtp_copies=False,
        ),
        Case(
            name="fp8_three_dense_qk_norm",
            seed=10,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_hidden_layers=5,
            first_k_dense_replace=3,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=32,
            n_routed_experts=16,
            num_experts_per_tok=4,
            use_qk_norm=True,
            attention_bias=True,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            rope_theta=1e6,
            is_fp8=True,
            has_mtp_copies=True,
        ),
        Case(
            name="fp8_head_dim_128_no_qk_norm",
            seed=6,
            hidden_size=96,
            intermediate_size=192,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=24,
            num_key_value_heads=2,
            head_dim=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            use_qk_norm=False,
            attention_bias=True,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            rope_theta=1e4,
            is_fp8=True,
            has_mtp_copies=False,
            scale_dtype="bfloat16",
            scale_is_column=False,
            config_dialect="rope_parameters",
        ),
    )
}
