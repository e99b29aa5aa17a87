"""The PTX of numbers that are handed over, run on this machine."""

import numpy as np
import pytest

from glm_jax.pallas import handover
from tests.pallas import ptx_machine
from tests.pallas.ptx_machine import Memory

PARTS, COLUMNS, ROOM = 5, 160, 256
EMPTY = np.uint32(0xFFFFFFFF)


@pytest.mark.parametrize("is_one_of_many", [False, True])
def test_parts_are_added_in_order_once_all_are_there(is_one_of_many: bool) -> None:
    draw = np.random.default_rng(0)
    parts = draw.standard_normal((PARTS, ROOM), np.float32)
    parts[:, COLUMNS:].view(np.uint32)[:] = EMPTY
    parts[3, 7] = np.inf
    device = Memory(1 << 32)
    sums = np.zeros((2, 128), np.float32)
    at = {"parts": device.add(parts), "sums": device.add(sums)}
    # What the code would leave in registers is stored instead.
    code = "\n".join(handover._sum_code(PARTS, 4 * ROOM, COLUMNS, is_one_of_many)).removesuffix("}")
    code = code.replace("$2", "$0").replace("mov.b32 $0,", "mov.b32 sum0,")
    code = code.replace("mov.b32 $1,", "mov.b32 sum1,") + (
        ".reg .b32 sum0, sum1;\nmad.wide.u32 at, thread, 4, $1;\n"
        "st.global.b32 [at], sum0;\nst.global.b32 [at+512], sum1;\n}"
    )
    ptx_machine.run([(code, ["parts", "sums"])], range(1), device, lambda *_: at, seed=0)
    wanted = parts[0]
    for part in parts[1:]:
        wanted = wanted + part
    np.testing.assert_array_equal(sums.reshape(-1)[:COLUMNS], wanted[:COLUMNS])


@pytest.mark.parametrize("columns", [96, 160, 256])
def test_what_was_read_is_empty_again(columns: int) -> None:
    parts = np.zeros((PARTS, 2, ROOM), np.float32)
    device = Memory(1 << 32)
    at = {"row": device.add(parts)}
    code = "\n".join(handover._clear_code(PARTS, 8 * ROOM, columns))
    ptx_machine.run([(code, ["row"])], range(1), device, lambda *_: at, seed=0)
    assert (parts[:, 0, :columns].view(np.uint32) == EMPTY).all()
    assert (parts[:, 1] == 0).all() and (parts[:, 0, columns:] == 0).all()
