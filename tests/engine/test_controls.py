"""Biases, bans, masks and log-probabilities on their way between requests and steps."""

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_jax import shapes as columns
from glm_jax.engine.batch import Packer
from glm_jax.engine.engine import Engine
from glm_jax.engine.mock import MockRunner
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.engine.scheduler import Scheduler
from glm_jax.shapes import StepShapes
from tests.engine.attentive import Events

VOCAB = 70
SHAPES = StepShapes(
    num_slots=3,
    num_pages=30,
    page_size=4,
    max_seq_len=32,
    prefill_tile=8,
    prefill_buckets=(4,),
    decode_buckets=(3,),
    vocab_size=VOCAB,
)


def asked(id: str, constraint: "Alternating | None" = None, **sampling) -> Request:
    params = SamplingParams(**{"max_new_tokens": 8, "temperature": 0.0, **sampling})
    return Request(id=id, prompt=(1, 2, 3), sampling=params, constraint=constraint)


class Alternating:
    """Even tokens at even places, odd ones at odd places, nothing after `free_from`."""

    def __init__(self, free_from: int = 10**9) -> None:
        self.accepted: list[int] = []
        self._free_from = free_from

    def binds(self, index: int) -> bool:
        return index < self._free_from

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def mask(self) -> NDArray[np.int32]:
        bits = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
        bits[len(self.accepted) % 2 : VOCAB : 2] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


def run(*requests: Request) -> Events:
    engine = Engine(MockRunner(SHAPES, VOCAB), SHAPES, 10)
    for request in requests:
        engine.submit(request)
    engine.stop()
    events = Events()
    engine.run(events)
    engine.check_integrity()
    return events


def test_a_constraint_sees_every_token_before_the_next_one_is_sampled():
    constraints = {id: Alternating() for id in "ab"}
    events = run(*(asked(id, constraint) for id, constraint in constraints.items()), asked("c"))
    for id, constraint in constraints.items():
        assert events.tokens[id] == constraint.accepted
        assert [token % 2 for token in constraint.accepted] == [0, 1] * 4
    assert events.tokens["c"] == run(asked("c")).tokens["c"]


def test_a_constraint_that_lets_go_leaves_the_rest_as_it_falls():
    constraint = Alternating(free_from=2)
    tokens = run(asked("a", constraint)).tokens["a"]
    assert [token % 2 for token in tokens[:2]] == [0, 1]
    assert tokens == constraint.accepted
    assert len(tokens) == 8


def test_as_many_likeliest_tokens_come_as_were_asked_for():
    events = run(asked("a", num_logprobs=3), asked("b"))
    for event in events.order:
        expected = 3 if event.request_id == "a" else 0
        assert len(event.top_logprobs) == expected
        if expected:
            assert event.top_logprobs[0] == (event.token, event.logprob)
            values = [logprob for _, logprob in event.top_logprobs]
            assert values == sorted(values, reverse=True)


def packed(request: Request) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
    scheduler, packer = Scheduler(SHAPES), Packer(SHAPES)
    scheduler.add(scheduler.sequence_for(request))
    plan = scheduler.schedule()
    assert plan is not None
    return packer.pack(plan)[0], packer.new_controls()


def test_biases_and_bans_are_controls_of_the_slot():
    request = asked(
        "a", logit_bias=((7, 2.5), (9, -100.0)), stop_token_ids=frozenset({4, 60}), min_tokens=5
    )
    row, controls = packed(request)
    assert controls is not None
    slot = controls[row[columns.SLOT]]
    assert (row[columns.NUM_BIASES], row[columns.NUM_BANS]) == (2, 2)
    assert row[columns.MIN_LENGTH] == 3 + 5
    assert slot[columns.CONTROL_TOKENS][:4].tolist() == [7, 9, 4, 60]
    assert slot[columns.CONTROL_BIASES][:2].view(np.float32).tolist() == [2.5, -100.0]


def test_penalties_are_columns_and_nobody_pays_for_controls():
    row, controls = packed(
        asked("a", frequency_penalty=0.5, presence_penalty=-1.0, repetition_penalty=2.0)
    )
    assert controls is None
    names = [columns.FREQUENCY_PENALTY, columns.PRESENCE_PENALTY, columns.REPETITION_PENALTY]
    values = row[names].view(np.float32)
    np.testing.assert_allclose(values, [0.5, -1.0, np.log(2.0)], rtol=1e-6)
    assert row[columns.PROMPT_LENGTH] == 3
    row, _ = packed(asked("b"))
    assert not row[columns.FREQUENCY_PENALTY : columns.PROMPT_LENGTH].any()
    assert not row[columns.NUM_BIASES :][: columns.NUM_FIELDS - columns.NUM_BIASES].any()


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 0.0},
        {"num_logprobs": columns.MAX_TOP_LOGPROBS + 1},
        {"logit_bias": ((1, 0.0),) * (columns.MAX_LOGIT_BIASES + 1)},
        {"min_tokens": 1, "stop_token_ids": frozenset(range(columns.MAX_BANS + 1))},
    ],
)
def test_what_a_step_has_no_room_for_is_refused(fields):
    with pytest.raises(ValueError):
        asked("a", **fields)
