"""Promises of the packer: each column says what `glm_jax.shapes` says it does."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_jax import shapes as columns
from glm_jax.engine.batch import Packer
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.engine.scheduler import Scheduler
from glm_jax.shapes import StepShapes
from tests.engine.attentive import columns_of, request, small_shapes

SAMPLING = [
    columns.TEMPERATURE,
    columns.TOP_P,
    columns.MIN_P,
    columns.TOP_K,
    columns.SEED_LOW,
    columns.SEED_HIGH,
]


@pytest.fixture
def shapes() -> StepShapes:
    return small_shapes(num_slots=4, max_prefill_rows=8)


def packed(scheduler: Scheduler, packer: Packer) -> NDArray[np.int32]:
    plan = scheduler.schedule()
    assert plan is not None
    return packer.pack(plan)


def test_a_prefill_batch_holds_the_prompts_row_by_row(shapes: StepShapes):
    scheduler, packer = Scheduler(shapes), Packer(shapes)
    long, short = (scheduler.sequence_for(request(id, n)) for id, n in [("long", 10), ("s", 2)])
    scheduler.add(long)
    scheduler.add(short)
    batch = packed(scheduler, packer)
    assert batch.shape == (8, shapes.columns("prefill"))
    assert batch[:, columns.SLOT].tolist() == [long.slot] * 3 + [short.slot] + [4] * 4
    assert batch[:, columns.START].tolist() == [0, 4, 8, 0, 0, 0, 0, 0]
    assert batch[:, columns.NUM_TOKENS].tolist() == [4, 4, 2, 2, 0, 0, 0, 0]
    assert batch[:, columns.IS_LAST].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    tokens = batch[:, -4:]
    assert tokens[:3].ravel().tolist() == [*long.request.prompt, 0, 0]
    assert tokens[3].tolist() == [*short.request.prompt, 0, 0]
    assert not tokens[4:].any()


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1])
def test_sampling_parameters_arrive_bit_by_bit_in_both_phases(shapes: StepShapes, seed: int):
    scheduler, packer = Scheduler(shapes), Packer(shapes)
    sampling = SamplingParams(
        max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=2**31 - 1, min_p=0.05, seed=seed
    )
    scheduler.add(scheduler.sequence_for(Request(id="a", prompt=(1, 2), sampling=sampling)))
    for _ in range(2):
        row = packed(scheduler, packer)[0]
        assert tuple(row[SAMPLING].tolist()) == columns_of(sampling)
        assert row[[columns.TEMPERATURE]].view(np.float32)[0] == np.float32(0.7)


def test_a_page_table_holds_the_pages_in_order_and_then_zeros(shapes: StepShapes):
    scheduler, packer = Scheduler(shapes), Packer(shapes)
    sequences = [scheduler.sequence_for(request(id, 7, 12)) for id in "ab"]
    for sequence in sequences:
        scheduler.add(sequence)
    width = shapes.pages_per_sequence
    first, last = slice(columns.NUM_FIELDS, columns.NUM_FIELDS + width), columns.NUM_FIELDS + width
    assert packed(scheduler, packer).shape[1] == last + shapes.prefill_tile
    for _ in range(11):
        batch = packed(scheduler, packer)
        for row, sequence in enumerate(sequences):
            padded = sequence.pages + [0] * (width - len(sequence.pages))
            assert batch[row, first].tolist() == padded
    assert len(sequences[0].pages) == 5


def test_the_next_sequence_in_a_slot_starts_from_a_clean_row(shapes: StepShapes):
    scheduler, packer = Scheduler(shapes), Packer(shapes)
    old = scheduler.sequence_for(request("old", 24))
    scheduler.add(old)
    slot = packed(scheduler, packer)[0, columns.SLOT]
    scheduler.finish(old, "cancelled")
    new = scheduler.sequence_for(request("new", 3))
    scheduler.add(new)
    row = packed(scheduler, packer)[0]
    assert row[columns.SLOT] == slot
    assert tuple(row[SAMPLING].tolist()) == columns_of(new.request.sampling)
    table = row[columns.NUM_FIELDS : -shapes.prefill_tile].tolist()
    assert table == new.pages + [0] * (shapes.pages_per_sequence - 1)


def test_a_packed_batch_is_never_written_again(shapes: StepShapes):
    scheduler, packer = Scheduler(shapes), Packer(shapes)
    scheduler.add(scheduler.sequence_for(request("a", 9, 9)))
    batches = [packed(scheduler, packer) for _ in range(5)]
    copies = [batch.copy() for batch in batches]
    scheduler.add(scheduler.sequence_for(request("b", 20, 9)))
    for _ in range(3):
        packed(scheduler, packer)
    for batch, copy in zip(batches, copies, strict=True):
        np.testing.assert_array_equal(batch, copy)


def test_padding_rows_of_decode_name_no_slot_and_no_token(shapes: StepShapes):
    scheduler, packer = Scheduler(shapes), Packer(shapes)
    for id in "abc":
        scheduler.add(scheduler.sequence_for(request(id)))
    packed(scheduler, packer)
    batch = packed(scheduler, packer)
    assert batch.shape == (4, shapes.columns("decode"))
    assert batch[3].tolist() == [4] + [0] * (shapes.columns("decode") - 1)
    assert batch[:3, columns.NUM_TOKENS].tolist() == [1, 1, 1]
