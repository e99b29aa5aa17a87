"""Programs of our kernels are lowered one at a time, whoever asks: Mosaic counts on it."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import scoring, steps
from glm_jax.runner import compile_steps
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh
from tests.glm_jax.tiny import make_config

_SHAPES = StepShapes(
    num_slots=2, num_pages=8, page_size=8, max_seq_len=32, prefill_tile=8, prefill_buckets=(2,),
    decode_buckets=(2,),
)  # fmt: skip


class _Lowering:
    """In place of a step, counts those that are lowered at once."""

    def __init__(self) -> None:
        self.now, self.most, self.calls = 0, 0, 0
        self._lock = threading.Lock()

    def lower(self, *_: Any) -> "_Lowering":
        with self._lock:
            self.now, self.calls = self.now + 1, self.calls + 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        with self._lock:
            self.now -= 1
        return self

    def compile(self) -> None:
        """Nothing to compile."""


@pytest.fixture
def lowering(monkeypatch: pytest.MonkeyPatch) -> _Lowering:
    counted = _Lowering()
    specs = SimpleNamespace(weights={}, cache=None, slots={})
    monkeypatch.setattr(steps, "step_specs", lambda *_: specs)
    monkeypatch.setattr(steps, "step_function", lambda *_: counted)
    return counted


def _shapes(buckets: tuple[int, ...]) -> Any:
    return SimpleNamespace(
        num_slots=1, control_columns=1, columns=lambda phase: 1, decode_buckets=buckets,
        prefill_buckets=buckets,
    )  # fmt: skip


def test_buckets_are_lowered_one_at_a_time(lowering: _Lowering) -> None:
    config: Any = None
    compile_steps(config, _shapes((1, 2, 4, 8)), make_mesh(1), np.dtype("bfloat16"))
    assert (lowering.calls, lowering.most) == (8, 1)


def test_scoring_is_traced_and_lowered_while_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_locked = []

    def score(_: Any, cache: Any, *__: Any) -> Any:
        is_locked.append(steps.LOWERING.locked())
        return cache, jnp.zeros((1, 1), jnp.int32)

    monkeypatch.setattr(scoring, "score", score)
    scoring.lower_score(make_config(), _SHAPES, make_mesh(1), np.dtype("bfloat16"))
    assert is_locked == [True] and not steps.LOWERING.locked()
