"""Which kernels write keys and values in a decode step, and when others of the step may read them.

Traced for a GPU that is not there: on a CPU, references and interpreted kernels run one after the other.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from glm_jax.aot.findings import find
from glm_jax.aot.graphs import Graphs, compile_with_graphs
from glm_jax.aot.memory import Limits, shapes_for
from glm_jax.aot.presets import find_config
from glm_jax.aot.program import Program, parse_program
from glm_jax.aot.topology import mesh_of
from glm_jax.config import ModelConfig
from glm_jax.pallas import decode_attention, kv_write
from glm_jax.shapes import StepShapes
from glm_jax.steps import lower, step_specs
from glm_jax.targets.target import parse_target
from tests.pallas.compiled import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("without_compilation_cache")]

BF16 = np.dtype(ml_dtypes.bfloat16)
TARGET, ROWS, LAYERS = parse_target("h200x8"), 8, 2

# A kernel's name, of how many rows it is, and of how many tokens each.
Kernel = tuple[str, tuple[int, ...]]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """The kernels of attention, as they are traced: in the order in which they run."""
    found: list[Kernel] = []

    def watch(module: Any, name: str) -> None:
        kernel: Callable[..., Any] = getattr(module, name)

        def seen(heads: Any, *operands: Any, **options: Any) -> Any:
            found.append((name, heads.shape[:2]))
            return kernel(heads, *operands, **options)

        monkeypatch.setattr(module, name, seen)

    watch(kv_write, "write")
    watch(decode_attention, "write_and_attend")
    watch(decode_attention, "attend_quantized")
    return found


def config_of(num_layers: int) -> ModelConfig:
    """One dense layer, then layers of experts."""
    whole = find_config("glm-4.7")
    return replace(whole, num_hidden_layers=num_layers, first_k_dense_replace=1)


def shapes_of(config: ModelConfig, rows: int, num_drafts: int) -> StepShapes:
    limits = Limits(max_concurrency=rows, max_seq_len=1024, max_batch_tokens=1024)
    shapes = shapes_for(config, TARGET, BF16, BF16, limits)
    return replace(shapes, decode_buckets=(rows,), num_drafts=num_drafts)


def trace(num_drafts: int) -> None:
    config = config_of(LAYERS)
    shapes = shapes_of(config, ROWS, num_drafts)
    lower(config, shapes, mesh_of(TARGET), BF16, "decode", ROWS)


def test_rows_of_sequences_of_their_own_are_written_where_they_are_attended_to(
    traced: list[Kernel],
) -> None:
    trace(0)
    assert traced == [("write_and_attend", (ROWS, 1))] * LAYERS


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_tokens_of_a_sequence_are_all_written_before_any_attends(
    num_drafts: int, traced: list[Kernel]
) -> None:
    trace(num_drafts)
    fed = ROWS, 1 + num_drafts
    layer = [("write", fed), ("attend_quantized", fed)]
    # A row of a further guess sees itself and what earlier kernels wrote.
    further = [("write_and_attend", (ROWS, 1))] if num_drafts > 1 else []
    assert traced == layer + further + layer * LAYERS


def kinds_within(program: Program, name: str) -> set[str]:
    """The opcodes of a computation, and of those that it runs."""
    kinds: set[str] = set()
    for each in program.computations[name].values():
        kinds.add(each.opcode)
        if each.opcode in ("while", "conditional", "call"):
            kinds = kinds.union(*(kinds_within(program, called) for called in each.called))
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"num_drafts": 1}, {"num_drafts": 2}, {"num_drafts": 3}, {"decode_steps": 8}],
    ids=str,
)
def test_a_loop_that_is_unrolled_into_a_graph_of_its_own_holds_nothing_conditional(
    changes: dict[str, int],
) -> None:
    config = config_of(10)
    shapes = replace(shapes_of(config, ROWS, 0), **changes)
    lowered = lower(config, shapes, mesh_of(TARGET), BF16, "decode", ROWS)
    program = parse_program(lowered.compile().as_text() or "")
    loops = [
        each
        for instructions in program.computations.values()
        for each in instructions.values()
        # A loop of which it is not known how often it turns is a conditional itself.
        if each.opcode == "while" and each.trips is not None
    ]
    assert loops
    for loop in loops:
        within = set[str]().union(*(kinds_within(program, called) for called in loop.called))
        assert "conditional" not in within, loop.op_name


@pytest.mark.slow
def test_a_step_with_guesses_is_one_graph_that_copies_neither_weights_nor_pages() -> None:
    # Two turns of the loop over layers of experts, and one layer before them.
    config, rows = config_of(10), 32
    shapes = shapes_of(config, rows, 1)
    lowered = lower(config, shapes, mesh_of(TARGET), BF16, "decode", rows)
    compiled, graphs = compile_with_graphs(lowered, is_gpu=True)
    found = find(compiled, step_specs(config, shapes, BF16), TARGET.num_devices, graphs)
    assert (found.graphs, found.copies) == (Graphs(1, 0), ())
    # The draft's layer and the decoder's sum through the same inbox; embeddings are summed twice.
    assert found.fused_sums == 2 * (10 + 1)
    kinds = Counter[str]()
    for each in found.collectives:
        kinds[each.kind] += each.executions
    # Logits of 32 and of 64 rows change places, and the tokens chosen of them are gathered.
    assert kinds == {"all-reduce": 2, "all-to-all": 2, "all-gather": 2}
