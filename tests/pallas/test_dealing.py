"""Tiles that CTAs come for one by one have the bits of those that are dealt evenly.

Only a GPU has the counter that they ask: interpreted, the same walk deals them round (test_grouped).
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from glm_jax.fp8 import FP8, quantize_rows
from glm_jax.pallas import dispatch, grid
from glm_jax.pallas.chip import chip_in_trace
from glm_jax.pallas.grouped_down import grouped_down
from glm_jax.pallas.tiling import TuningConfig
from tests.pallas.test_merged import FIRST, INNER, LOCAL, SHARED, assert_same_bits, repeated, run

pytestmark = pytest.mark.gpu

WIDTH = 2048


@pytest.mark.parametrize(("num_tokens", "ctas_per_sm"), [(1, 1), (64, 2), (256, 1)])
def test_down_of_tiles_that_are_come_for(num_tokens: int, ctas_per_sm: int) -> None:
    if float(jax.devices("gpu")[0].compute_capability) >= 10:
        pytest.skip("tiles are dealt on sm90 only")
    keys = jax.random.split(jax.random.key(num_tokens), 5)
    x = jax.random.normal(keys[0], (num_tokens, 128)).astype(jnp.bfloat16)
    rows = jax.random.normal(keys[1], (num_tokens * LOCAL + 32 * LOCAL, INNER)).astype(jnp.bfloat16)
    passed = jax.random.normal(keys[2], (num_tokens, SHARED)).astype(jnp.bfloat16)
    values = jax.random.normal(keys[3], (1, LOCAL, WIDTH, INNER)).astype(FP8)
    shared = jax.random.normal(keys[4], (1, WIDTH, SHARED)).astype(FP8)
    picks = jnp.arange(num_tokens * 4).reshape(num_tokens, 4) % (2 * LOCAL)

    def body(is_dealt: bool, *operands: Array) -> Any:
        x, rows, passed, values, shared = operands
        chip = chip_in_trace()
        assert chip is not None
        plan = dispatch.stage(
            *quantize_rows(x), picks.astype(jnp.int32), jnp.int32(FIRST), LOCAL, chip=chip
        )
        config = TuningConfig(
            tokens=plan.tile, rows=64, fill=64, stages=2, is_dealt=is_dealt, ctas_per_sm=ctas_per_sm
        )
        counter = grid.make_counter() if is_dealt else None
        hidden, scale = quantize_rows(rows[: plan.tokens.shape[0]])

        def products() -> Any:
            return grouped_down(
                hidden, scale, plan, values, jnp.full(values.shape[:-1], 0.01), jnp.int32(0),
                shared_hidden=quantize_rows(passed)[0], shared_hidden_scale=quantize_rows(passed)[1],
                shared_values=shared, shared_scale=jnp.full(shared.shape[:-1], 0.01),
                chip=chip, config=config, dealer=counter,
            )  # fmt: skip

        outs = repeated(products) if is_dealt else products()
        return *outs, plan.num_tiles * plan.tile

    operands = x, rows, passed, values, shared
    out, shared_out, _ = run(lambda *refs: body(True, *refs), *operands)
    want, want_shared, in_use = run(lambda *refs: body(False, *refs), *operands)
    assert int(in_use[0])
    assert_same_bits(out[: int(in_use[0])], want[: int(in_use[0])])
    assert_same_bits(shared_out, want_shared)
