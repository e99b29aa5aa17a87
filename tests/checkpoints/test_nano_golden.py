"""torch and transformers, through compressed-tensors, give nano's own greedy answers.

tests/goldens/README.md says how theirs were made.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from checkpoints.evaluation import Generator, fp8_weights
from checkpoints.nano_training.rendering import NANO_DIRECTORY
from glm_jax.config import ModelConfig
from tests.goldens.nano_prompts import PROMPTS

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "goldens" / "nano_answers.json").read_text(encoding="utf-8")
)
ANSWERS: list[dict[str, Any]] = GOLDEN["answers"]


def test_the_golden_is_of_the_weights_that_are_there() -> None:
    weights = (NANO_DIRECTORY / "model-00001-of-00001.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == GOLDEN["weights_sha256"]


def test_the_prompts_are_rendered_as_they_were() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NANO_DIRECTORY)
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        tokens = tokenizer.apply_chat_template(
            prompt["messages"],
            tools=prompt["tools"] or None,
            enable_thinking=prompt["enable_thinking"],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert tokens == answer["prompt"]


@pytest.mark.slow
def test_the_engine_answers_as_transformers_does() -> None:
    config = ModelConfig.from_directory(NANO_DIRECTORY)
    generator = Generator(config, fp8_weights(NANO_DIRECTORY, config))
    ours = generator.generate([answer["prompt"] for answer in ANSWERS])
    stops = set(config.eos_token_id)
    for tokens, answer in zip(ours, ANSWERS, strict=True):
        *said, last = answer["answer"]
        assert last in stops
        assert tokens == said, answer["text"]
