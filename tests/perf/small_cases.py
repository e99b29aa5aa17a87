"""The norm's and the router's shapes in GLM-4.7 on one of eight devices.

Knows no other kernel.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax import ops
from glm_jax.fp8 import quantize_rows
from glm_jax.pallas import all_reduce, norm, router
from glm_jax.pallas.chip import Chip
from tests.perf import peers
from tests.perf.measure import Case, mismatches, relative_error
from tests.perf.sizes import Sizes

EPS = 1e-5
_SCALING = 2.5


def norm_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """Norm and quantization: of rows alone, as a step begins; with a residual add, as layers of prefill
    steps have it, and of decode steps only where XLA sums over devices; in the kernel that sums itself, here
    over one, as a layer's attention ends in a decode step."""
    width, on = sizes.hidden, {"eps": EPS, "chip": chip, "interpret": interpret}

    def draw(num_layers: int, num_rows: int, key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        x, added = (jax.random.normal(k, (num_rows, width), jnp.bfloat16) for k in keys[:2])
        return x, added, 1 + jax.random.normal(keys[2], (num_layers, width), jnp.bfloat16) / 4

    def first(operands: Any, layer: int) -> tuple[Any, ...]:
        x, _, weight = operands
        # Of the rows themselves, an output would be a copy.
        return norm.add_norm_quantize(x, None, weight, layer, **on)[1:4]

    def add(operands: Any, layer: jax.Array) -> norm.NormedRows:
        x, added, weight = operands
        return norm.add_norm_quantize(x, added, weight, layer, **on)

    def summed(operands: Any, layer: jax.Array) -> norm.NormedRows:
        x, added, weight = operands
        return all_reduce.all_reduce_add_norm(added, x, weight, layer, num_devices=1, **on)

    def reference(is_sum: bool, operands: Any, layer: jax.Array) -> norm.NormedRows:
        x, added, weight = operands
        return normed(x, added if is_sum else None, weight, layer)

    kinds = (
        ("norm.add_norm_quantize, first", first),
        ("norm.add_norm_quantize", add),
        ("all_reduce.all_reduce_add_norm", summed),
    )
    for (name, step), num_rows in itertools.product(kinds, sizes.tokens):
        is_prefill, is_sum = num_rows == sizes.prefill, step is not first
        if step is not add and num_rows > all_reduce.MAX_ROWS:
            continue
        num_layers = sizes.layers if is_sum else sizes.layers // 2
        numbers = 2 + 2 + 1 + (2 + 2) * is_sum
        yield Case(
            kernel=name,
            shape=f"T={num_rows}" + ", 1 device" * (step is summed),
            draw=partial(draw, num_layers, num_rows),
            num_layers=num_layers,
            step=step,
            reference=partial(reference, is_sum),
            errors=norm_errors if is_sum else _first_errors,
            tolerance=1e-3,
            bytes=num_rows * width * numbers + 2 * width,
            phase="prefill" if is_prefill else "" if step is add else "decode",
            knows_layer=not is_sum,
            alternatives={"XLA": partial(reference, is_sum)},
            # What torch.compile makes of a sum is told once.
            peers=peers.norm(
                num_rows, width, is_sum=is_sum, is_compiled=step is not add or is_prefill
            ),
        )


def normed(
    residual: jax.Array, added: jax.Array | None, weight: jax.Array, layer: jax.Array
) -> Any:
    """Their sum, if there is one, its norm by a layer's weights, and that quantized."""
    residual = residual if added is None else residual + added
    wide = residual.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    made = wide.astype(residual.dtype) * lax.dynamic_index_in_dim(weight, layer)
    return norm.NormedRows(residual, made, *quantize_rows(made))


def norm_errors(got: Any, expected: Any) -> dict[str, jax.Array]:
    """Of norm.NormedRows; what is quantized is held against the kernel's own rows."""
    values, scale = quantize_rows(got.normed)
    return {
        "residual": relative_error(got.residual, expected.residual),
        "normed": relative_error(got.normed, expected.normed),
        "values": mismatches(got.values, values),
        "scale": relative_error(got.scale, scale),
    }


def _first_errors(got: Any, expected: Any) -> dict[str, jax.Array]:
    return norm_errors(norm.NormedRows(expected.residual, *got), expected)


def router_cases(sizes: Sizes, chip: Chip, interpret: bool) -> Iterator[Case]:
    """The router of a prefill step; those of decode steps sort in the same kernel (expert_cases)."""
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

    for num_rows in sizes.tokens if interpret else (sizes.prefill,):
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
            phase="prefill",
            alternatives={"XLA": in_bfloat16},
        )
