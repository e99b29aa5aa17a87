"""Shapes both sides of a step agree on: buckets, columns, and sizes that cannot work refused."""

from typing import Any

import pytest

from glm_jax import shapes
from glm_jax.shapes import StepShapes


def make(**overrides: Any) -> StepShapes:
    sizes: dict[str, Any] = {
        "num_slots": 6,
        "num_pages": 10,
        "page_size": 16,
        "max_seq_len": 40,
        "prefill_tile": 8,
        "prefill_buckets": (1, 4),
        "decode_buckets": (2, 6),
    }
    return StepShapes(**sizes | overrides)


@pytest.mark.parametrize(
    "name", ["num_slots", "num_pages", "page_size", "max_seq_len", "prefill_tile"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        make(**{name: value})


@pytest.mark.parametrize("name", ["prefill_buckets", "decode_buckets"])
@pytest.mark.parametrize("buckets", [(), (0, 8), (8, 4), (4, 4, 8)])
def test_buckets_ascend_from_one(name: str, buckets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive and ascending"):
        make(**{name: buckets})


def test_every_slot_fits_into_the_largest_decode_bucket() -> None:
    assert make(decode_buckets=(8,)).decode_buckets == (8,)
    with pytest.raises(ValueError, match=r"largest decode bucket \(4\) is smaller than num_slots"):
        make(decode_buckets=(2, 4))


def test_a_page_table_holds_the_longest_sequence_and_no_page_more() -> None:
    lengths = {1: 1, 16: 1, 17: 2, 32: 2, 33: 3}
    assert {n: make(max_seq_len=n).pages_per_sequence for n in lengths} == lengths


def test_the_prefill_budget_is_every_row_full() -> None:
    assert make().prefill_budget == 4 * 8


def test_rows_go_into_the_smallest_bucket_that_holds_them() -> None:
    sizes = make()
    assert [sizes.rows("prefill", n) for n in (1, 2, 4)] == [1, 4, 4]
    assert [sizes.rows("decode", n) for n in (1, 2, 3, 6)] == [2, 2, 6, 6]
    with pytest.raises(ValueError, match="5 rows exceed the largest prefill bucket, 4"):
        sizes.rows("prefill", 5)


def test_columns_are_the_fields_the_page_table_and_a_tile_of_prompt() -> None:
    fields = [
        shapes.SLOT, shapes.START, shapes.NUM_TOKENS, shapes.IS_LAST, shapes.TEMPERATURE,
        shapes.TOP_P, shapes.MIN_P, shapes.TOP_K, shapes.SEED_LOW, shapes.SEED_HIGH,
        shapes.FREQUENCY_PENALTY, shapes.PRESENCE_PENALTY, shapes.REPETITION_PENALTY,
        shapes.PROMPT_LENGTH, shapes.MIN_LENGTH, shapes.NUM_BIASES, shapes.NUM_BANS,
        shapes.NUM_LOGPROBS, shapes.IS_MASKED, shapes.NUM_STOPS,
    ]  # fmt: skip
    fields += range(shapes.NUM_FIELDS)[shapes.STOP_TOKENS]
    assert sorted(fields) == list(range(shapes.NUM_FIELDS))
    assert make().columns("decode") == shapes.NUM_FIELDS + 3
    assert make().columns("prefill") == shapes.NUM_FIELDS + 3 + 8
