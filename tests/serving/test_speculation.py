"""The bundled model with guessed tokens: everything a client can see is what it is without."""

import json
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from glm_jax.engine.request import SamplingParams
from serving.bridge import CannotStartError
from serving.llm import LLM
from tests.serving.live import launched, metric, wait_until_ready

NANO = Path(__file__).parents[2] / "checkpoints" / "nano"
GREEDY = SamplingParams(max_new_tokens=80, temperature=0.0)
DRAWN = SamplingParams(max_new_tokens=80, temperature=1.0, seed=5)
QUESTIONS = [
    [{"role": "user", "content": text}]
    for text in ("What is the capital of France?", "What is 7 + 5?", "Count from 3 to 8.", "Hello!")
]
TIME = {
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
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def load(speculative_tokens: int) -> LLM:
    return LLM(
        NANO,
        max_concurrency=4,
        max_seq_len=256,
        max_batch_tokens=64,
        speculative_tokens=speculative_tokens,
    )


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with load(0) as llm:
        yield llm


@pytest.fixture(scope="module")
def guessing() -> Iterator[LLM]:
    with load(1) as llm:
        yield llm


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_conversations_are_the_same_and_come_in_fewer_steps(
    plain: LLM, guessing: LLM, sampling: SamplingParams
):
    before = guessing.engine.stats()
    found = guessing.chat(QUESTIONS, sampling)
    after = guessing.engine.stats()
    assert list(map(astuple, found)) == list(map(astuple, plain.chat(QUESTIONS, sampling)))
    first, second = (b - a for a, b in zip(before.num_gained, after.num_gained, strict=True))
    assert (first + second) / first > 1.5


def test_streams_with_top_logprobs_are_the_same_token_by_token(plain: LLM, guessing: LLM):
    prompt = guessing.render(QUESTIONS[0]).tokens
    told = replace(DRAWN, num_logprobs=3)
    tokens = list(guessing.stream(prompt, told))
    assert tokens == list(plain.stream(prompt, told))
    assert len(tokens) > 10 and all(len(token.top_logprobs) == 3 for token in tokens)


@pytest.mark.parametrize("start", range(4))
def test_a_stop_string_ends_the_text_in_the_same_place(plain: LLM, guessing: LLM, start: int):
    [free] = plain.generate("Count from 3 to 8.", GREEDY, ignore_eos=True)
    stop = [free.text[start : start + 3]]
    expected, found = (
        llm.generate("Count from 3 to 8.", GREEDY, stop=stop, ignore_eos=True)[0]
        for llm in (plain, guessing)
    )
    assert astuple(found) == astuple(expected) and found.finish_reason == "stop"


def test_tools_are_called_alike(plain: LLM, guessing: LLM):
    asked = [{"role": "user", "content": "What is the weather in Rome?"}]
    fields: dict[str, Any] = {"tools": [TIME], "reasoning_effort": "none"}
    [expected], [found] = (llm.chat(asked, GREEDY, **fields) for llm in (plain, guessing))
    assert astuple(found) == astuple(expected)
    assert [call.name for call in found.calls] == ["get_weather"]


def test_a_look_inside_is_a_look_at_the_decoder(plain: LLM, guessing: LLM):
    assert (plain.forward("Hello").logits == guessing.forward("Hello").logits).all()


def test_a_model_without_an_mtp_layer_is_refused(tmp_path: Path):
    for file in NANO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((NANO / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CannotStartError, match="no MTP layer.*--speculative-tokens"):
        LLM(tmp_path, speculative_tokens=1)


@pytest.mark.slow
def test_a_server_counts_its_guesses_and_keeps_to_grammars():
    flags = ("--num-gpus", "1", "--max-concurrency", "1", "--max-seq-len", "256")
    flags += ("--max-batch-tokens", "64", "--speculative-tokens", "1")
    with launched(NANO, *flags) as server:
        wait_until_ready(server, 300)

        def ask(text: str, **fields: Any) -> str:
            body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
            body |= {"model": "nano", "max_tokens": 80, "reasoning_effort": "none"}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["message"]["content"]

        assert "Paris" in ask("What is the capital of France?")
        drafted = metric(server, "glm_spec_decode_num_draft_tokens_total")
        accepted = metric(server, "glm_spec_decode_num_accepted_tokens_total")
        assert 0 < accepted <= drafted == metric(server, "glm_spec_decode_num_drafts_total")
        by_position = 'glm_spec_decode_num_accepted_tokens_per_pos_total{position="0"}'
        assert metric(server, by_position) == accepted
        described = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}}
        said = json.loads(ask("Tell me of Ann, who is 7.", response_format=described))
        assert said.keys() == {"name", "age"} and isinstance(said["age"], int)
        # Under a grammar a row gains one token a step; nothing is guessed.
        assert metric(server, "glm_spec_decode_num_draft_tokens_total") == drafted
