"""Promises of the prefix cache: what is shared, what is not, and what it changes: nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.prefix import extend_keys, root_key
from glm_jax.engine.request import Request, TokenEvent
from tests.engine.attentive import (
    Events,
    assert_clean,
    engine_for,
    expected_answers,
    request,
    run_to_end,
    small_shapes,
)

# --- Keys ---------------------------------------------------------------------------------------


def keys_of(tokens: list[int], salt: str = "", page_size: int = 4) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, salt, np.array(tokens, np.int32), len(tokens), page_size)
    return keys


def test_a_key_stands_for_all_tokens_up_to_the_end_of_its_page():
    tokens = list(range(12))
    keys = keys_of(tokens)
    assert len(set(keys)) == 3
    for position in range(12):
        changed = keys_of([*tokens[:position], 99, *tokens[position + 1 :]])
        page = position // 4
        assert changed[:page] == keys[:page]
        assert not set(changed[page:]) & set(keys)


def test_only_full_pages_have_keys():
    assert [len(keys_of(list(range(number)))) for number in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_keys_grow_as_tokens_come_to_what_they_would_have_been_at_once():
    tokens = np.arange(23, dtype=np.int32)
    grown: list[bytes] = []
    for number in range(len(tokens) + 1):
        extend_keys(grown, "salt", tokens, number, 4)
    assert grown == keys_of(tokens.tolist(), "salt")


def test_another_salt_shares_no_key():
    assert not set(keys_of(list(range(8)), "a")) & set(keys_of(list(range(8)), "b"))
    assert root_key("a") != root_key("b")


# --- Sharing ------------------------------------------------------------------------------------


def in_turn(engine: Engine, *requests: Request) -> Events:
    """Each request once the one before it has ended."""
    events, left = Events(), list(requests[1:])

    def deliver(batch: list[TokenEvent]) -> None:
        events(batch)
        if any(event.finish_reason for event in batch):
            if left:
                engine.submit(left.pop(0))
            else:
                engine.stop()

    engine.submit(requests[0])
    engine.run(deliver)
    return events


def with_prompt(id: str, prompt: tuple[int, ...], **changes: Any) -> Request:
    return replace(request(id, 5, 4), prompt=prompt, **changes)


PROMPT = tuple(range(17))


def test_the_same_prompt_again_computes_its_last_page_only():
    shapes = small_shapes()
    asked = [with_prompt(id, PROMPT) for id in ("a", "b")]
    engine, runner = engine_for(shapes)
    events = in_turn(engine, *asked)
    assert events.num_cached == {"a": 0, "b": 16}
    for one in asked:
        assert events.answers(one.id) == expected_answers(one, shapes)
    assert runner.phases.count("prefill") == 3 + 1
    stats = engine.stats()
    assert (stats.num_admitted_tokens, stats.num_cached_tokens) == (34, 16)
    assert_clean(engine)


@pytest.mark.parametrize("num_tokens, num_cached", [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_is_always_computed(num_tokens: int, num_cached: int):
    engine, _ = engine_for(small_shapes())
    prompt = PROMPT[:num_tokens]
    events = in_turn(engine, with_prompt("a", prompt), with_prompt("b", prompt))
    assert events.num_cached["b"] == num_cached


def test_prompts_share_up_to_the_page_where_they_part():
    shapes = small_shapes()
    other = (*PROMPT[:10], 40, *PROMPT[11:])
    asked = [with_prompt("a", PROMPT), with_prompt("b", other)]
    engine, _ = engine_for(shapes)
    events = in_turn(engine, *asked)
    assert events.num_cached["b"] == 8
    assert events.answers("b") == expected_answers(asked[1], shapes)


def test_the_same_tokens_behind_others_are_not_shared():
    shapes = small_shapes()
    moved = (40, 41, 42, 43, *PROMPT[:12])
    asked = [with_prompt("a", PROMPT), with_prompt("b", moved)]
    engine, _ = engine_for(shapes)
    events = in_turn(engine, *asked)
    assert events.num_cached["b"] == 0
    assert events.answers("b") == expected_answers(asked[1], shapes)


def test_another_salt_shares_nothing():
    engine, _ = engine_for(small_shapes())
    salts = ("", "x", "y", "x")
    asked = [with_prompt(f"{i}", PROMPT, cache_salt=salt) for i, salt in enumerate(salts)]
    events = in_turn(engine, *asked)
    assert events.num_cached == {"0": 0, "1": 0, "2": 0, "3": 16}


def test_the_next_turn_of_a_conversation_reuses_the_answer_too():
    shapes = small_shapes()
    first = replace(request("a", 6, 13), prompt=PROMPT[:6])
    answer = tuple(token for token, _ in expected_answers(first, shapes))
    second = with_prompt("b", (*first.prompt, *answer, 1, 2, 3))
    engine, _ = engine_for(shapes)
    events = in_turn(engine, first, second)
    # 6 + 13 tokens, of which the last was never fed back.
    assert events.num_cached["b"] == 16
    assert events.answers("b") == expected_answers(second, shapes)


def test_a_prompt_that_is_still_being_prefilled_is_shared_as_far_as_it_is():
    shapes = small_shapes(num_slots=2)
    asked = [with_prompt("a", PROMPT), with_prompt("b", PROMPT)]

    def before_step(step: int, engine: Engine) -> None:
        if step == 1:
            engine.submit(asked[1])

    engine, _ = engine_for(shapes, before_step)
    engine.submit(asked[0])
    events = Events()

    def deliver(batch: list[TokenEvent]) -> None:
        events(batch)
        if len(events.last) == 2:
            engine.stop()

    engine.run(deliver)
    assert events.num_cached["b"] == 16
    for one in asked:
        assert events.answers(one.id) == expected_answers(one, shapes)


def test_the_same_prompt_many_times_at_once_is_computed_once():
    shapes = small_shapes(num_slots=4, num_pages=30, max_prefill_rows=8)
    asked = [with_prompt(id, PROMPT) for id in "abcd"]
    engine, runner = engine_for(shapes)
    for one in asked:
        engine.submit(one)
    events = run_to_end(engine)
    assert events.num_cached == {"a": 0, "b": 16, "c": 16, "d": 16}
    assert runner.phases[:3] == ["prefill", "decode", "prefill"]
    for one in asked:
        assert events.answers(one.id) == expected_answers(one, shapes)


def test_a_prompt_that_shares_little_with_one_being_computed_does_not_wait_for_it():
    engine, runner = engine_for(small_shapes(num_slots=2, max_prefill_rows=8, max_seq_len=40))
    engine.submit(with_prompt("a", PROMPT))
    engine.submit(with_prompt("b", (*PROMPT[:4], *range(20, 40))))
    events = run_to_end(engine)
    assert events.num_cached == {"a": 0, "b": 0}
    assert runner.phases[:2] == ["prefill", "prefill"] or runner.phases.count("prefill") == 2


def test_shared_pages_are_not_counted_twice_and_survive_their_first_owner():
    used: list[int] = []
    shapes = small_shapes(num_slots=2, max_seq_len=40)
    first = replace(with_prompt("a", PROMPT), sampling=request("a", 5, 3).sampling)
    second = replace(with_prompt("b", PROMPT), sampling=request("b", 5, 20).sampling)

    def before_step(step: int, engine: Engine) -> None:
        if step == 3:
            engine.submit(second)
        used.append(engine.stats().num_pages_used)

    engine, _ = engine_for(shapes, before_step)
    engine.submit(first)
    events = Events()

    def deliver(batch: list[TokenEvent]) -> None:
        events(batch)
        if len(events.last) == 2:
            engine.stop()

    engine.run(deliver)
    assert max(used[:5]) == 6, "five pages of one prompt, and the last page of the other"
    assert events.answers("b") == expected_answers(second, shapes)
    assert_clean(engine)


def test_shared_pages_end_where_a_tile_of_prefill_ends():
    shapes = small_shapes(page_size=4, prefill_tile=8, max_prefill_rows=1)
    asked = [with_prompt("a", PROMPT[:14]), with_prompt("b", PROMPT[:14])]
    engine, _ = engine_for(shapes)
    events = in_turn(engine, *asked)
    assert events.num_cached["b"] == 8
    assert events.answers("b") == expected_answers(asked[1], shapes)


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 0.5}, {"presence_penalty": 0.1}, {"repetition_penalty": 1.2}]
)
def test_a_request_with_penalties_is_prefilled_whole(penalty: dict[str, float]):
    engine, _ = engine_for(small_shapes())
    plain = with_prompt("a", PROMPT)
    events = in_turn(
        engine, plain, replace(plain, id="b", sampling=replace(plain.sampling, **penalty))
    )
    assert events.num_cached["b"] == 0


def test_what_rests_gives_way_to_what_is_needed():
    shapes = small_shapes(num_pages=8)
    asked = [request(f"r{i}", 20, 5) for i in range(6)]
    engine, _ = engine_for(shapes)
    events = in_turn(engine, *asked)
    for one in asked:
        assert events.answers(one.id) == expected_answers(one, shapes)
    stats = engine.stats()
    assert stats.num_evicted > 0 and stats.num_pages_resting > 0
    assert_clean(engine)


def test_a_cancelled_prompt_leaves_what_it_computed():
    def cancel(step: int, engine: Engine) -> None:
        if step == 1:
            engine.cancel("a")

    shapes = small_shapes(num_slots=1)
    engine, _ = engine_for(shapes, cancel)
    for id in "ab":
        engine.submit(with_prompt(id, PROMPT))
    events = run_to_end(engine)
    assert events.reason("a") == "cancelled"
    assert events.num_cached["b"] == 16
    assert events.answers("b") == expected_answers(with_prompt("b", PROMPT), shapes)
