"""What XLA makes of sums whose kernels write into the memory of other devices."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from glm_jax.aot.topology import mesh_of
from glm_jax.pallas.all_reduce import all_reduce_add_norm
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.inbox import make_inbox
from glm_jax.sharding import MESH_AXIS
from glm_jax.targets.target import parse_target
from tests.pallas.compiled import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("without_compilation_cache")]

ROWS, WIDTH, LAYERS = 6, 5120, 4


def step(rows: Array, weight: Array) -> Array:
    """Two sums a layer, of which the first layer's stand before the loop."""
    inbox = make_inbox(ROWS, WIDTH, axis_name=MESH_AXIS, num_devices=2)

    def layer(index: Array, total: Array) -> Array:
        for _ in range(2):
            total = all_reduce_add_norm(
                total, total, weight, index, eps=1e-5, num_devices=2, chip=Chip("sm90", 132),
                inbox=inbox,
            ).residual  # fmt: skip
        return total

    return lax.fori_loop(1, LAYERS, layer, layer(jnp.int32(0), rows))


def test_slots_stay_where_peers_write_them_and_one_kernel_asks_where() -> None:
    mesh, whole = mesh_of(parse_target("h200x2")), PartitionSpec()
    sharded = jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    shapes = (ROWS, WIDTH), (LAYERS, WIDTH)
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = jax.jit(sharded).lower(*operands).compile().as_text() or ""
    slots = re.escape(f"bf16[2,2,{ROWS},{WIDTH}]")
    made = set(re.findall(rf"= {slots}\S* ([\w-]+)\(", text))
    assert made == {"get-tuple-element"}, "nothing copies them"
    # For each kernel that asks for peers' addresses, the host would tell them in every step.
    assert text.count("uses_xla_collective_metadata = true") == 1
