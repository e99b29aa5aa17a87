"""How nano's weights change: Muon for matrices, Adam for the rest, and balanced routers.

Knows weights by their dotted paths, and no data.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32
from optax.contrib import MuonDimensionNumbers, muon

Weights = dict[str, jax.Array]

CORRECTION_BIAS = "e_score_correction_bias"


def make_optimizer(
    rate_share: optax.Schedule, *, muon_rate: float, adam_rate: float, weight_decay: float
) -> optax.GradientTransformation:
    """Both rates are that share of these at each step."""

    def schedule(peak: float) -> optax.Schedule:
        return lambda step: peak * rate_share(step)

    update = muon(
        schedule(muon_rate),
        weight_decay=weight_decay,
        adam_learning_rate=schedule(adam_rate),
        adam_b2=0.98,
        muon_weight_dimension_numbers=_matrices,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def _matrices(weights: Any) -> Any:
    """The weights that are stacks of matrices [out, in]; vocabularies and routers are Adam's."""
    numbers = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return {path: numbers if path.endswith("_proj.values") else None for path, _ in weights.items()}


def balance(weights: Weights, load: Float32[Array, "Lm1 E"], rate: float | jax.Array) -> Weights:
    """Makes experts that got too few tokens likelier to be picked, and the others less.

    Args:
      weights: both modules', the draft's under "draft."; only correction biases change.
      load: each expert's share of the choices, the draft layer's last.
      rate: how far one step moves a bias.
    """
    step = rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    moves = {f"decoder.layers.moe.gate.{CORRECTION_BIAS}": step[:-1],
             f"draft.layers.moe.gate.{CORRECTION_BIAS}": step[-1:]}  # fmt: skip
    return weights | {path: weights[path] + move for path, move in moves.items()}
