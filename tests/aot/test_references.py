"""Steps for GPUs some of whose operations have no kernel, and run as XLA makes them of the references."""

from typing import Any

import pytest

from glm_jax.aot.topology import mesh_of
from glm_jax.kernels import Kernels
from glm_jax.pallas import launch_order
from glm_jax.shapes import StepShapes
from glm_jax.steps import StepOptions, lower
from glm_jax.targets.target import parse_target
from tests.glm_jax.tiny import BF16, make_config
from tests.pallas.compiled import needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.slow,
    pytest.mark.usefixtures("without_compilation_cache"),
]

ROWS = 4
SHAPES = StepShapes(
    num_slots=ROWS,
    num_pages=8,
    page_size=64,
    max_seq_len=128,
    prefill_tile=64,
    prefill_buckets=(1,),
    decode_buckets=(ROWS,),
)


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One for each kernel that lets the next one begin, as they are traced."""
    found: list[str] = []
    launch = launch_order.plgpu.griddepcontrol_launch_dependents

    def seen() -> None:
        found.append("early")
        launch()

    monkeypatch.setattr(launch_order.plgpu, "griddepcontrol_launch_dependents", seen)
    return found


def lower_decode(target: str, kernels: Kernels, *, is_fp8: bool) -> None:
    """A layer with a dense MLP and two turns of the loop over layers of experts."""
    parsed = parse_target(target)
    heads: dict[str, Any] = {
        "num_key_value_heads": parsed.num_devices,
        "num_attention_heads": 2 * parsed.num_devices,
    }
    config = make_config(
        is_fp8=is_fp8, num_hidden_layers=9, hidden_size=256, head_dim=128, intermediate_size=128,
        n_routed_experts=8, num_experts_per_tok=8, moe_intermediate_size=128, **heads,
    )  # fmt: skip
    options = StepOptions(kernels=kernels)
    lower(config, SHAPES, mesh_of(parsed), BF16, "decode", ROWS, options)


def test_kernels_among_kernels_let_the_next_one_begin(early: list[str]) -> None:
    lower_decode("h200", Kernels(), is_fp8=True)
    assert early


@pytest.mark.parametrize("target", ["h200", "h200x2"])
def test_no_kernel_lets_the_next_one_begin_where_that_may_be_xlas(
    target: str, early: list[str]
) -> None:
    # What XLA's kernels take for constant they may read before what is ahead of them has ended.
    lower_decode(target, Kernels(allow_reference=True), is_fp8=False)
    assert not early
