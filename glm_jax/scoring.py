"""How likely each token of a prompt was: rows of a prefill step run again, every position told.

Knows no requests. It follows the prefill step of the same rows, finds their keys and values in the
cache, and writes the same ones there again; so it is a program apart, compiled where it is wanted.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from glm_jax import shapes as columns
from glm_jax.attention import Pages
from glm_jax.cache import CACHE_AXES, KVCache
from glm_jax.config import ModelConfig
from glm_jax.model import Glm4Moe, Weights, abstract_model, bind
from glm_jax.sampling import log_sum_exp
from glm_jax.shapes import StepShapes
from glm_jax.sharding import partition_spec, sharding_for
from glm_jax.steps import DEFAULT_OPTIONS, LOWERING, StepOptions, compiler_options, step_specs

ScoreResult = tuple[KVCache, Int32[Array, "score_outputs T"]]


def score(
    model: Glm4Moe,
    cache: KVCache,
    batch: Int32[Array, "B columns"],
    targets: Int32[Array, "B T"],
    pages_per_sequence: int,
) -> ScoreResult:
    """Log-probability and rank of the target after each position, and the likeliest tokens there.

    Args:
      batch: rows of a prefill step that was dispatched before.
      targets: the token that follows each position; where none is told, any token.

    Returns:
      The cache, and int32[NUM_SCORE_OUTPUTS, B * T] as `glm_jax.shapes` lays it out.
    """
    first = columns.NUM_FIELDS + pages_per_sequence
    table, tokens = batch[:, columns.NUM_FIELDS : first], batch[:, first:]
    offsets = jnp.arange(tokens.shape[1])[None, :]
    is_valid = offsets < batch[:, columns.NUM_TOKENS, None]
    positions = jnp.where(is_valid, batch[:, columns.START, None] + offsets, -1)
    hidden, cache_after, _ = model(tokens, positions, cache, Pages(table))
    assert cache_after is not None

    def tell(row: tuple[Array, Array]) -> Int32[Array, "score_outputs T"]:
        return _tell(model, *row)

    # One row at a time: logits of all positions would not fit beside the weights.
    told = lax.map(tell, (hidden, targets))
    return cache_after, jnp.moveaxis(told, 0, 1).reshape(told.shape[1], -1)


def _tell(
    model: Glm4Moe, hidden: Float[Array, "T D"], targets: Int32[Array, " T"]
) -> Int32[Array, "score_outputs T"]:
    logits = model.logits(hidden)
    total = log_sum_exp(logits)[:, None]
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32)
    top, top_tokens = lax.top_k(logits, min(columns.MAX_TOP_LOGPROBS, logits.shape[-1]))
    missing = ((0, columns.MAX_TOP_LOGPROBS - top.shape[-1]), (0, 0))  # of a tiny vocabulary

    def bits(logprobs: Float[Array, "T n"]) -> Int32[Array, "n T"]:
        return lax.bitcast_convert_type(logprobs, jnp.int32).T

    rows = [
        bits(own - total),
        rank[None],
        jnp.pad(top_tokens.astype(jnp.int32).T, missing),
        jnp.pad(bits(top - total), missing),
    ]
    return jnp.concatenate(rows)


def lower_score(
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    dtype: np.dtype,
    options: StepOptions = DEFAULT_OPTIONS,
) -> jax.stages.Lowered:
    """Traces the program for shapes.score_rows rows; the cache is donated, weights stay."""
    model = abstract_model(config, jnp.dtype(dtype), options.kernels)
    pages = shapes.pages_per_sequence

    def step(weights: Weights, cache: KVCache, batch: Array, targets: Array) -> ScoreResult:
        return score(bind(model, weights), cache, batch, targets, pages)

    step.__name__ = "score"
    replicated = PartitionSpec()
    specs = step_specs(config, shapes, dtype, options)
    weight_specs = {path: partition_spec(spec.axes) for path, spec in specs.weights.items()}
    cache_specs = KVCache(partition_spec(CACHE_AXES), partition_spec(CACHE_AXES))  # type: ignore[arg-type]
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(weight_specs, cache_specs, replicated, replicated),
        out_specs=(cache_specs, replicated),
        check_vma=False,
    )
    weights = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding_for(spec.axes, mesh))
        for path, spec in specs.weights.items()
    }
    spec = specs.cache
    pool = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding_for(spec.axes, mesh))

    def integers(num_columns: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, replicated)
        return jax.ShapeDtypeStruct((shapes.score_rows, num_columns), np.int32, sharding=sharding)

    how = compiler_options(mesh, options.kernels)
    function = jax.jit(sharded, donate_argnums=1, compiler_options=how)
    with LOWERING:
        return function.lower(
            weights,
            KVCache(pool, pool),  # type: ignore[arg-type]
            integers(shapes.columns("prefill")),
            integers(shapes.prefill_tile),
        )
