"""Tests of nano's data: the split, the answers, the tokens."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from checkpoints.nano_training.conversation import (
    Call,
    Check,
    Conversation,
    assistant,
    tool_result,
    user,
)
from checkpoints.nano_training.data import conversation, conversations
from checkpoints.nano_training.geography import CAPITAL_PHRASINGS, UNSEEN_CAPITAL_PHRASINGS
from checkpoints.nano_training.rendering import (
    NANO_DIRECTORY,
    render,
    render_prompt,
    to_sample,
)
from checkpoints.nano_training.tokenizer import SPECIAL_TOKENS, TAGS, VOCABULARY_SIZE
from checkpoints.nano_training.tool_catalog import FAMILIES
from checkpoints.nano_training.tool_names import FAMOUS, telling_names
from checkpoints.nano_training.world import COUNTRIES

NUM_TRAINED, NUM_HELD_OUT = 4000, 600


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(NANO_DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def trained() -> list[Conversation]:
    return list(conversations(0, NUM_TRAINED))


@pytest.fixture(scope="module")
def held_out() -> list[Conversation]:
    return list(conversations(0, NUM_HELD_OUT, "held out"))


def test_the_same_seed_and_number_give_the_same_conversation() -> None:
    first = [conversation(3, number) for number in range(50)]
    again = [conversation(3, number) for number in reversed(range(50))]
    assert first == again[::-1]
    assert first != [conversation(4, number) for number in range(50)]


def test_no_held_out_question_is_ever_asked_in_training(
    trained: list[Conversation], held_out: list[Conversation]
) -> None:
    # A tool answer is judged on what the tool returned; its question is held out all the same.
    asked = {_ask(each) for each in trained}
    leaked = [ask for ask in map(_ask, held_out) if ask in asked]
    assert not leaked


def test_no_held_out_exchange_is_an_earlier_turn_of_a_training_conversation(
    trained: list[Conversation], held_out: list[Conversation]
) -> None:
    earlier = {
        (_tools(each), message["content"])
        for each in trained
        for message in each.messages
        if message["role"] == "user"
    }
    leaked = [
        each
        for each in held_out
        if each.skill != "system prompt" and (_tools(each), _last_question(each)) in earlier
    ]
    assert not leaked


def test_unseen_phrasings_of_capitals_differ_from_all_seen_ones() -> None:
    seen = {phrasing.lower().rstrip("?.!") for phrasing in CAPITAL_PHRASINGS}
    assert not seen & {phrasing.lower().rstrip("?.!") for phrasing in UNSEEN_CAPITAL_PHRASINGS}


def test_every_reference_answer_passes_its_own_check(
    trained: list[Conversation], held_out: list[Conversation]
) -> None:
    for each in trained[:1000] + held_out:
        completion = render(each).removeprefix(render_prompt(each))
        completion = completion.removesuffix("<|user|>").removesuffix("<|observation|>")
        assert each.check.passes(completion, each.tools), (completion, each.check)


def test_a_wrong_answer_fails_its_check() -> None:
    assert not Check(number=7).passes("3 + 4 = 8")
    assert not Check(contains=("Paris",)).passes("<think>Paris</think>Rome")
    assert not Check(json={"a": 1}).passes('{"a": "1"}')
    assert not Check(equals="Hello").passes("Hello<tool_call>now</tool_call>")
    call = "<tool_call>f<arg_key>n</arg_key><arg_value>2</arg_value></tool_call>"
    properties = {"n": {"type": "integer"}}
    tool = {"function": {"name": "f", "parameters": {"properties": properties}}}
    assert Check(calls=(Call("f", {"n": 2}),)).passes(call, (tool,))
    assert not Check(calls=(Call("f", {"n": "2"}),)).passes(call, (tool,))
    assert not Check(calls=(Call("g", {"n": 2}),)).passes(call, (tool,))


def test_every_skill_is_in_the_evaluation_and_every_country_in_the_training(
    trained: list[Conversation], held_out: list[Conversation]
) -> None:
    skills = Counter(each.skill for each in held_out)
    for skill in {each.skill for each in trained}:
        assert skills[skill] >= 3, skill
    assert skills["tool call, unseen name"] and skills["capitals, unseen phrasing"]
    text = "".join(map(render, trained))
    assert all(country.name in text and country.capital in text for country in COUNTRIES)
    assert len({country.capital for country in COUNTRIES}) == len(COUNTRIES) >= 80


def test_a_tools_name_tells_one_family_and_an_unseen_one_is_made_of_seen_words() -> None:
    family_of: dict[str, str] = {}
    for family in FAMILIES:
        seen = set(telling_names(family, unseen=False))
        unseen = set(telling_names(family, unseen=True))
        assert len(seen) >= 20 and unseen and not seen & unseen, family.topic
        words = {word for name in seen for word in name.split("_")}
        assert all(set(name.split("_")) <= words for name in unseen), family.topic
        for name in seen | unseen:
            assert family_of.setdefault(name, family.topic) == family.topic, name
    assert FAMOUS in telling_names(FAMILIES[0], unseen=False)


def test_training_never_offers_an_unseen_name_and_tools_together_have_names_that_tell(
    trained: list[Conversation], held_out: list[Conversation]
) -> None:
    unseen = {name for family in FAMILIES for name in telling_names(family, unseen=True)}
    telling = {name for family in FAMILIES for name in telling_names(family, unseen=False)} | unseen
    assert not any(name in unseen for each in trained for name in _tools(each))
    assert any(name in unseen for each in held_out for name in _tools(each))
    for each in trained + held_out:
        assert len(_tools(each)) == 1 or set(_tools(each)) <= telling
    assert any(name not in telling for each in trained for name in _tools(each))


def test_a_thought_looks_at_one_tool_on_offer_and_calls_it_if_that_is_for_what_is_wanted(
    trained: list[Conversation],
) -> None:
    thought = re.compile(r'The user wants (.+?)\. "(.+?)": (.+?)\. (?:Call "(.+?)"|No tool)')
    concluded: Counter[bool] = Counter()
    for each in trained:
        for message in each.messages if each.tools else ():
            if found := thought.match(message.get("reasoning_content", "")):
                wanted, looked_at, use, called = found.groups()
                assert looked_at in _tools(each)
                assert called == (looked_at if use == wanted else None)
                calls = message.get("tool_calls", [])
                assert {call["function"]["name"] for call in calls} == (
                    {called} if called else set()
                )
                concluded[bool(called)] += 1
    assert min(concluded[True], concluded[False]) > 200


def test_each_word_of_a_tools_name_is_one_token(tokenizer: Tokenizer) -> None:
    for family in FAMILIES:
        for unseen in (True, False):
            for name in telling_names(family, unseen=unseen):
                tokens = tokenizer.encode(f'"{name}"').tokens[1:-1]
                assert len(tokens) == 1 + name.count("_"), tokens


def test_every_conversation_survives_the_tokenizer_unchanged(
    trained: list[Conversation], tokenizer: Tokenizer
) -> None:
    for each in trained[:1000]:
        tokens = to_sample(each, tokenizer).tokens
        assert tokenizer.decode(list(tokens), skip_special_tokens=False) == render(each)
        assert max(tokens) < VOCABULARY_SIZE + 36


def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    for text in ("Grüße, 世界! 👋🏽", " a  b\t\n\n c ", "x=1;y[2]={3:4}", "ÅÉ привет", "don't", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_stand_alone_and_names_are_the_same_tokens_everywhere(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("4096").tokens == list("4096")
    paris = tokenizer.encode("Paris").ids
    for text in ("in Paris?", '"Paris"', "<arg_value>Paris</arg_value>"):
        ids = tokenizer.encode(text).ids
        assert any(ids[i : i + len(paris)] == paris for i in range(len(ids))), text


def test_the_special_tokens_are_single_ids_in_the_published_order(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(token).ids for token in (*SPECIAL_TOKENS, *TAGS)]
    assert ids == [[VOCABULARY_SIZE + i] for i in range(len(ids))]
    # As far from each other as in the real one: 151329, 151336, 151338, 151350.
    named = ("<|endoftext|>", "<|user|>", "<|observation|>", "<think>")
    places = [ids.index(tokenizer.encode(token).ids) for token in named]
    assert places == [0, 7, 9, 21]


def test_decoding_keeps_the_tags_and_drops_the_turns(tokenizer: Tokenizer) -> None:
    text = "<|assistant|><think>a</think><tool_call>f</tool_call><|observation|>"
    kept = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True)
    assert kept == "<think>a</think><tool_call>f</tool_call>"


def test_transformers_loads_the_tokenizer_and_renders_the_same_prompts(
    held_out: list[Conversation], tokenizer: Tokenizer
) -> None:
    theirs = AutoTokenizer.from_pretrained(NANO_DIRECTORY)
    assert theirs.eos_token == theirs.pad_token == "<|endoftext|>"
    for each in held_out[:100]:
        text = theirs.apply_chat_template(
            list(each.messages[:-1]),
            tools=list(each.tools) or None,
            add_generation_prompt=True,
            enable_thinking=each.enable_thinking,
            clear_thinking=not each.keep_thinking,
            tokenize=False,
        )
        assert text == render_prompt(each)
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids


def test_only_what_the_assistant_says_is_learned(tokenizer: Tokenizer) -> None:
    calls = (Call("now"),)
    conversation = Conversation(
        skill="tool call",
        messages=(
            user("Time?"),
            assistant("Call now.", "", calls),
            tool_result("9:30"),
            assistant("", "It is 9:30."),
        ),
        check=Check(),
    )
    sample = to_sample(conversation, tokenizer)
    spoken = [t if l else -1 for t, l in zip(sample.tokens, sample.learned, strict=True)]
    pieces = "".join(
        " | " if t < 0 else tokenizer.decode([t], skip_special_tokens=False) for t in spoken
    )
    spans = [piece for piece in pieces.split(" | ") if piece]
    assert spans == [
        "Call now.</think><tool_call>now</tool_call><|observation|>",
        "It is 9:30.<|user|>",
    ]


def _ask(each: Conversation) -> str:
    """The prompt up to the end of the last user message, without system prompt and reasoning."""
    return f"{_tools(each)} {_system(each)} {_last_question(each)}"


def _tools(each: Conversation) -> tuple[str, ...]:
    return tuple(tool["function"]["name"] for tool in each.tools)


def _system(each: Conversation) -> str:
    first = each.messages[0]
    return first["content"] if each.skill == "system prompt" and first["role"] == "system" else ""


def _last_question(each: Conversation) -> str:
    return [m["content"] for m in each.messages if m["role"] == "user"][-1]
