"""What XLA puts between our kernels in a decode step's layers of experts, where launches overlap.

Its kernels there must wait for what is ahead of them, as ours do, and read nothing of the kernel right
ahead: ptxas may put their constant loads before the wait. Read from the scheduled program and the PTX.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from glm_jax.aot.topology import missing_wheels

pytestmark = [
    pytest.mark.skipif(bool(missing_wheels()), reason=f"needs {', '.join(missing_wheels())}"),
    pytest.mark.slow,
]
# Two turns of the loop and one layer before them.
_COMPILE = """
from dataclasses import replace
import ml_dtypes, numpy as np
from glm_jax.aot.memory import Limits, shapes_for
from glm_jax.aot.presets import find_config
from glm_jax.aot.topology import mesh_of, stay_off_devices
from glm_jax.steps import lower
from glm_jax.targets.target import parse_target
stay_off_devices()
target, BF16 = parse_target("{target}"), np.dtype(ml_dtypes.bfloat16)
config = replace(find_config("glm-4.7"), num_hidden_layers=12)
limits = Limits(max_concurrency={rows}, max_seq_len=4096, max_batch_tokens=2048)
shapes = shapes_for(config, target, BF16, BF16, limits)
shapes = replace(shapes, decode_buckets=({rows},), num_drafts={num_drafts})
lower(config, shapes, mesh_of(target), BF16, "decode", {rows}).compile()
"""
_SKIPPED = {"get-tuple-element", "bitcast", "tuple", "parameter", "constant"}
_OURS = "grouped_gate_up"


class Instruction(NamedTuple):
    """One of a computation, in the order in which they run."""

    name: str
    operation: str
    operands: list[str]
    is_ours: bool


def computations(text: str) -> Iterator[list[Instruction]]:
    """Those that hold layers of experts."""
    for block in re.split(r"\n\n", text):
        if _OURS not in block:
            continue
        found = re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\((.*)$", block, re.M)
        yield [
            Instruction(
                name,
                operation,
                re.findall(r"%([\w.-]+)", rest.split("), ")[0]),
                # The layer that guesses stands by itself, and lets none begin.
                operation == "custom-call" and "mosaic" in rest and "/draft/" not in rest,
            )
            for name, operation, rest in found
        ]


def made_by(name: str, by_name: dict[str, Instruction]) -> str:
    """The instruction whose output this is, or a part of."""
    while name in by_name and by_name[name].operation in ("get-tuple-element", "bitcast"):
        name = by_name[name].operands[0]
    return name


@pytest.mark.parametrize(
    ("target", "rows", "num_drafts"),
    [("h200x8", 64, 0), ("b200x8", 64, 0), ("b200x8", 1, 0), ("h200x8", 64, 1)],
)
def test_xlas_kernels_among_ours_wait_and_read_nothing_of_the_one_ahead(
    target: str, rows: int, num_drafts: int, tmp_path: Path
) -> None:
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_dump_emitter_re=.* --xla_gpu_dump_llvmir"
    environment = dict(os.environ, XLA_FLAGS=flags)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    code = _COMPILE.format(target=target, rows=rows, num_drafts=num_drafts)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    kernels = dict(
        found
        for path in tmp_path.glob("*.ptx")
        for found in re.findall(r"\.entry (\w+)\((.*?)\n\}", path.read_text(), re.S)
    )
    texts = [path.read_text() for path in tmp_path.glob("*gpu_after_optimizations.txt")]
    layers = [each for text in texts for each in computations(text)]
    assert layers and kernels
    for instructions in layers:
        by_name = {each.name: each for each in instructions}
        running = [each for each in instructions if each.operation not in _SKIPPED]
        for ahead, each in zip(running, running[1:], strict=False):
            if not ahead.is_ours or each.operation != "fusion":
                continue
            assert ahead.name not in {made_by(name, by_name) for name in each.operands}, each
            ptx = kernels[each.name.replace(".", "_").replace("-", "_")]
            before, wait, _ = ptx.partition("griddepcontrol.wait")
            assert wait and not re.search(r"\b(ld|st|red|atom)\.\S*global", before), each
