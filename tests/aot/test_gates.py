"""The full model, compiled for GPUs that are not there: what its steps may cost, and no more.

exceptions.json holds what does not hold yet; an exception that is no longer needed fails as well.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import sharding
from glm_jax import steps as steps_module
from glm_jax.aot import gates
from glm_jax.aot.findings import Collective, Findings, find
from glm_jax.aot.gates import Violation, check
from glm_jax.aot.graphs import Graphs, compile_with_graphs
from glm_jax.aot.memory import Limits, shapes_for
from glm_jax.aot.presets import find_config
from glm_jax.aot.topology import mesh_of
from glm_jax.config import ModelConfig
from glm_jax.kernels import Kernels
from glm_jax.phases import Slots
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import WeightSpec, all_reduce
from glm_jax.steps import (
    DEFAULT_OPTIONS,
    StepOptions,
    StepSpecs,
    lower,
    slot_shapes,
    step_specs,
)
from glm_jax.targets.target import Target, parse_target
from tests.glm_jax.tiny import make_config

BF16 = np.dtype(ml_dtypes.bfloat16)
# The longest sequences of which 256 must fit.
LENGTHS = {"b200x8": 8192, "h200x8": 4096}
EXCEPTIONS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "exceptions.json").read_text()
)
STEPS: dict[str, tuple[Phase, int]] = {
    "decode 1": ("decode", 1),
    "decode 64": ("decode", 64),
    "decode 256": ("decode", 256),
    "prefill 8192": ("prefill", 64),
}


pytestmark = pytest.mark.usefixtures("without_compilation_cache")


def violations_of(
    config: ModelConfig,
    shapes: StepShapes,
    target: Target,
    phase: Phase,
    rows: int,
    options: StepOptions = DEFAULT_OPTIONS,
) -> list[Violation]:
    lowered = lower(config, shapes, mesh_of(target), BF16, phase, rows, options)
    compiled, graphs = compile_with_graphs(lowered, is_gpu=True)
    specs = step_specs(config, shapes, BF16, options)
    findings = find(compiled, specs, target.num_devices, graphs)
    return check(findings, config, shapes, specs, phase, target)


@functools.cache
def full_size(target: str, step: str) -> list[Violation]:
    """In a process of its own: within one, Mosaic hands what it compiled for a GPU to any other."""
    program = (
        "import dataclasses, json, sys; from glm_jax.aot.topology import stay_off_devices; "
        "stay_off_devices(); from tests.aot import test_gates; "
        "found = test_gates.compile_full_size(*sys.argv[1:]); "
        "print(json.dumps([dataclasses.asdict(each) for each in found]))"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, target, step],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return [Violation(**each) for each in json.loads(child.stdout.splitlines()[-1])]


def compile_full_size(target: str, step: str) -> list[Violation]:
    config, parsed = find_config("glm-4.7"), parse_target(target)
    limits = Limits(max_concurrency=256, max_seq_len=LENGTHS[target], max_batch_tokens=8192)
    shapes = shapes_for(config, parsed, BF16, BF16, limits)
    assert shapes.num_pages * shapes.page_size == 256 * LENGTHS[target]
    return violations_of(config, shapes, parsed, *STEPS[step])


def excepted(target: str, step: str) -> set[tuple[str, str]]:
    return {
        (each["gate"], each["op"])
        for each in EXCEPTIONS
        if step in each["steps"] and target in each.get("targets", [target])
    }


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("target", LENGTHS)
def test_the_full_size_step_keeps_every_gate_but_those_excepted(target: str, step: str) -> None:
    found = full_size(target, step)
    allowed = excepted(target, step)
    broken = [each for each in found if (each.gate, each.op) not in allowed]
    assert not broken
    needless = allowed - {(each.gate, each.op) for each in found}
    assert not needless, "no longer needed: remove it from exceptions.json"


def test_every_exception_is_dated_and_says_what_it_waits_for() -> None:
    for each in EXCEPTIONS:
        assert each["since"][:2] == "20" and len(each["since"]) == 10 and len(each["why"]) > 20
        assert set(each["steps"]) <= STEPS.keys()


# The plants: each is a fault that a change could bring in, and the gate that must see it.

TINY_TARGET = parse_target("b200x2")
# One layer, so that a reference has nothing to slice it out of; its kernels are none of these gates'.
TINY = make_config(
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_key_value_heads=2,
    num_attention_heads=4,
    n_routed_experts=4,
)
REFERENCES = StepOptions(kernels=Kernels(allow_reference=True, fused_all_reduce=False))
TINY_SHAPES = StepShapes(
    num_slots=4,
    num_pages=64,
    page_size=16,
    max_seq_len=64,
    prefill_tile=16,
    prefill_buckets=(1,),
    decode_buckets=(4,),
)


def tiny_gates() -> set[str]:
    found = violations_of(TINY, TINY_SHAPES, TINY_TARGET, "decode", 4, REFERENCES)
    return {each.gate for each in found}


@pytest.mark.slow
def test_an_unharmed_step_breaks_no_gate() -> None:
    # The references that stand in for kernels here turn and slice what they multiply with.
    assert tiny_gates() <= {gates.NO_WEIGHT_COPY}


@pytest.mark.slow
def test_a_loop_that_the_host_turns_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "_IN_GRAPHS", ["FUSION", "CUSTOM_CALL"])
    assert gates.ONE_GRAPH in tiny_gates()


@pytest.mark.slow
def test_a_sum_in_float32_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_float32(x: jax.Array) -> jax.Array:
        return all_reduce(x.astype(jnp.float32)).astype(x.dtype)

    monkeypatch.setattr(sharding, "sum_in_order", in_float32)
    assert gates.BF16_SUMS in tiny_gates()


@pytest.mark.slow
def test_a_third_sum_in_a_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    once = sharding.sum_in_order
    monkeypatch.setattr(sharding, "sum_in_order", lambda x: all_reduce(jnp.tanh(once(x))))
    assert gates.TWO_SUMS in tiny_gates()


@pytest.mark.slow
def test_a_cache_that_is_not_donated_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = jax.jit

    def forgetful(function: Callable[..., Any], **options: Any) -> Any:
        kept: Any = options | {"donate_argnums": ()}
        return jit(function, **kept)

    monkeypatch.setattr(steps_module.jax, "jit", forgetful)
    found = tiny_gates()
    assert gates.CACHE_IN_PLACE in found and gates.NO_CACHE_COPY in found


def findings_of(**changed: Any) -> Findings:
    """Of a step of one layer that breaks no gate, but for what is changed."""
    sums = Collective("all-reduce", "bf16", 512, 3)
    shape = step_specs(TINY, TINY_SHAPES, BF16).cache.shape
    kv_bytes = 2 * 2 * int(np.prod(shape)) // TINY_TARGET.num_devices
    slots = sum(4 * int(np.prod(shape)) for shape in slot_shapes(TINY_SHAPES))
    fields: dict[str, Any] = {
        "collectives": (sums,),
        "copies": (),
        "fused_sums": 0,
        "kernels": 20,
        "turn_kernels": ("kernel",) * (gates.MAX_LAYER_KERNELS + gates.MAX_TURN_KERNELS),
        "layers_a_turn": 1,
        "graphs": Graphs(1, 0),
        "argument_bytes": 10**6,
        "aliased_bytes": kv_bytes + slots,
        "temporary_bytes": 10**6,
    }
    return Findings(**(fields | changed))


def broken_by(**changed: Any) -> list[Violation]:
    specs = step_specs(TINY, TINY_SHAPES, BF16)
    return check(findings_of(**changed), TINY, TINY_SHAPES, specs, "decode", TINY_TARGET)


def test_a_kernel_too_many_is_caught_and_all_are_named() -> None:
    assert not broken_by()
    several = 4
    number = several * gates.MAX_LAYER_KERNELS + gates.MAX_TURN_KERNELS
    names = tuple(f"kernel {each}" for each in range(number + 1))
    assert not broken_by(turn_kernels=names[:-1], layers_a_turn=several)
    (violation,) = broken_by(turn_kernels=names, layers_a_turn=several)
    assert violation.gate == gates.FEW_KERNELS and all(name in violation.detail for name in names)


def test_a_fused_sum_is_a_sum() -> None:
    only_the_embedding = (Collective("all-reduce", "bf16", 512, 1),)
    assert not broken_by(collectives=only_the_embedding, fused_sums=2)
    assert [each.gate for each in broken_by(fused_sums=1)] == [gates.TWO_SUMS]


def test_a_sum_in_order_is_an_all_to_all_and_a_gather() -> None:
    embedding = Collective("all-reduce", "bf16", 512, 1)
    shares, whole = (
        Collective("all-to-all", "bf16", 64, 2),
        Collective("all-gather", "bf16", 512, 2),
    )
    logits = Collective("all-gather", "f32", 4096, 1)
    assert not broken_by(collectives=(embedding, shares, whole, logits))
    wide = (embedding, Collective("all-to-all", "f32", 128, 2), whole, logits)
    assert [each.gate for each in broken_by(collectives=wide)] == [gates.BF16_SUMS]
    for more in (whole, logits):
        found = broken_by(collectives=(embedding, shares, whole, logits, more))
        assert {each.gate for each in found} == {gates.NO_OTHER_TRAFFIC}
    alone = broken_by(collectives=(embedding, shares, logits, whole), fused_sums=1)
    assert [each.gate for each in alone] == [gates.TWO_SUMS]


def test_a_launch_beside_the_graph_is_caught() -> None:
    for graphs in (Graphs(2, 0), Graphs(1, 1), Graphs(0, 30)):
        assert [each.gate for each in broken_by(graphs=graphs)] == [gates.ONE_GRAPH]


# A step in small: layers of experts, a cache, and two ways to walk over them.

LAYERS, EXPERTS, WIDTH = 6, 4, 512


def miniature(body: Callable[[jax.Array, jax.Array], jax.Array]) -> Findings:
    mesh = mesh_of(TINY_TARGET)
    stack = WeightSpec((LAYERS, EXPERTS, WIDTH, WIDTH), BF16, ("layers", "experts", None, None))
    cache = WeightSpec((LAYERS, 8, 2, 16, 32), BF16, ("layers", "pages", "kv_heads", None, None))
    routers = WeightSpec((LAYERS, EXPERTS, WIDTH), BF16, ("layers", None, "embed"))
    weights = {"layers.moe.experts.gate_up_proj.values": stack, "layers.moe.gate.weight": routers}
    number: Any = WeightSpec((8,), np.dtype(np.int32), (None,))
    specs = StepSpecs(weights, cache, Slots(number, number, number))
    spread, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    step = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=(spread, whole), out_specs=whole, check_vma=False)
    )
    compiled = step.lower(
        jax.ShapeDtypeStruct(stack.shape, BF16, sharding=NamedSharding(mesh, spread)),
        jax.ShapeDtypeStruct((8, WIDTH), BF16, sharding=NamedSharding(mesh, whole)),
    ).compile()
    return find(compiled, specs, TINY_TARGET.num_devices)


def product(weight: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.einsum("td,efd->etf", x, weight)).sum(0)


def copied_experts(body: Callable[[jax.Array, jax.Array], jax.Array]) -> list[str]:
    return [copy.how for copy in miniature(body).copies if copy.path.startswith("layers.moe")]


def test_a_scan_over_weight_slices_is_caught() -> None:
    def scanned(stack: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, weight: (product(weight, x), None), x, stack)[0]

    assert copied_experts(scanned)


def test_experts_converted_before_a_product_are_caught() -> None:
    def converted(stack: jax.Array, x: jax.Array) -> jax.Array:
        wide = lax.optimization_barrier(stack.astype(jnp.float32))
        return jnp.einsum("td,ledf->tf", x.astype(jnp.float32), wide).astype(x.dtype)

    assert any("convert" in how for how in copied_experts(converted))


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_the_kernels_of_a_turn_are_named_in_order(at_a_time: int) -> None:
    def layers(stack: jax.Array, x: jax.Array) -> jax.Array:
        def turn(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            for _ in range(at_a_time):
                with jax.named_scope("mix"):
                    x = lax.optimization_barrier(x * index.astype(x.dtype))
                with jax.named_scope("sum"):
                    x = all_reduce(x)
            return x, None

        return lax.scan(turn, x, jnp.arange(LAYERS // at_a_time))[0]

    found = miniature(layers)
    assert found.layers_a_turn == at_a_time
    kinds = [kind for name in found.turn_kernels for kind in ("mix", "all-reduce") if kind in name]
    assert kinds == ["mix", "all-reduce"] * at_a_time


def test_experts_read_in_place_are_no_copy() -> None:
    def in_place(stack: jax.Array, x: jax.Array) -> jax.Array:
        return x * stack.max(axis=(0, 1, 2))[None]

    assert not copied_experts(in_place)
