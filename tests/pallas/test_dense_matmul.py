"""The FP8 linear layer as a kernel, interpreted on a CPU, against the same product in float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.pallas.chip import Architecture, Chip
from glm_jax.pallas.dense_matmul import default_config, matmul
from glm_jax.pallas.fp8_product import FP8
from glm_jax.pallas.tiling import TuningConfig
from tests.pallas.compiled import Program, compile_programs, needs_compiler

ROWS: dict[Architecture, int] = {"sm90": 64, "sm100": 128}
ARCHITECTURES: tuple[Architecture, ...] = ("sm90", "sm100")


class Operands(NamedTuple):
    x: jax.Array
    x_scale: jax.Array
    values: jax.Array
    scale: jax.Array
    bias: jax.Array


def random_operands(seed: int, num_tokens: int, width: int, num_rows: int) -> Operands:
    keys = jax.random.split(jax.random.key(seed), 5)
    return Operands(
        jax.random.normal(keys[0], (num_tokens, width)).astype(FP8),
        jax.random.uniform(keys[1], (num_tokens, 1), minval=0.5, maxval=2.0),
        jax.random.normal(keys[2], (2, num_rows, width)).astype(FP8),
        jax.random.uniform(keys[3], (2, num_rows), minval=0.5, maxval=2.0),
        jax.random.normal(keys[4], (2, num_rows)).astype(jnp.bfloat16) * 8,
    )


def reference(operands: Operands, layer: int, *, has_bias: bool) -> np.ndarray:
    x, x_scale, values, scale, bias = (np.asarray(operand, np.float32) for operand in operands)
    out = (x * x_scale) @ (values[layer] * scale[layer][:, None]).T
    return out + bias[layer] if has_bias else out


def assert_close(out: jax.Array, expected: np.ndarray) -> None:
    """To bfloat16's rounding, element by element, and to 1e-3 in what 16 elements average to."""
    out_array = np.asarray(out, np.float32)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(out_array, expected, rtol=2**-8, atol=1e-5 * largest)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("seed", "num_tokens", "width", "num_rows"),
    [(0, 1, 192, 64), (1, 20, 384, 192), (2, 16, 128, 128)],
)
def test_default_tiles_meet_the_product_for_any_number_of_tokens(
    architecture: Architecture, seed: int, num_tokens: int, width: int, num_rows: int
) -> None:
    chip = Chip(architecture, 3)
    operands = random_operands(seed, num_tokens, width, num_rows)
    for has_bias in (False, True):
        out = matmul(
            *operands[:4],
            operands.bias if has_bias else None,
            jnp.int32(seed % 2),
            chip=chip,
            interpret=True,
        )
        assert out.dtype == jnp.bfloat16
        assert_close(out, reference(operands, seed % 2, has_bias=has_bias))


@pytest.mark.parametrize(
    "architecture",
    # The interpreter takes a tcgen05 product's barrier as that product's alone: it is of all before it.
    ["sm90", pytest.param("sm100", marks=pytest.mark.order_misread)],
)
def test_two_warpgroups_share_a_tile_whose_rows_and_tokens_end_early(
    architecture: Architecture,
) -> None:
    rows = ROWS[architecture]
    operands = random_operands(3, 19, 320, 3 * 64)
    config = TuningConfig(tokens=16, rows=rows, warpgroups=2, stages=2)
    out = matmul(*operands, jnp.int32(1), chip=Chip(architecture, 2), config=config, interpret=True)
    assert_close(out, reference(operands, 1, has_bias=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_token_has_the_same_bits_alone_and_in_any_tiling(architecture: Architecture) -> None:
    chip = Chip(architecture, 3)
    rows = ROWS[architecture]
    operands = random_operands(4, 18, 256, 128)
    layer = jnp.int32(0)
    together = matmul(*operands, layer, chip=chip, interpret=True)
    alone = matmul(
        operands.x[17:], operands.x_scale[17:], *operands[2:], layer, chip=chip, interpret=True
    )
    np.testing.assert_array_equal(np.asarray(alone[0]), np.asarray(together[17]))
    for config in (
        TuningConfig(tokens=32, rows=rows, fill=64, stages=3),
        TuningConfig(tokens=16, rows=rows, stages=2, step=512),
        TuningConfig(tokens=8, rows=rows, stages=2, ctas_per_sm=2, is_fed_by_warp=True),
        TuningConfig(tokens=32, rows=rows, stages=2, store=16),
        *([TuningConfig(tokens=40, rows=rows, stages=2)] if architecture == "sm90" else []),
    ):
        otherwise = matmul(*operands, layer, chip=chip, config=config, interpret=True)
        np.testing.assert_array_equal(np.asarray(otherwise), np.asarray(together))


def test_warpgroups_that_take_turns_make_the_same_bits() -> None:
    chip = Chip("sm90", 2)
    # Twelve tiles of 64 rows or eight of 128 for two CTAs, whose rings begin anew amid a tile.
    operands = random_operands(8, 100, 640, 192)
    on = {"chip": chip, "interpret": True}
    together = matmul(*operands, jnp.int32(1), **on)
    assert_close(together, reference(operands, 1, has_bias=True))
    for rows, stages, is_fed_by_warp in ((64, 3, False), (128, 2, True)):
        config = TuningConfig(
            tokens=32, rows=rows, warpgroups=2, stages=stages, takes_turns=True,
            is_fed_by_warp=is_fed_by_warp,
        )  # fmt: skip
        otherwise = matmul(*operands, jnp.int32(1), config=config, **on)
        np.testing.assert_array_equal(np.asarray(otherwise), np.asarray(together))
    with pytest.raises(NotImplementedError, match="not on sm100"):
        matmul(*operands, jnp.int32(1), chip=Chip("sm100", 2), config=config, interpret=True)
    with pytest.raises(ValueError, match="takes_turns is for two warpgroups"):
        TuningConfig(tokens=16, rows=64, takes_turns=True)


def test_tiles_of_256_tokens_are_stored_in_pieces_to_the_same_bits() -> None:
    operands = random_operands(9, 300, 256, 192)
    on: Any = {"chip": Chip("sm90", 2), "interpret": True}
    config = TuningConfig(
        tokens=256, rows=64, warpgroups=2, stages=2, store=64, is_fed_by_warp=True
    )
    out = matmul(*operands, jnp.int32(1), config=config, **on)
    assert_close(out, reference(operands, 1, has_bias=True))
    few = operands._replace(x=operands.x[:18], x_scale=operands.x_scale[:18])
    alone = matmul(*few, jnp.int32(1), **on)
    np.testing.assert_array_equal(np.asarray(out[:18]), np.asarray(alone))


def test_neighbors_that_are_not_a_number_stay_where_they_are() -> None:
    operands = random_operands(5, 17, 192, 64)
    clean = matmul(*operands, jnp.int32(1), chip=Chip("sm90", 2), interpret=True)
    poisoned = operands._replace(
        x=operands.x.at[3].set(jnp.nan),
        values=operands.values.at[0].set(jnp.nan),
        scale=operands.scale.at[0].set(jnp.nan),
    )
    out = matmul(*poisoned, jnp.int32(1), chip=Chip("sm90", 2), interpret=True)
    assert np.isnan(np.asarray(out[3], np.float32)).all()
    others = np.delete(np.arange(17), 3)
    np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])


def test_unsupported_shapes_and_mistaken_tilings_are_refused() -> None:
    operands = random_operands(6, 2, 24, 64)
    with pytest.raises(NotImplementedError, match="K and N must be multiples of 64"):
        matmul(*operands, jnp.int32(0), chip=Chip("sm90", 2), interpret=True)
    with pytest.raises(ValueError, match="tokens=12"):
        TuningConfig(tokens=12, rows=64)
    with pytest.raises(ValueError, match="rows=32"):
        TuningConfig(tokens=16, rows=32)
    with pytest.raises(ValueError, match="fill=32"):
        TuningConfig(tokens=16, rows=64, warpgroups=2, fill=32)
    with pytest.raises(ValueError, match="store=24"):
        TuningConfig(tokens=64, rows=64, store=24)
    with pytest.raises(ValueError, match="step=192"):
        TuningConfig(tokens=16, rows=64, step=192)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("num_rows", "width"), [(1792, 5120), (5120, 1536)])
def test_tiles_of_a_decode_step_give_the_sms_work(
    architecture: Architecture, num_rows: int, width: int
) -> None:
    chip = Chip(architecture, 132)
    share = 3 if architecture == "sm100" else 2.4
    for num_tokens in (1, 64):
        config = default_config(chip, num_tokens, num_rows, width)
        tiles = -(-num_rows // config.tile_rows) * -(-num_tokens // config.tokens)
        assert chip.num_cores / share <= tiles <= chip.num_cores


@pytest.mark.parametrize("num_rows", [192, 1792, 5120, 24576])
def test_every_step_of_few_tokens_is_cut_so_that_its_stages_fit(num_rows: int) -> None:
    for num_tokens in range(1, 513):
        config = default_config(Chip("sm90", 132), num_tokens, num_rows, 5120)
        rows = config.tile_rows if config.is_compact else 64 * config.warpgroups
        stage = (rows + config.tokens) * config.step
        read_on = (64 * config.warpgroups - rows) * config.step
        staged = 2 * config.tokens * config.rows * config.warpgroups
        assert config.stages >= 5
        assert stage * config.stages + read_on + staged <= 217 * 1024


def programs_of_decode(chip: Chip) -> dict[str, Program]:
    """The projections of decode steps on one device of eight, for which tiles are of several kinds."""

    def program(tokens: int, num_rows: int, width: int) -> Program:
        def product(*operands: jax.Array) -> jax.Array:
            x, x_scale, values, scale, layer = operands
            return matmul(x, x_scale, values, scale, None, layer, chip=chip)

        shapes = (((tokens, width), FP8), ((tokens, 1), jnp.float32), ((92, num_rows, width), FP8),
                  ((92, num_rows), jnp.float32), ((), jnp.int32))  # fmt: skip
        return product, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)

    return {
        f"{name} {tokens}": program(tokens, *shape)
        for name, shape in {"qkv": (1792, 5120), "o": (5120, 1536), "gate_up": (3072, 5120)}.items()
        for tokens in (1, 16, 64, 128, 256)
    }


@needs_compiler
@pytest.mark.slow
def test_no_tile_of_a_decode_step_spills() -> None:
    for name, (kernel,) in compile_programs("h200", programs_of_decode).items():
        assert not kernel.uses_local_memory, f"{name}: {kernel}"
        assert kernel.shared <= 227 * 1024, f"{name}: {kernel}"
