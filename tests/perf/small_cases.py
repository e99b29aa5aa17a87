"""The norm's and the router's shapes in GLM-4.7 on one of eight devices.

Knows no other kernel.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from glm_jax import ops
from glm_jax.fp8 import quantize_rows
from glm_jax.pallas import all_reduce, norm, router
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.grouped_down import combine
from tests.perf import peers
from tests.perf.measure import Case, mismatches, relative_error
from tests.perf.picks import picks_of
from tests.perf.sizes import Sizes

_EPS = 1e-5
_SCALING = 2.5


def norm_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """Residual add, norm and quantization of a decode or prefill step."""
    width, layers = sizes.hidden, sizes.layers

    def draw(num_rows: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        x, added = (jax.random.normal(k, (num_rows, width), jnp.bfloat16) for k in keys[:2])
        return x, added, 1 + jax.random.normal(keys[2], (layers, width), jnp.bfloat16) / 4

    def step(operands: Any, layer: jax.Array) -> Any:
        x, added, weight = operands
        return norm.add_norm_quantize(
            x, added, weight, layer, eps=_EPS, chip=chip, interpret=interpret
        )

    def reference(operands: Any, layer: jax.Array) -> norm.NormedRows:
        x, added, weight = operands
        return _normed(x, added, weight, layer)

    for num_rows in sizes.tokens:
        yield Case(
            kernel="norm.add_norm_quantize",
            shape=f"T={num_rows}",
            draw=partial(draw, num_rows),
            num_layers=layers,
            step=step,
            reference=reference,
            errors=_norm_errors,
            tolerance=1e-3,
            bytes=num_rows * width * (2 + 2 + 2 + 2 + 1) + 2 * width,
            alternatives={"XLA": reference},
            peers=peers.norm(num_rows, width),
        )


def sum_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """The sum of the experts' rows before a norm, in one kernel; what is of other devices is left out."""
    width, layers, num_local = sizes.hidden, sizes.layers, sizes.local_experts

    def draw(tokens: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 5)
        picks, _ = picks_of(tokens, sizes.experts, sizes.picks, num_local)
        num_rows = max(1, int((picks < num_local).sum()))
        places = np.full(picks.shape, num_rows, np.int32)
        places[picks < num_local] = np.random.default_rng(0).permutation(num_rows)[
            : (picks < num_local).sum()
        ]
        rows = jax.random.normal(keys[0], (num_rows, width), jnp.bfloat16)
        shared, residual = (jax.random.normal(k, (tokens, width), jnp.bfloat16) for k in keys[1:3])
        weights = jax.random.uniform(keys[3], places.shape)
        weight = 1 + jax.random.normal(keys[4], (layers, width), jnp.bfloat16) / 4
        return rows, shared, jnp.asarray(places), weights, residual, weight

    def step(operands: Any, layer: jax.Array) -> norm.NormedRows:
        *summands, residual, weight = operands
        return all_reduce.all_reduce_add_norm(
            all_reduce.Summands(*summands), residual, weight, layer, eps=_EPS, num_devices=1,
            chip=chip, interpret=interpret,
        )  # fmt: skip

    def reference(operands: Any, layer: jax.Array) -> norm.NormedRows:
        *summands, residual, weight = operands
        return _normed(residual, combine(*summands).astype(jnp.bfloat16), weight, layer)

    for tokens in sizes.tokens:
        if tokens > all_reduce.MAX_ROWS:
            continue
        picks, _ = picks_of(tokens, sizes.experts, sizes.picks, num_local)
        num_rows = tokens + float((picks < num_local).sum())
        yield Case(
            kernel="all_reduce.all_reduce_add_norm",
            shape=f"T={tokens}, 1 device",
            draw=partial(draw, tokens),
            num_layers=layers,
            step=step,
            reference=reference,
            errors=_norm_errors,
            # Sums of products may be rounded once or twice.
            tolerance=4e-3,
            bytes=2 * num_rows * width + tokens * width * (2 + 2 + 2 + 1) + 2 * width,
            alternatives={"XLA": reference},
        )


def _normed(residual: jax.Array, added: jax.Array, weight: jax.Array, layer: jax.Array) -> Any:
    residual = residual + added
    wide = residual.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + _EPS)
    normed = wide.astype(residual.dtype) * lax.dynamic_index_in_dim(weight, layer)
    return norm.NormedRows(residual, normed, *quantize_rows(normed))


def _norm_errors(got: Any, expected: Any) -> dict[str, jax.Array]:
    values, scale = quantize_rows(got.normed)
    return {
        "residual": relative_error(got.residual, expected.residual),
        "normed": relative_error(got.normed, expected.normed),
        "values": mismatches(got.values, values),
        "scale": relative_error(got.scale, scale),
    }


def router_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """The router of a decode or prefill step."""
    width, experts, layers = sizes.hidden, sizes.experts, sizes.layers

    def draw(num_rows: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (num_rows, width), jnp.bfloat16)
        weight = jax.random.normal(keys[1], (layers, experts, width), jnp.bfloat16)
        bias = jax.random.normal(keys[2], (layers, experts), jnp.float32) / 8
        return x, weight * jnp.bfloat16(width**-0.5), bias

    def step(operands: Any, layer: jax.Array) -> Any:
        x, weight, bias = operands
        return router.route(
            x,
            weight,
            bias,
            layer,
            num_experts_per_tok=sizes.picks,
            norm_topk_prob=True,
            routed_scaling_factor=_SCALING,
            chip=chip,
            interpret=interpret,
        )

    def score(logits: jax.Array, bias: jax.Array, layer: jax.Array) -> Any:
        scores = jax.nn.sigmoid(logits)
        keys = scores + lax.dynamic_index_in_dim(bias, layer)
        _, chosen = lax.top_k(keys, sizes.picks)
        weights = jnp.take_along_axis(scores, chosen, axis=1)
        return chosen, weights / (weights.sum(-1, keepdims=True) + 1e-20) * _SCALING, keys

    def reference(operands: Any, layer: jax.Array) -> Any:
        x, weight, bias = operands
        return score(ops.router_logits(x, weight, layer), bias, layer)

    def in_bfloat16(operands: Any, layer: jax.Array) -> Any:
        x, weight, bias = operands
        weight = lax.dynamic_index_in_dim(weight, layer, keepdims=False)
        logits = lax.dot_general(
            x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return score(logits, bias, layer)[:2]

    def errors(got: Any, expected: Any) -> dict[str, jax.Array]:
        chosen, weights, keys = expected
        mine, theirs = (jnp.take_along_axis(keys, picks, axis=1) for picks in (got[0], chosen))
        is_same = (got[0] == chosen).all(axis=1, keepdims=True)
        # Experts change places only where the sums' order decides: a float32 sum of 5120 products is
        # good for about 1e-6, so that 1e-5 between their scores is the most allowed, of 1e-3 in all.
        # A token whose experts differ has other weights too, and those are not compared.
        return {
            "experts": 100 * jnp.abs(mine - theirs).max(),
            "tokens": jnp.maximum(1 - is_same.mean() - 1e-3, 0),
            "weights": relative_error(jnp.where(is_same, got[1], weights), weights),
        }

    for num_rows in sizes.tokens:
        yield Case(
            kernel="router.route",
            shape=f"T={num_rows}",
            draw=partial(draw, num_rows),
            num_layers=layers,
            step=step,
            reference=reference,
            errors=errors,
            tolerance=1e-3,
            bytes=2 * width * (num_rows + experts) + 8 * num_rows * sizes.picks,
            operations=2 * num_rows * width * experts,
            is_float32=True,
            alternatives={"XLA": in_bfloat16},
            peers=peers.router(num_rows, width, experts, sizes.picks, _SCALING),
        )
