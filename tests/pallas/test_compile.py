"""Every kernel compiles for the GPUs it is for, at the shapes it is deployed at, as it was meant to.

Eight devices with one KV head each, 20 whole experts and an eighth of everything else; a decode step of
64 tokens and a prefill step of 8192. What is read here is PTX and ptxas' account; nothing is run.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from glm_jax.pallas import (
    all_reduce,
    decode_attention,
    dense_matmul,
    dispatch,
    grid,
    grouped_down,
    grouped_gate_up,
    inbox,
    kv_write,
    norm,
    prefill_attention,
    quantize,
    route_stage,
    router,
)
from glm_jax.pallas.chip import Chip
from glm_jax.pallas.norm import NormedRows
from glm_jax.sharding import MESH_AXIS
from tests.pallas.compiled import CompiledKernel, Program, compile_programs, needs_compiler

pytestmark = needs_compiler

HIDDEN, LAYERS, MOE_LAYERS = 5120, 92, 89
EXPERTS, LOCAL_EXPERTS, PICKS, EXPERT_WIDTH, SHARED_WIDTH = 160, 20, 8, 1536, 192
GROUPS, HEAD, PAGE, NUM_PAGES, PAGES_PER_ROW = 12, 128, 64, 1024, 128
STEPS = {"decode": 64, "prefill": 8192}
TARGETS = ("b200x8", "h200x8")
FP8, BF16, F32, I32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32, jnp.int32
PAGE_DTYPES = {"fp8": FP8, "bf16": BF16}
FP8_PRODUCTS = {"dense_matmul", "grouped_gate_up", "grouped_down"}
ATTENTION = {
    "decode_attention_split", "decode_attention_combine", "prefill_attention", "widen_pages",
}  # fmt: skip
SMALL = {"add_norm_quantize", "norm_quantize", "router_products", "router_picks", "kv_write"}
MOVERS = {
    "all_reduce_add_norm",
    "empty_inbox",
    "meet",
    "dispatch",
    "quantize_hidden",
    "router_picks_dispatch",
    "empty_products",
}
# Begin while the kernel ahead of them still runs, and read before it has ended; see launch_order.
EARLY = {
    "all_reduce_add_norm", "dense_matmul", "grouped_down", "norm_quantize", "router_picks_dispatch",
    "router_products",
}  # fmt: skip
WAITING = EARLY | {
    "add_norm_quantize", "dispatch", "grouped_gate_up", "quantize_hidden", "router_picks",
}  # fmt: skip
REGISTERS_OF_AN_SM = 65536
SHARED_MEMORY_OF_A_CTA = 227 * 1024

spec = jax.ShapeDtypeStruct
LAYER = spec((), I32)


def small_programs(chip: Chip) -> dict[str, Program]:
    """Norms, the sum over devices, the router, and the KV write."""
    programs: dict[str, Program] = {}
    route = partial(
        router.route,
        num_experts_per_tok=PICKS,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        chip=chip,
    )
    for step, tokens in STEPS.items():
        rows, weight = spec((tokens, HIDDEN), BF16), spec((LAYERS, HIDDEN), BF16)
        add_norm = partial(norm.add_norm_quantize, eps=1e-5, chip=chip)
        programs[f"norm {step}"] = add_norm, (rows, rows, weight, LAYER)
        programs[f"first norm {step}"] = partial(_first_norm, add_norm), (rows, weight)
        router_weights = spec((MOE_LAYERS, EXPERTS, HIDDEN), BF16), spec((MOE_LAYERS, EXPERTS), F32)
        programs[f"router {step}"] = route, (rows, *router_weights, LAYER)
        batch = (tokens, 1) if step == "decode" else (1, tokens)
        head_norms = (spec((LAYERS, HEAD), BF16),) * 2
        write = partial(kv_write.write, eps=1e-5, rotary_dim=64, theta=1e6, chip=chip)
        for kind, dtype in PAGE_DTYPES.items():
            pages = spec((LAYERS, NUM_PAGES, 1, PAGE, HEAD), dtype)
            places = spec(batch, I32), spec((batch[0], PAGES_PER_ROW), I32), LAYER
            qkv = spec((*batch, 1, GROUPS + 2, HEAD), BF16)
            programs[f"kv_write {step} {kind}"] = (
                write,
                (qkv, *head_norms, *places, pages, pages),
            )
    rows, weight = spec((STEPS["decode"], HIDDEN), BF16), spec((LAYERS, HIDDEN), BF16)
    reduce = partial(all_reduce.all_reduce_add_norm, eps=1e-5, num_devices=8, chip=chip)
    programs["all_reduce"] = partial(_sum, reduce), (rows, rows, weight, LAYER)
    summands = (
        spec((800, HIDDEN), BF16),
        rows,
        spec((STEPS["decode"], PICKS), I32),
        spec((STEPS["decode"], PICKS), F32),
    )
    programs["all_reduce of experts"] = partial(_sum_experts, reduce), (
        *summands, rows, weight, LAYER,
    )  # fmt: skip
    return programs


def _first_norm(add_norm: Callable[..., NormedRows], rows: Array, weight: Array) -> NormedRows:
    return add_norm(rows, None, weight, 0)


def _sum(
    reduce: Callable[..., NormedRows], own: Array | all_reduce.Summands, *operands: Array
) -> NormedRows:
    box = inbox.make_inbox(STEPS["decode"], HIDDEN, axis_name=MESH_AXIS, num_devices=8)
    return reduce(own, *operands, inbox=box)


def _sum_experts(reduce: Callable[..., NormedRows], *operands: Array) -> NormedRows:
    return _sum(reduce, all_reduce.Summands(*operands[:4]), *operands[4:])


def merged_programs(chip: Chip) -> dict[str, Program]:
    """Kernels whose CTAs wait for each other: routing with sorting, down with quantization."""
    tokens = STEPS["decode"]
    rows = spec((tokens, HIDDEN), FP8), spec((tokens, 1), F32)
    routed = (
        spec((tokens, HIDDEN), BF16),
        *rows,
        spec((MOE_LAYERS, EXPERTS, HIDDEN), BF16),
        spec((MOE_LAYERS, EXPERTS), F32),
        LAYER,
    )
    hidden = (
        *rows,
        spec((tokens, PICKS), I32),
        spec((MOE_LAYERS, LOCAL_EXPERTS, 2, EXPERT_WIDTH, HIDDEN), FP8),
        spec((MOE_LAYERS, LOCAL_EXPERTS, 2, EXPERT_WIDTH), F32),
        spec((MOE_LAYERS, 2, SHARED_WIDTH, HIDDEN), FP8),
        spec((MOE_LAYERS, 2, SHARED_WIDTH), F32),
        spec((MOE_LAYERS, LOCAL_EXPERTS, HIDDEN, EXPERT_WIDTH), FP8),
        spec((MOE_LAYERS, LOCAL_EXPERTS, HIDDEN), F32),
        spec((MOE_LAYERS, HIDDEN, SHARED_WIDTH), FP8),
        spec((MOE_LAYERS, HIDDEN), F32),
        LAYER,
    )
    return {
        "route and stage": (partial(_route_and_stage, chip), routed),
        "down, quantizing": (partial(_quantizing_down, chip), hidden),
    }


def _route_and_stage(
    chip: Chip, x: Array, values: Array, scale: Array, weight: Array, bias: Array, layer: Array
) -> Array:
    choice = router.Choice(EXPERTS, PICKS, norm_topk_prob=True, routed_scaling_factor=2.5)
    local = route_stage.Local(jnp.int32(0), LOCAL_EXPERTS)
    memory = route_stage.make_memory(STEPS["decode"], HIDDEN, LOCAL_EXPERTS, chip)
    _, weights, plan = route_stage.route_and_stage(
        x, (values, scale), weight, bias, layer, choice, local, memory, chip=chip
    )
    return weights.sum() + plan.rows.sum().astype(F32)


def _quantizing_down(chip: Chip, x: Array, x_scale: Array, picks: Array, *operands: Array) -> Array:
    gate_up, gate_up_scale, shared, shared_scale, *of_down, layer = operands
    down, down_scale, shared_down, shared_down_scale = of_down
    counter = grid.make_counter()
    plan = dispatch.stage(x, x_scale, picks, jnp.int32(0), LOCAL_EXPERTS, chip=chip)
    routed, passed = grouped_gate_up.grouped_gate_up(
        x, x_scale, plan, gate_up, gate_up_scale, layer, shared_values=shared,
        shared_scale=shared_scale, chip=chip, counter=counter,
    )  # fmt: skip
    out, shared_out = grouped_down.grouped_down(
        routed, None, plan, down, down_scale, layer, shared_hidden=passed, shared_values=shared_down,
        shared_scale=shared_down_scale, chip=chip, counter=counter,
    )  # fmt: skip
    assert shared_out is not None
    return out.sum() + shared_out.sum()


def product_programs(chip: Chip) -> dict[str, Program]:
    """The dense layers' products, and the experts' from their picks to their answers."""
    programs: dict[str, Program] = {}
    shapes = {"qkv": (1792, HIDDEN), "o": (HIDDEN, 1536)}
    for step, tokens in STEPS.items():
        for name, (rows, width) in shapes.items():
            operands = [
                spec((tokens, width), FP8),
                spec((tokens, 1), F32),
                spec((LAYERS, rows, width), FP8),
                spec((LAYERS, rows), F32),
                spec((LAYERS, rows), BF16),
                LAYER,
            ]
            programs[f"{name} {step}"] = partial(dense_matmul.matmul, chip=chip), tuple(operands)
        weights = [
            spec((MOE_LAYERS, LOCAL_EXPERTS, 2, EXPERT_WIDTH, HIDDEN), FP8),
            spec((MOE_LAYERS, LOCAL_EXPERTS, 2, EXPERT_WIDTH), F32),
            spec((MOE_LAYERS, LOCAL_EXPERTS, HIDDEN, EXPERT_WIDTH), FP8),
            spec((MOE_LAYERS, LOCAL_EXPERTS, HIDDEN), F32),
            spec((MOE_LAYERS, 2, SHARED_WIDTH, HIDDEN), FP8),
            spec((MOE_LAYERS, 2, SHARED_WIDTH), F32),
            spec((MOE_LAYERS, HIDDEN, SHARED_WIDTH), FP8),
            spec((MOE_LAYERS, HIDDEN), F32),
        ]
        tokens_and_picks = [
            spec((tokens, HIDDEN), FP8),
            spec((tokens, 1), F32),
            spec((tokens, PICKS), I32),
        ]
        programs[f"experts {step}"] = (
            partial(_experts, chip),
            (*tokens_and_picks, *weights, LAYER),
        )
    return programs


def _experts(chip: Chip, x: Array, x_scale: Array, picks: Array, *weights: Array) -> Array:
    gate_up, gate_up_scale, down, down_scale, *shared, layer = weights
    shared_gate_up, shared_gate_up_scale, shared_down, shared_down_scale = shared
    plan = dispatch.stage(x, x_scale, picks, jnp.int32(0), LOCAL_EXPERTS, chip=chip)
    inner, shared_inner = grouped_gate_up.grouped_gate_up(
        x,
        x_scale,
        plan,
        gate_up,
        gate_up_scale,
        layer,
        shared_values=shared_gate_up,
        shared_scale=shared_gate_up_scale,
        chip=chip,
    )
    hidden, shared_hidden = quantize.quantize_hidden(inner, shared_inner, plan)
    assert shared_hidden is not None
    out, shared_out = grouped_down.grouped_down(
        *hidden,
        plan,
        down,
        down_scale,
        layer,
        shared_hidden=shared_hidden[0],
        shared_hidden_scale=shared_hidden[1],
        shared_values=shared_down,
        shared_scale=shared_down_scale,
        chip=chip,
    )
    assert shared_out is not None
    return out.sum() + shared_out.sum()


def attention_programs(chip: Chip) -> dict[str, Program]:
    """Decode and prefill attention over pages of either dtype."""

    def operands(rows: int, tokens: int, dtype: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
        pages = spec((LAYERS, NUM_PAGES, 1, PAGE, HEAD), dtype)
        q = spec((rows, tokens, 1, GROUPS, HEAD), BF16)
        return q, pages, pages, LAYER, spec((rows, PAGES_PER_ROW), I32), spec((rows, tokens), I32)

    programs: dict[str, Program] = {}
    for kind, dtype in PAGE_DTYPES.items():
        decode = operands(STEPS["decode"], 1, jnp.dtype(dtype))
        prefill = operands(1, STEPS["prefill"], jnp.dtype(dtype))
        programs[f"decode {kind}"] = partial(decode_attention.attend, chip=chip), decode
        programs[f"prefill {kind}"] = partial(prefill_attention.attend, chip=chip), prefill
    quantized = partial(decode_attention.attend_quantized, chip=chip)
    programs["decode quantized"] = quantized, operands(STEPS["decode"], 1, jnp.dtype(FP8))
    return programs


def kernels_for(target: str) -> dict[str, CompiledKernel]:
    """Every kernel that was compiled, by program and name."""
    return {
        f"{program}: {kernel.name}": kernel
        for programs in (small_programs, merged_programs, product_programs, attention_programs)
        for program, kernels in compile_programs(target, programs).items()
        for kernel in kernels
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
class TestCompiled:
    def test_all_kernels_are_here(self, target: str) -> None:
        names = {kernel.name for kernel in kernels_for(target).values()}
        assert names == FP8_PRODUCTS | ATTENTION | SMALL | MOVERS

    def test_nothing_of_a_thread_lies_outside_its_registers(self, target: str) -> None:
        spilled = {at: str(k) for at, k in kernels_for(target).items() if k.uses_local_memory}
        assert not spilled

    def test_nothing_is_lost_where_code_is_linked(self, target: str) -> None:
        # Of prefill attention there is another form then, which test_prefill_attention has.
        kernels = {k for k in kernels_for(target).values() if k.name != "prefill_attention"}
        assert not {str(k): k.loses_when_linked for k in kernels if k.loses_when_linked}

    def test_a_cta_fits_an_sm(self, target: str) -> None:
        for at, kernel in kernels_for(target).items():
            assert 0 < kernel.registers * kernel.threads <= REGISTERS_OF_AN_SM, (at, str(kernel))
            assert kernel.shared <= SHARED_MEMORY_OF_A_CTA, (at, str(kernel))
            assert kernel.tensor_memory <= 512, (at, str(kernel))

    def test_products_run_on_the_tensor_cores_of_the_chip(self, target: str) -> None:
        is_sm100 = target.startswith("b200")
        fp8 = (
            r"tcgen05\.mma\S*kind::f8f6f4" if is_sm100 else r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3"
        )
        bf16 = r"tcgen05\.mma\S*kind::f16" if is_sm100 else r"wgmma\.mma_async\S*\.f32\.bf16\.bf16"
        for at, kernel in kernels_for(target).items():
            if kernel.name in FP8_PRODUCTS:
                assert re.search(fp8, kernel.ptx), at
            if kernel.name == "router_products":
                assert re.search(bf16, kernel.ptx), at

    def test_down_counts_what_it_quantizes_from_zero_on(self, target: str) -> None:
        kernels = kernels_for(target)
        before = kernels["down, quantizing: grouped_gate_up"].ptx
        assert len(re.findall(r"st\.global\.u32 \[\S+\], 0;", before)) == 1
        ptx = kernels["down, quantizing: grouped_down"].ptx
        # Routed groups and the shared expert's; one warp waits, and TMA reads what it waited for.
        assert len(re.findall(r"red\.release\.gpu\.global\.add\.u32", ptx)) == 2
        wait = r"ld\.acquire\.gpu\.global\.u32 now[^}]*fence\.proxy\.async;"
        assert len(re.findall(wait, ptx)) == 1

    def test_nothing_is_written_before_the_kernel_ahead_has_ended(self, target: str) -> None:
        waiting = {at: k for at, k in kernels_for(target).items() if "griddepcontrol.wait" in k.ptx}
        assert {kernel.name for kernel in waiting.values()} >= WAITING
        for at, kernel in waiting.items():
            before, after = kernel.ptx.split("griddepcontrol.wait", 1)
            touches = r"\b(st|red|atom)\.\S*global|cp\.\S*\.global\.shared"
            if kernel.name not in EARLY:
                touches += r"|\bld\.\S*global|cp\.async"
            assert not re.search(touches, before), at
            assert "griddepcontrol.launch_dependents" in after, at

    def test_picks_are_told_and_awaited_by_words_that_are_whole(self, target: str) -> None:
        ptx = kernels_for(target)["route and stage: router_picks_dispatch"].ptx
        assert len(re.findall(r"st\.relaxed\.gpu\.global\.b64", ptx)) == 1
        assert len(re.findall(r"ld\.relaxed\.gpu\.global\.b64", ptx)) == 1
