"""Some of eight devices' parts of GLM-4.7, as a model of its own: the shapes each device has in the deployment.

Knows no kernel and no engine. A device of eight holds one KV head with its 12 query heads, 20 of the
160 experts that its router knows, an eighth of the dense layers, of the shared expert and of the
vocabulary, and samples from all of it. Here N devices hold the parts of the first N: what the others
would add to the sums is missing, and the logits of the others' tokens are copies of these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from glm_jax import layers, model, moe
from glm_jax.aot.presets import PRESETS
from glm_jax.config import ModelConfig
from glm_jax.kernels import Kernels

_WHOLE = 8


class Eighths(ModelConfig):
    """GLM-4.7 as the first num_key_value_heads of eight devices hold it."""

    # Of the whole model; the shared expert is narrower than a routed one on each device.
    @property
    def shared_width(self) -> int:
        return super().shared_width * self.num_key_value_heads // _WHOLE


def eighths(
    num_devices: int, num_layers: int, *, with_mtp: bool = False, **changes: Any
) -> Eighths:
    """The configuration of num_layers layers, of which the first three at most are dense.

    Args:
      with_mtp: whether the layer that guesses comes after them.
      changes: of fields of the published config.json, for a rehearsal.
    """
    whole = PRESETS["glm-4.7"] | changes
    shared_out = ("vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    made = Eighths.from_dict(
        whole
        | {name: whole[name] // _WHOLE * num_devices for name in shared_out}
        | {
            "num_hidden_layers": num_layers,
            "first_k_dense_replace": min(3, num_layers - 1),
            "num_nextn_predict_layers": int(with_mtp),
            "eos_token_id": [1],
            "pad_token_id": 1,
        }
    )
    assert isinstance(made, Eighths)
    return made


class _HeldExperts(moe.Experts):
    """The experts that are held, fewer than the router knows."""

    def __init__(self, config: ModelConfig, *arguments: Any, **options: Any) -> None:
        held = config.n_routed_experts * config.num_key_value_heads // _WHOLE
        super().__init__(replace(config, n_routed_experts=held), *arguments, **options)


class _PartOfVocabulary(layers.VocabTable):
    """The vectors that are held; logits of the whole vocabulary all the same."""

    num_copies = 1

    def logits(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        return self._copied(super().logits(x, kernels))

    def logits_of_share(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        return self._copied(super().logits_of_share(x, kernels))

    def _copied(self, logits: jax.Array) -> jax.Array:
        # In memory, as the product leaves them: what is chosen from them is not to be fused with this.
        return lax.optimization_barrier(jnp.tile(logits, (1, self.num_copies)))


@contextmanager
def held_parts(num_devices: int) -> Iterator[None]:
    """Within it, models of `eighths` are made of the parts that are held."""
    with (
        mock.patch.object(moe, "Experts", _HeldExperts),
        mock.patch.object(model, "VocabTable", _PartOfVocabulary),
        mock.patch.object(_PartOfVocabulary, "num_copies", _WHOLE // num_devices),
    ):
        yield


def even_loads(weights: dict[str, jax.Array]) -> None:
    """Takes the routers' random bias out: a trained one evens out loads, this leaves many without tokens."""
    for path in [path for path in weights if path.endswith("gate.e_score_correction_bias")]:
        zeros = np.zeros(weights[path].shape, np.float32)
        weights[path] = jax.device_put(zeros, weights[path].sharding)
