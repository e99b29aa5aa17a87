"""Promises of the mock device."""

from __future__ import annotations

import time

import numpy as np
import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.shapes import (
    NUM_LOGPROBS,
    NUM_OUTPUTS,
    OUTPUT_LOGPROBS,
    OUTPUT_TOKENS,
    OUTPUT_TOP_LOGPROBS,
    OUTPUT_TOP_TOKENS,
)
from tests.engine.attentive import request, run_to_end, small_shapes

SHAPES = small_shapes(num_slots=3)


def completions(ids: str, **options) -> dict[str, list[int]]:
    engine = Engine(MockRunner(SHAPES, 1000, **options), SHAPES, max_queue=len(ids))
    for id in ids:
        engine.submit(request(id, 5 + ord(id) % 3, 12))
    return run_to_end(engine).tokens


def test_tokens_do_not_depend_on_the_company_or_the_slot():
    together = completions("abcdefg")
    assert all(len(tokens) == 12 for tokens in together.values())
    for id, tokens in together.items():
        assert completions(id)[id] == tokens


def test_tokens_stay_in_the_range_given():
    for tokens in completions("abcd", tokens=range(40, 47)).values():
        assert set(tokens) <= set(range(40, 47))
        assert len(set(tokens)) > 1


@pytest.mark.parametrize("tokens", [range(0), range(990, 1001), range(-1, 5)])
def test_a_range_outside_the_vocabulary_is_refused(tokens: range):
    with pytest.raises(ValueError, match="vocabulary"):
        MockRunner(SHAPES, 1000, tokens=tokens)


def test_steps_are_pipelined_and_end_in_order():
    runner = MockRunner(SHAPES, 1000, seconds_per_step=0.05)
    batch = np.zeros((1, SHAPES.columns("decode")), np.int32)
    start = time.monotonic()
    outputs = [runner.dispatch("decode", batch) for _ in range(3)]
    ready = [output.ready_at - start for output in outputs]
    assert 0.05 <= ready[0] < ready[1] < ready[2]
    assert ready[2] - ready[0] == pytest.approx(0.1)
    assert np.asarray(outputs[2]).shape == (NUM_OUTPUTS, 1)
    assert time.monotonic() >= outputs[2].ready_at


def test_the_likeliest_tokens_are_told_where_a_row_asks():
    runner = MockRunner(SHAPES, 1000)
    batch = np.zeros((1, SHAPES.columns("decode")), np.int32)
    assert not np.asarray(runner.dispatch("decode", batch))[2:].any()
    batch[:, NUM_LOGPROBS] = 2
    output = np.asarray(runner.dispatch("decode", batch))
    assert output[OUTPUT_TOP_TOKENS][0] == output[OUTPUT_TOKENS]
    logprobs = output[OUTPUT_TOP_LOGPROBS][:2].view(np.float32)
    assert logprobs[0] == output[[OUTPUT_LOGPROBS]].view(np.float32) == logprobs[1] + 1
    assert not output[OUTPUT_TOP_TOKENS][2:].any()


@pytest.mark.parametrize("num_rows, num_columns", [(2, 0), (1, 1)])
def test_a_batch_no_device_has_compiled_is_refused(num_rows: int, num_columns: int):
    runner = MockRunner(SHAPES, 1000)
    batch = np.zeros((num_rows, SHAPES.columns("decode") + num_columns), np.int32)
    with pytest.raises(ValueError, match="bucket|columns"):
        runner.dispatch("decode", batch)
