"""Plans: what fits, what is refused and with which advice, and the command as users run it."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from glm_jax.aot.__main__ import main
from glm_jax.aot.memory import Limits, Memory, measure, shapes_for
from glm_jax.aot.plan import Plan, make_plan
from glm_jax.aot.presets import find_config
from glm_jax.aot.report import show
from glm_jax.cache import page_bytes
from glm_jax.sizing import SizingError, weight_bytes
from glm_jax.targets.target import TargetError, parse_target

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = find_config("glm-4.7")
LIMITS = Limits(max_concurrency=256, max_seq_len=8192, max_batch_tokens=8192)


def plan(target: str = "b200x8", kv_dtype: str = "bf16", **limits: int) -> Plan:
    asked = replace(LIMITS, **limits)
    return make_plan("glm-4.7", CONFIG, parse_target(target), asked, kv_dtype, may_compile=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", "--no-compile", *arguments])


def test_memory_adds_up_and_counts_what_the_engine_counts() -> None:
    memory = plan().memory
    assert memory.weights == weight_bytes(CONFIG, BF16, 8)
    assert memory.kv == 256 * 128 * page_bytes(CONFIG, 64, BF16) // 8
    parts = (memory.weights, memory.temporaries, memory.kv, memory.reserved, memory.headroom)
    assert sum(parts) == memory.total


def test_eight_b200_hold_256_sequences_of_8192() -> None:
    made = plan()
    assert made.refusal is None and made.memory.headroom > 0
    assert made.memory.kv_tokens >= 256 * 8192
    assert made.shapes.decode_buckets[-1] == 256 and made.shapes.prefill_budget == 8192


def fitting(refusal: str | None, option: str) -> int:
    assert refusal is not None and option in refusal, refusal
    return int(refusal.split(f"{option} ")[1].split(",")[0])


def test_a_refusal_names_the_nearest_settings_and_they_do_fit() -> None:
    refusal = plan(max_concurrency=256, max_seq_len=16384).refusal
    concurrency = fitting(refusal, "--max-concurrency")
    length = fitting(refusal, "--max-seq-len")
    assert plan(max_concurrency=concurrency, max_seq_len=16384).refusal is None
    assert plan(max_concurrency=concurrency + 2, max_seq_len=16384).refusal is not None
    assert plan(max_concurrency=256, max_seq_len=length).refusal is None
    assert plan(max_concurrency=256, max_seq_len=length + 64).refusal is not None
    assert "--kv-cache-dtype fp8_e4m3" in (refusal or "")
    assert plan(kv_dtype="fp8_e4m3", max_concurrency=256, max_seq_len=16384).refusal is None


def test_too_few_devices_for_the_weights_are_told_how_many_would_do() -> None:
    refusal = plan("h100x4").refusal
    assert refusal is not None and refusal.endswith("the weights alone need h100x8")
    assert "need b200x4" in (plan("b200x2").refusal or "")


def test_devices_that_cannot_share_the_model_are_refused() -> None:
    with pytest.raises(SizingError, match="3 devices cannot share"):
        plan("b200x3")


def test_sequences_longer_than_the_models_are_refused() -> None:
    with pytest.raises(SizingError, match="max_position_embeddings = 202752"):
        plan(max_seq_len=300_000)


def test_this_machine_is_not_planned_for() -> None:
    with pytest.raises(TargetError, match="a plan needs a described machine"):
        plan("cpu")


def test_temporaries_are_called_an_estimate_when_they_are_one() -> None:
    assert not plan().memory.is_compiled
    assert "estimate" in plan().notes[0]


def test_the_estimate_is_near_the_compilers_numbers() -> None:
    # 3.95 GB for a chunk of 8192 on 8 B200, 0.49 GB at 64 rows: XLA of jaxlib 0.12.0.1.
    assert plan().memory.temporaries == pytest.approx(3.95e9, rel=0.15)


def test_a_smaller_chunk_needs_fewer_temporaries() -> None:
    shapes = shapes_for(CONFIG, parse_target("b200x8"), BF16, BF16, LIMITS)
    target = parse_target("b200x8")
    small = replace(shapes, prefill_buckets=(1,), decode_buckets=(64,), num_slots=64)
    sizes: list[Memory] = [
        measure(CONFIG, target, each, BF16, BF16, may_compile=False) for each in (small, shapes)
    ]
    assert sizes[0].temporaries < 0.3 * sizes[1].temporaries


def test_decode_is_shown_for_every_bucket_and_context_that_fits() -> None:
    made = plan(max_seq_len=65536, max_concurrency=64, kv_dtype="fp8_e4m3")
    assert {rows for rows, _, _ in made.decode} == set(made.shapes.decode_buckets)
    assert {context for _, context, _ in made.decode} == {2048, 8192, 32768, 65536}
    assert made.holds(64, 65536) and not made.holds(1024, 65536)


def test_the_table_says_what_the_plan_says() -> None:
    shown, made = io.StringIO(), plan()
    show(made, Console(width=120, file=shown))
    text = shown.getvalue()
    assert "glm-4.7 on b200x8" in text and "fits, with" in text
    assert f"{made.memory.kv_tokens:,} would fit" in text
    assert "limit" in text and "all-reduce" in text and "HBM" in text
    for note in made.notes:
        assert note[:60] in text


def test_json_holds_every_cell() -> None:
    result = run("--json")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    assert data["fits"] and data["refusal"] is None and data["target"] == "b200x8"
    assert len(data["decode"]) == len(data["shapes"]["decode_buckets"]) * 2
    cell = data["decode"][-1]
    parts = [cell["seconds"][name] for name in ("hbm", "compute", "all_reduce", "launches")]
    assert sum(parts) == pytest.approx(cell["seconds"]["total"])
    assert cell["tokens_per_second"] == pytest.approx(cell["rows"] / cell["seconds"]["total"])
    assert set(data["memory_per_device"]) >= {"weights", "temporaries", "kv", "headroom", "total"}


def test_what_does_not_fit_fails_and_says_what_would() -> None:
    result = run("--max-concurrency", "1024", "--target", "h200x8")
    assert result.exit_code == 1
    assert "does not fit" in result.output and "--max-concurrency" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "b300x8"), "target 'b300x8' is not known"),
        (("--config", "no-such"), "neither a directory"),
        (("--target", "b200x3"), "cannot share"),
        (("--plot", "plan.docx"), "--plot plan.docx"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert message in result.stderr and "Traceback" not in result.output


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    result = run("--plot", str(tmp_path / "plan.svg"))
    assert result.exit_code == 0, result.output
    assert "roofline" in (tmp_path / "plan.svg").read_text()


def test_a_directory_is_planned_by_its_own_config() -> None:
    result = run(
        "--config", "checkpoints/nano", "--target", "h100", "--max-seq-len", "1024", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["memory_per_device"]["weights"] < 1e9
