"""Tokens to deltas: however an answer's tokens come, it reads as what the model meant."""

import json
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.detokenizer import Detokenizer
from serving.parsers import Arguments, ChatParser, Content, Delta, Reasoning, ToolCall, join
from serving.tools import Tools
from tests.serving.scripted import TOKENIZER, tokens

SCHEMAS: dict[str, dict[str, Any]] = {
    "now": {"type": "object", "properties": {}},
    "now_utc": {},
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"enum": ["C", "F"]},
            "options": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        },
    },
}
TOOLS = Tools(
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
)
CHUNKINGS_PER_ANSWER = 20


@dataclass(frozen=True)
class Said:
    """An answer as the model writes it, and what it means."""

    text: str
    reasoning: str
    content: str
    calls: list[tuple[str, dict[str, Any]]]


# Words without tags; é, 日 and 😀 are two, three and four tokens.
WORDS = st.text(st.sampled_from('ab<>/"\\\n é日😀{}'), max_size=12)
VALUES = {
    "city": WORDS,
    "days": st.integers(-5, 10**9),
    "units": st.sampled_from(["C", "F"]),
    "options": st.one_of(
        st.none(), st.dictionaries(WORDS, st.one_of(st.booleans(), WORDS), max_size=2)
    ),
}


def written(value: Any) -> str:
    """A value as the chat template shows the model to write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(SCHEMAS)))
    keys = draw(st.permutations(sorted(SCHEMAS[name].get("properties", {}))))
    return name, {key: draw(VALUES[key]) for key in keys[: draw(st.integers(0, len(keys)))]}


@st.composite
def answers(draw: st.DrawFn) -> Said:
    """An answer to a prompt that ends with <think>."""
    reasoning, content = draw(WORDS), draw(WORDS)
    called = draw(st.lists(calls(), max_size=3))
    ends_at_call = bool(called) and not content and draw(st.booleans())
    text = reasoning + ("" if ends_at_call else "</think>") + content
    for name, arguments in called:
        pairs = "".join(
            f"<arg_key>{key}</arg_key><arg_value>{written(value)}</arg_value>"
            for key, value in arguments.items()
        )
        text += f"<tool_call>{name}{pairs}</tool_call>"
    return Said(text, reasoning.lstrip(), content.lstrip(), called)


def read(chunks: list[list[int]]) -> list[Delta]:
    """The deltas of an answer whose tokens come in these chunks."""
    detokenizer = Detokenizer(TOKENIZER)
    parser = ChatParser(TOOLS, starts_in_reasoning=True)
    deltas: list[Delta] = []
    for chunk in chunks:
        deltas += parser.feed([piece for token in chunk for piece in detokenizer.push(token)])
    deltas += parser.feed(detokenizer.finish())
    return deltas + parser.finish(is_cut=False)


def meaning(deltas: list[Delta]) -> tuple[str, str, list[tuple[str, Any]]]:
    names = [delta.name for delta in deltas if isinstance(delta, ToolCall)]
    arguments = [
        "".join(d.text for d in deltas if isinstance(d, Arguments) and d.index == index)
        for index in range(len(names))
    ]
    return (
        "".join(delta.text for delta in deltas if isinstance(delta, Reasoning)),
        "".join(delta.text for delta in deltas if isinstance(delta, Content)),
        [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)],
    )


def without_ids(deltas: list[Delta]) -> list[Delta]:
    return [ToolCall(d.index, "", d.name) if isinstance(d, ToolCall) else d for d in join(deltas)]


def random_chunks(ids: list[int], rng: random.Random) -> list[list[int]]:
    density = rng.random()
    chunks: list[list[int]] = [[]]
    for token in ids:
        chunks[-1].append(token)
        if rng.random() < density:
            chunks.append([])
    return chunks


@pytest.mark.slow
@settings(max_examples=10_000 // CHUNKINGS_PER_ANSWER)
@given(answers(), st.randoms(use_true_random=False))
def test_ten_thousand_chunkings_read_as_the_whole_and_as_it_was_meant(said, rng):
    ids = tokens(said.text)
    whole = read([ids])
    assert meaning(whole) == (said.reasoning, said.content, said.calls)
    for _ in range(CHUNKINGS_PER_ANSWER):
        assert without_ids(read(random_chunks(ids, rng))) == without_ids(whole)


@settings(max_examples=300)
@given(st.lists(st.integers(0, TOKENIZER.size - 1), max_size=60), st.randoms(use_true_random=False))
def test_tokens_that_mean_nothing_read_the_same_in_any_chunks(ids, rng):
    whole = without_ids(read([ids]))
    assert without_ids(read(random_chunks(ids, rng))) == whole
    assert without_ids(read([[token] for token in ids])) == whole
