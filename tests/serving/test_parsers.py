"""GLM's output grammar: every shape of answer, cut anywhere."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.detokenizer import Piece
from serving.parsers import (
    Arguments,
    ChatParser,
    Content,
    Delta,
    Reasoning,
    TextParser,
    ToolCall,
    join,
)
from serving.tokenizer import Tag
from serving.tools import Tools
from tests.serving.scripted import TOKENIZER

TOOLS = Tools(
    {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
    for name, properties in (
        ("weather", {"city": {"type": "string"}, "days": {"type": "integer"}}),
        ("now", {}),
        ("now_utc", {}),
    )
)


def pieces_of(text: str) -> list[Piece]:
    parts = TOKENIZER.control_pattern.split(text)
    return [Tag(part) if part in list(Tag) else part for part in parts if part]


def fold(deltas: list[Delta]) -> list:
    """Deltas as tuples, each call with all its arguments, ids left out."""
    folded: list = []
    for delta in join(deltas):
        match delta:
            case Content(text) | Reasoning(text):
                folded.append((type(delta).__name__.lower(), text))
            case ToolCall(index, _, name):
                folded.append(("call", index, name, ""))
            case Arguments(index, text):
                assert folded[-1][:2] == ("call", index)
                folded[-1] = (*folded[-1][:3], folded[-1][3] + text)
    return folded


def parse(
    text: str | list[Piece],
    *,
    tools: Tools | None = TOOLS,
    thinks: bool = False,
    is_cut: bool = False,
    max_calls: int | None = None,
) -> list:
    parser = ChatParser(tools, starts_in_reasoning=thinks, max_calls=max_calls)
    deltas = parser.feed(pieces_of(text) if isinstance(text, str) else text)
    return fold(deltas + parser.finish(is_cut=is_cut))


CALL = "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"


@pytest.mark.parametrize(
    ("text", "thinks", "expected"),
    [
        ("Hi", False, [("content", "Hi")]),
        ("  Hi ", False, [("content", "  Hi ")]),
        ("Hm.</think>Hi", True, [("reasoning", "Hm."), ("content", "Hi")]),
        ("\nHm.</think>\n\nHi", True, [("reasoning", "Hm."), ("content", "Hi")]),
        ("</think>Hi", True, [("content", "Hi")]),
        ("</think>Hi", False, [("content", "Hi")]),
        ("Hm", True, [("reasoning", "Hm")]),
        ("<think>Hm</think>Hi", True, [("reasoning", "Hm"), ("content", "Hi")]),
        ("<think>Hm</think>Hi", False, [("reasoning", "Hm"), ("content", "Hi")]),
        ("<tool_call>now</tool_call>", False, [("call", 0, "now", "{}")]),
        ("<tool_call>\nnow\n</tool_call>", False, [("call", 0, "now", "{}")]),
        ("Hm" + CALL, True, [("reasoning", "Hm"), ("call", 0, "weather", '{"city": "Oslo"}')]),
        ("Ok.\n" + CALL, False, [("content", "Ok.\n"), ("call", 0, "weather", '{"city": "Oslo"}')]),
        (
            f"</think>\n{CALL}\n<tool_call>now</tool_call>\n",
            True,
            [("call", 0, "weather", '{"city": "Oslo"}'), ("call", 1, "now", "{}")],
        ),
        (
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>a \"b\"\n c</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
            False,
            [("call", 0, "weather", '{"city": "a \\"b\\"\\n c", "days": 2}')],
        ),
        # What the model should not do.
        ("<tool_call>no_such</tool_call>", False, [("content", "<tool_call>no_such</tool_call>")]),
        (
            "<tool_call>no<arg_key>k</arg_key></tool_call>!",
            False,
            [("content", "<tool_call>no<arg_key>k</arg_key></tool_call>!")],
        ),
        ("<tool_call>now<tool_call>now</tool_call>", False,
         [("content", "<tool_call>now"), ("call", 0, "now", "{}")]),
        (CALL.replace("</arg_value>", ""), False, [("call", 0, "weather", '{"city": "Oslo"}')]),
        (CALL.replace("</arg_key>", ""), False, [("call", 0, "weather", '{"city": "Oslo"}')]),
        ("<tool_call>weather<arg_key>city</tool_call>", False, [("call", 0, "weather", "{}")]),
        ("<tool_call>weather<arg_key>a</arg_key></tool_call>", False, [("call", 0, "weather", "{}")]),
        (
            CALL.replace("</tool_call>", "") + "<tool_call>now</tool_call>",
            False,
            [("call", 0, "weather", '{"city": "Oslo"}'), ("call", 1, "now", "{}")],
        ),
        (
            CALL.replace("Oslo", "a</think><arg_key>b"),
            False,
            [("call", 0, "weather", '{"city": "a</think><arg_key>b"}')],
        ),
        ("a</arg_value>b", False, [("content", "a</arg_value>b")]),
        # Ended by a stop token before its end.
        ("<tool_call>now", False, [("call", 0, "now", "{}")]),
        (CALL.replace("</tool_call>", ""), False, [("call", 0, "weather", '{"city": "Oslo"}')]),
        ("<tool_call>weather<arg_key>city</arg_key><arg_value>Os", False,
         [("call", 0, "weather", '{"city": "Os"}')]),
    ],
)  # fmt: skip
def test_an_answer_is_taken_apart(text, thinks, expected):
    assert parse(text, thinks=thinks) == expected


def test_an_answer_cut_by_the_length_limit_claims_nothing_it_has_not_seen():
    assert parse("<tool_call>now", is_cut=True) == [("content", "<tool_call>now")]
    begun = "<tool_call>weather<arg_key>city</arg_key><arg_value>Os"
    assert parse(begun, is_cut=True) == [("call", 0, "weather", '{"city": "Os')]
    begun = "<tool_call>weather<arg_key>days</arg_key><arg_value>1"
    assert parse(begun, is_cut=True) == [("call", 0, "weather", '{"days": ')]


def test_without_tools_calls_are_text():
    text = "<tool_call>now</tool_call>"
    assert parse(text, tools=None) == [("content", text)]
    assert parse(f"a{text}", tools=None, thinks=True) == [("reasoning", f"a{text}")]


def test_after_the_last_allowed_call_nothing_follows():
    text = f"{CALL}<tool_call>now</tool_call>rest"
    assert parse(text, max_calls=1) == [("call", 0, "weather", '{"city": "Oslo"}')]


def test_tags_written_as_text_are_text():
    assert parse(["</think>a<tool_call>now</tool_call>"]) == [
        ("content", "</think>a<tool_call>now</tool_call>")
    ]


def test_a_name_comes_once_and_whole_and_ids_differ():
    parser = ChatParser(TOOLS, starts_in_reasoning=False)
    deltas = [
        delta
        for piece in [Tag.CALL, "wea", "ther", Tag.KEY, "city", Tag.END_KEY, Tag.VALUE, "O", "slo"]
        for delta in parser.feed([piece])
    ]
    assert isinstance(deltas[0], ToolCall)
    assert deltas[0].name == "weather"
    assert [d.text for d in deltas[1:] if isinstance(d, Arguments)] == ['{"city": "', "O", "slo"]
    other = ChatParser(TOOLS, starts_in_reasoning=False)
    [call] = [d for d in other.feed(pieces_of(CALL)) if isinstance(d, ToolCall)]
    assert call.id != deltas[0].id


OUTPUTS = st.lists(
    st.one_of(
        st.sampled_from([*Tag, "weather", "now", "city", "days", "2", " ", "\n", "nul", "l"]),
        st.text('ab "\\\n é😀', max_size=6),
    ),
    max_size=25,
)


@given(OUTPUTS, st.data(), st.booleans(), st.booleans(), st.sampled_from([None, 1]))
def test_where_the_output_is_cut_changes_nothing(pieces, data, thinks, is_cut, max_calls):
    options = {"thinks": thinks, "is_cut": is_cut, "max_calls": max_calls}
    merged: list[Piece] = []
    for piece in pieces:  # the longest pieces there can be
        if merged and not isinstance(piece, Tag) and not isinstance(merged[-1], Tag):
            merged[-1] += piece
        else:
            merged.append(piece)
    cut: list[Piece] = []
    for piece in merged:
        if isinstance(piece, Tag):
            cut.append(piece)
        else:
            ends = data.draw(st.sets(st.integers(0, len(piece)), max_size=3))
            cut += [piece[a:b] for a, b in pairwise(sorted({0, *ends, len(piece)}))]
    whole = parse(merged, **options)
    assert parse(cut, **options) == whole
    for entry in whole:
        if entry[0] == "call" and not is_cut:
            assert isinstance(json.loads(entry[3]), dict)
            assert entry[2] in TOOLS


@given(OUTPUTS)
def test_a_raw_completion_is_its_text(pieces):
    parser = TextParser()
    deltas = [delta for piece in pieces for delta in parser.feed([piece])]
    assert "".join(delta.text for delta in deltas if isinstance(delta, Content)) == "".join(pieces)
    assert parser.finish(is_cut=False) == []
