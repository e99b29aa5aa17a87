"""Decode attention in one kernel gives the bits of the two that it stands in for, call after call.

Only a GPU has the counters by which the last CTA of a row knows that it is; elsewhere both bodies are
tested as kernels apart.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array

from glm_jax import ops
from glm_jax.fp8 import FP8
from glm_jax.pallas import decode_attention
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.decode_attention import TuningConfig
from tests.pallas.test_decode_attention import assert_as_close_as_rounding, some_step

pytestmark = pytest.mark.gpu

CHIP = Chip("sm90", 132)
LENGTHS = (0, 1, 64, 511, 512, 513, 1024, 1025, 1537, 2049, 5000, 8192)
REPEATS = 20


def attended(config: TuningConfig, is_whole: bool, *step: Array) -> tuple[Any, Array]:
    """Values and scales of the last of several calls, and how many were not those of the call before."""
    q = step[0]
    counters = (
        decode_attention.make_counters(q.shape[0] * q.shape[1], q.shape[2]) if is_whole else None
    )

    def again(number: Array, before: tuple[Any, Array]) -> tuple[Any, Array]:
        (values, scale), moved = before
        now = decode_attention.attend_quantized(*step, chip=CHIP, config=config, counters=counters)
        is_new = jnp.any(in_bits(now[0]) != in_bits(values)) | jnp.any(now[1] != scale)
        return now, moved + (is_new & (number > 0)).astype(jnp.int32)

    rows, kv_heads = q.shape[0] * q.shape[1], q.shape[2]
    nothing = jnp.zeros((rows, kv_heads, q.shape[3] * q.shape[4]), FP8), jnp.zeros((rows, kv_heads))
    return lax.fori_loop(0, REPEATS, again, (nothing, jnp.int32(0)))


def in_bits(values: Array) -> Array:
    return lax.bitcast_convert_type(values, jnp.uint8)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_the_bits_are_those_of_two_kernels(num_tokens: int) -> None:
    positions = [[max(length - 1 - t, -1) for t in range(num_tokens)][::-1] for length in LENGTHS]
    step = some_step(1, positions, 1, 12, 64, FP8)
    # Rows that are cut into leaves, into splits and into pairs of splits; and one kernel for splits only.
    mixed = TuningConfig(leaf_to=36, pair_from=48)
    ways = mixed, replace(mixed, leaf_rows=0) if num_tokens == 1 else replace(mixed, alone_to=0)
    (values, scale), moved = jax.jit(partial(attended, TuningConfig(leaf_rows=0), False))(*step)
    assert moved == 0
    for way in ways:
        (one_values, one_scale), moved = jax.jit(partial(attended, way, True))(*step)
        assert moved == 0, way
        np.testing.assert_array_equal(one_scale, scale)
        np.testing.assert_array_equal(in_bits(one_values), in_bits(values))


def test_answers_are_the_references() -> None:
    step = some_step(2, [[length - 1] for length in LENGTHS], 1, 12, 64, FP8)

    def attend(*step: Array) -> Array:
        counters = decode_attention.make_counters(len(LENGTHS), 1)
        return decode_attention.attend(*step, chip=CHIP, counters=counters)

    assert_as_close_as_rounding(jax.jit(attend)(*step), ops.paged_attention(*step))
