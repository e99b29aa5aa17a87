"""RMSNorm, linear, embedding: the small parts, stacked over layers, with logical axes.

Knows no mesh: parameters carry the names of their axes, arrays inside a step are this device's part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from glm_jax import ops, sharding
from glm_jax.fp8 import FP8
from glm_jax.kernels import Kernels
from glm_jax.operands import Layer, Weight, plain
from glm_jax.sharding import Axes


def parameter(
    init: nnx.Initializer, rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike, axes: Axes
) -> nnx.Param:
    """A parameter whose dimensions carry logical axis names as metadata `axes`."""
    value = init(rngs.params(), shape, jnp.float32).astype(dtype)
    return nnx.Param(value, axes=axes)


class NormStack(NamedTuple):
    """Weights of norms [layers, D] that are no parameter of their own."""

    weight: Float[Array, "L D"]
    eps: float

    def stacked(self) -> Float[Array, "L D"]:
        """The weights."""
        return self.weight


class RMSNorm(nnx.Module):
    """Root-mean-square norms: weight [layers, D], or [D] where there is only one."""

    def __init__(
        self, shape: tuple[int, ...], axes: Axes, eps: float, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        self.weight = parameter(nnx.initializers.ones, rngs, shape, dtype, axes)
        self.eps = eps

    def stacked(self) -> Float[Array, "L D"]:
        """The weights with their axis of layers, also where there is only one."""
        weight = self.weight[...]
        return weight if weight.ndim == 2 else weight[None]

    def __call__(self, x: Float[Array, "*rows D"], layer: Layer | None) -> Float[Array, "*rows D"]:
        """Norms the last dimension with the layer's weight; layer None where there is only one."""
        index = 0 if layer is None else plain(layer)
        weight = jax.lax.dynamic_index_in_dim(self.stacked(), index, keepdims=False)
        return ops.rms_norm(x, weight, self.eps)


class Linear(nnx.Module):
    """Linear layers stacked over layers: values [layers, *out, in], FP8 with scales, or plain.

    `axes` names every dimension of the values; scale and bias share all but the last.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        dtype: jnp.dtype,
        *,
        is_fp8: bool,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.normal(shape[-1] ** -0.5)
        self.values = parameter(init, rngs, shape, FP8 if is_fp8 else dtype, axes)
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        outputs = (shape[:-1], jnp.float32, axes[:-1])
        self.scale = nnx.data(parameter(ones, rngs, *outputs) if is_fp8 else None)
        self.bias = nnx.data(
            parameter(zeros, rngs, shape[:-1], dtype, axes[:-1]) if use_bias else None
        )

    def weights(self) -> Weight:
        """The values and their scale, None when they are not FP8."""
        return self.values[...], None if self.scale is None else self.scale[...]


class VocabTable(nnx.Module):
    """One vector per token, split over the vocabulary: the input embedding, or the output head."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.normal(0.02)
        shape, axes = (vocab_size, hidden_size), ("vocab", "embed")
        self.values = parameter(init, rngs, shape, dtype, axes)

    def embed(self, tokens: Int32[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Each token's vector; exact, since one device has it and the others add zeros."""
        return sharding.all_reduce(self.embed_here(tokens))

    def embed_here(self, tokens: Int32[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """The vectors of the tokens of this device's part, zeros for the others."""
        table = self.values[...]
        local = tokens - sharding.device_index() * table.shape[0]
        is_here = (local >= 0) & (local < table.shape[0])
        vectors = table[jnp.clip(local, 0, table.shape[0] - 1)]
        return jnp.where(is_here[..., None], vectors, 0)

    def logits(self, x: Float[Array, "T D"], kernels: Kernels) -> Float32[Array, "T V"]:
        """The product with every token's vector, joined over devices."""
        return sharding.all_gather(self.logits_here(x, kernels), axis=1)

    def logits_of_share(
        self, x: Float[Array, "T D"], kernels: Kernels
    ) -> Float32[Array, "share V"]:
        """Of this device's share of the rows alone."""
        return sharding.exchange(self.logits_here(x, kernels))

    def logits_here(self, x: Float[Array, "T D"], kernels: Kernels) -> Float32[Array, "T N"]:
        """The product with the vectors of this device's part."""
        return kernels.vocab_logits(x, self.values[...])
