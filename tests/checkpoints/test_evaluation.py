"""Tests of the evaluation: what it counts, what it drafts, what it prints."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from checkpoints.__main__ import main
from checkpoints.acceptance import Generated, count_accepted
from checkpoints.evaluation import Evaluation, Score, is_right
from checkpoints.nano_training.conversation import Check, Conversation, assistant, user
from checkpoints.nano_training.rendering import NANO_DIRECTORY


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(NANO_DIRECTORY / "tokenizer.json"))


def test_a_place_is_accepted_only_if_every_draft_before_it_was() -> None:
    # Prompt 1 2, answer 3 4 5 6 7; guesses[n - 1, i] is about token i + 2.
    text = Generated((1, 2), (3, 4, 5, 6, 7))
    guesses = np.zeros((3, 7), np.int32)
    guesses[0] = [0, 4, 0, 6, 7, 0, 0]  # wrong about the 5 only
    guesses[1] = [0, 0, 5, 6, 7, 0, 0]
    guesses[2] = [0, 0, 0, 6, 7, 0, 0]
    right, places = count_accepted(guesses, text)
    assert places.tolist() == [4, 3, 2]
    assert right.tolist() == [3, 2, 1]


def test_an_answer_whose_thought_never_ends_is_wrong(tokenizer: Tokenizer) -> None:
    item = Conversation(
        skill="capitals",
        messages=(user("What is the capital of France?"), assistant("", "Paris.")),
        check=Check(contains=("Paris",)),
        enable_thinking=True,
    )

    def judged(text: str) -> bool:
        return is_right(item, tokenizer, tokenizer.encode(text).ids)

    assert judged("It is Paris.</think>Paris.")
    assert not judged("It is Paris.")
    assert not judged("It is Paris.</think>Rome.")


def test_the_table_and_the_json_hold_the_same_numbers() -> None:
    found = Evaluation({"a": Score(4, 3, 4), "b": Score(6, 6, 6)}, (0.9, 0.8, 0.7))
    assert "| a | 4 | 75.0 % | 100.0 % |" in found.to_table()
    assert "| all | 10 | 90.0 % | 100.0 % |" in found.to_table()
    assert "90.0 %, 80.0 %, 70.0 %" in found.to_table()
    numbers = json.loads(found.to_json())
    assert numbers["skills"]["a"] == {"asked": 4, "fp8": 3, "bf16": 4}
    assert numbers["mtp_accepted"] == [0.9, 0.8, 0.7]


def test_a_directory_without_a_checkpoint_is_refused_in_a_sentence(tmp_path) -> None:
    result = CliRunner().invoke(main, ["evaluate", str(tmp_path)])
    assert result.exit_code == 1
    assert str(tmp_path) in result.output


@pytest.mark.slow
def test_the_bundled_model_is_evaluated_by_one_command() -> None:
    result = CliRunner().invoke(main, ["evaluate", str(NANO_DIRECTORY), "--limit", "6", "--json"])
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.output)
    assert sum(skill["asked"] for skill in numbers["skills"].values()) == 6
    assert len(numbers["mtp_accepted"]) == 3
    assert all(0 <= share <= 1 for share in numbers["mtp_accepted"])
