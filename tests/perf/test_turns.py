"""Cases by turns: what is right, what is wrong, and what brings its process down."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.pallas.chip import Chip
from tests.perf.card import Card
from tests.perf.measure import Case, Step, relative_error
from tests.perf.turns import Outcome, over_cases

# So slow that a case is called once.
_CARD = Card("no card", Chip("sm90", 4), 1.0, {"fp8": 1.0, "bf16": 1.0})


def _double(operands: Any, layer: jax.Array) -> jax.Array:
    del layer
    return 2 * operands


def _triple(operands: Any, layer: jax.Array) -> jax.Array:
    del layer
    return 3 * operands


def _refuse(operands: Any, layer: jax.Array) -> jax.Array:
    raise NotImplementedError("no such shape")


def _die(operands: Any, layer: jax.Array) -> jax.Array:
    def end(x: np.ndarray) -> np.ndarray:
        os._exit(3)

    return jax.pure_callback(end, jax.ShapeDtypeStruct(operands.shape, operands.dtype), operands)


def _cases(chip: Chip) -> Sequence[Case]:
    def case(name: str, step: Step) -> Case:
        return Case(
            kernel=name, shape="", draw=partial(jax.random.normal, shape=(8,)), num_layers=1, step=step,
            reference=_double, errors=lambda got, want: {"out": relative_error(got, want)},
            tolerance=1e-6, bytes=64.0, alternatives={"add": _double},
        )  # fmt: skip

    steps = {"right": _double, "wrong": _triple, "refused": _refuse, "deadly": _die}
    return [*(case(*item) for item in steps.items()), case("after", _double)]


@pytest.mark.slow
def test_a_case_that_kills_its_process_takes_no_other_with_it() -> None:
    outcomes = list(over_cases(_cases, 1, 300, _CARD))
    assert outcomes[0] == _CARD
    results = {o.place: o.result for o in outcomes if isinstance(o, Outcome)}
    assert [results[place].get("is_right") for place in range(5)] == [True, False, None, None, True]
    assert "no such shape" in results[2]["failed"]
    assert "EOFError" in results[3]["failed"]
    assert results[0]["bits"] == results[4]["bits"] != results[1]["bits"]
    assert results[4]["alternatives"]["add"]["us"] > 0


def test_what_the_time_does_not_suffice_for_is_said() -> None:
    outcomes = list(over_cases(_cases, 1, 0, _CARD))
    assert all("time was over" in o.result["failed"] for o in outcomes if isinstance(o, Outcome))
    assert len(outcomes) == 6
