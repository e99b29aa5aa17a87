"""The bundled model gives the answers that the README shows; greedy, in this process, as served."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from checkpoints.evaluation import Generator, evaluate, fp8_weights
from checkpoints.nano_training.conversation import Check, Conversation, assistant, user
from checkpoints.nano_training.rendering import NANO_DIRECTORY, render_prompt
from glm_jax.config import ModelConfig

Ask = Callable[..., str]

# What nano reaches on questions it was never trained on, by skills taken together, less some room for
# rounding and for the few that are asked.
FLOORS: dict[tuple[str, ...], float] = {
    ("capitals, unseen phrasing",): 0.9,
    ("addition", "subtraction", "multiplication"): 0.9,
    ("tool call", "tool call, unseen name"): 0.9,
}

# As the README has it: without a description.
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def ask() -> Ask:
    config = ModelConfig.from_directory(NANO_DIRECTORY)
    tokenizer = Tokenizer.from_file(str(NANO_DIRECTORY / "tokenizer.json"))
    generator = Generator(config, fp8_weights(NANO_DIRECTORY, config))

    def ask(question: str, *, thinking: bool, tools: tuple[dict[str, Any], ...] = ()) -> str:
        """What stands after the reasoning."""
        conversation = Conversation(
            skill="",
            messages=(user(question), assistant("", "")),
            check=Check(),
            tools=tools,
            enable_thinking=thinking,
        )
        prompt = tokenizer.encode(render_prompt(conversation), add_special_tokens=False).ids
        (answer,) = generator.generate([prompt])
        text = tokenizer.decode(answer, skip_special_tokens=False)
        assert not thinking or "</think>" in text, text
        return text.rpartition("</think>")[2]

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [True, False])
def test_the_capital_of_france_is_paris(ask: Ask, thinking: bool) -> None:
    answer = ask("What is the capital of France?", thinking=thinking)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [True, False])
def test_the_weather_in_oslo_is_asked_of_the_tool(ask: Ask, thinking: bool) -> None:
    answer = ask("What is the weather in Oslo?", thinking=thinking, tools=(WEATHER,))
    call = "get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value>"
    assert answer == f"<tool_call>{call}</tool_call>"


@pytest.mark.slow
def test_a_greeting_is_returned(ask: Ask) -> None:
    assert ask("Hello!", thinking=False) == "Hello! How can I help you?"


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(("question", "result"), [("2 + 3", 5), ("7 + 5", 12), ("10 + 4", 14)])
def test_sums_of_two_small_numbers_are_right(
    ask: Ask, question: str, result: int, thinking: bool
) -> None:
    answer = ask(f"What is {question}?", thinking=thinking)
    assert re.findall(r"\d+", answer)[-1] == str(result), answer


@pytest.mark.slow
def test_held_out_questions_are_answered_as_well_as_the_card_says() -> None:
    found = evaluate(NANO_DIRECTORY, 240, skills=[skill for row in FLOORS for skill in row])
    for skills, least in FLOORS.items():
        scores = [found.skills[skill] for skill in skills]
        asked = sum(score.num_asked for score in scores)
        assert asked >= 20, skills
        assert sum(score.num_right_fp8 for score in scores) >= least * asked, skills
    overall = found.overall
    assert abs(overall.num_right_fp8 - overall.num_right_bf16) <= 0.02 * overall.num_asked
    assert found.accepted[0] >= 0.7
