"""What inspect reports of a compiled step, and how it compares with what was reported before."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from glm_jax.aot.__main__ import main
from glm_jax.aot.graphs import Graphs, graphs_of, thunks
from glm_jax.aot.inspection import InspectionError, differences_of, inspect_steps
from glm_jax.aot.memory import Limits
from glm_jax.targets.target import parse_target
from tests.glm_jax.tiny import config_json, make_config

BF16 = np.dtype(ml_dtypes.bfloat16)
LIMITS = Limits(max_concurrency=2, max_seq_len=64, max_batch_tokens=64)
THUNKS = """\
000: kCommandBuffer [source        | next=024 (1)]
    001: kPartitionId  [source        | next=002 (1)] kPartitionId
    002: kAsyncStart   [prev=002 (1)  | next=006 (2)] stream=computation_stream[0], async_id=3
        003: kCollectiveKernel [source | sink] kCollectiveKernel
004: kWhile         [prev=000 (1)  | next=000 (1)]
condition:
    005: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        006: kCustomKernel [source       | next=028 (2)] fusion grid: [256, 1, 1]
007: kCustomKernel [prev=004 (1) | sink] last grid: [1, 1, 1]
"""


def test_what_stands_deeper_than_a_command_buffer_is_in_it() -> None:
    assert graphs_of(THUNKS) == Graphs(command_buffers=2, launches_outside_of_them=2)
    assert list(thunks(THUNKS)) == [
        ("CommandBuffer", False),
        ("PartitionId", True),
        ("AsyncStart", True),
        ("CollectiveKernel", True),
        ("While", False),
        ("CustomKernel", False),
        ("CommandBuffer", False),
        ("CustomKernel", True),
        ("CustomKernel", False),
    ]


def test_a_record_is_compared_place_by_place() -> None:
    before: dict[str, Any] = {
        "decode-1": {"kernels_per_step": 5, "copies": [{"path": "a"}, {"path": "b"}]},
        "decode-8": {},
    }
    after: dict[str, Any] = {
        "decode-1": {"kernels_per_step": 6, "copies": [{"path": "b"}, {"path": "c"}]},
        "prefill-1": {},
    }
    assert differences_of(before, before) == []
    assert differences_of(before, after) == [
        "decode-1.copies: - {'path': 'a'}",
        "decode-1.copies: + {'path': 'c'}",
        "decode-1.kernels_per_step: 5 expected, 6 found",
        "decode-8: only expected",
        "prefill-1: not expected",
    ]


def test_a_step_that_is_not_compiled_is_refused_with_those_that_are() -> None:
    with pytest.raises(InspectionError, match=r"no step 'decode-3' .* decode-1, decode-2"):
        inspect_steps(make_config(), parse_target("b200x2"), BF16, LIMITS, ["decode-3"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_compilation_cache")
def test_a_step_is_reported_whole_and_again_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_jax.aot.topology.stay_off_devices", lambda: None)
    # Three layers of experts are fewer than a turn of the loop has.
    monkeypatch.setattr("glm_jax.model._AT_A_TIME", 1)
    # As deployed, a kv head a device: then sums are in bfloat16.
    config = config_json(num_hidden_layers=4, num_key_value_heads=2, num_attention_heads=4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = [f"--config={tmp_path}", "--target=b200x2", "--max-concurrency=2", "--max-seq-len=64"]
    flags += ["--max-batch-tokens=64", "--step=decode-2", "--allow-reference-ops"]
    record = tmp_path / "expected.json"
    first = CliRunner().invoke(main, ["inspect", *flags, f"--write={record}"])
    assert first.exit_code == 0, first.output
    found = json.loads(record.read_text())["decode-2"]
    sums = [each for each in found["collectives"] if each["kind"] == "all-reduce"]
    assert sum(each["executions"] for each in sums) == 2 * 4 + 1
    assert {each["dtype"] for each in sums} == {"bf16"}
    assert found["kernels_per_step"] > 3 * len(found["turn_kernels"]) > 10
    assert found["layers_a_turn"] == 1
    assert found["command_buffers"] > 0 and found["temporary_bytes"] > 0
    changed = json.loads(record.read_text())
    changed["decode-2"]["command_buffers"] += 1
    record.write_text(json.dumps(changed))
    second = CliRunner().invoke(main, ["inspect", *flags, f"--expect={record}"])
    assert second.exit_code == 1
    assert f"command_buffers: {found['command_buffers'] + 1} expected" in second.stderr
    assert second.stderr.count("\n") == 1
