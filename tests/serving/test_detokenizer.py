"""Tokens into text: whole characters only, and stop strings wherever they are cut."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.detokenizer import Detokenizer, Piece, StopStrings
from serving.tokenizer import Tag
from tests.serving.model_dir import byte_tokenizer
from tests.serving.scripted import TOKENIZER


def detokenize(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    return [*("".join(detokenizer.push(id)) for id in ids), "".join(detokenizer.finish())]


@given(st.text())
def test_text_comes_back_and_no_piece_has_half_a_character(text: str):
    [ids] = TOKENIZER.encode_text([text])
    pieces = detokenize(ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, TOKENIZER.size - 1), max_size=40))
def test_any_tokens_read_as_the_tokenizers_own_decoder_reads_them(ids: list[int]):
    own = byte_tokenizer()
    names = {id: name for name, id in TOKENIZER.control_tokens.items()}
    # A tag ends a character that was begun; the decoder would see through it.
    parts, part = [], []
    for id in ids:
        if names.get(id) in list(Tag):
            parts += [own.decode(part), names[id]]
            part = []
        else:
            part.append(id)
    assert "".join(detokenize(ids)) == "".join([*parts, own.decode(part)])


def test_a_tag_is_a_piece_of_its_own():
    detokenizer = Detokenizer(TOKENIZER)
    ids = TOKENIZER.encode("é</think>")
    pieces = [piece for id in ids for piece in detokenizer.push(id)]
    assert pieces == ["é", "</think>"]
    assert isinstance(pieces[1], Tag)
    # The same characters as text are no tag.
    [plain] = TOKENIZER.encode_text(["</think>"])
    assert not any(isinstance(p, Tag) for id in plain for p in detokenizer.push(id))


def stop(pieces: list[Piece], stops: list[str], include: bool = False) -> tuple[str, bool]:
    matcher = StopStrings(stops, include=include)
    out: list[Piece] = []
    for piece in pieces:
        out += matcher.push([piece])
        if matcher.matched is not None:
            return "".join(out), True
    return "".join(out + matcher.finish()), False


def expected(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


PIECES = st.lists(st.one_of(st.text("ab<t", max_size=5), st.sampled_from(list(Tag))), max_size=12)


@given(PIECES, st.lists(st.text("ab<t>hink", min_size=1, max_size=4), max_size=3), st.booleans())
def test_output_ends_before_the_first_stop_string_however_it_is_cut(pieces, stops, include):
    text = "".join(pieces)
    assert stop(pieces, stops, include) == expected(text, stops, include)
    assert stop(list(text), stops, include) == expected(text, stops, include)


def test_text_is_held_back_only_while_it_may_be_a_stop_string():
    matcher = StopStrings(["END"])
    assert matcher.push(["aE"]) == ["a"]
    assert matcher.push(["N"]) == []
    assert "".join(matcher.push(["x"])) == "ENx"
    assert matcher.push(["E"]) == []
    assert matcher.finish() == ["E"]


def test_a_tag_passes_the_stop_strings_as_a_tag():
    matcher = StopStrings(["<|", "think>x"])
    pieces = [*matcher.push(["a", Tag.END_THINK]), *matcher.push(["b"])]
    assert pieces == ["a", Tag.END_THINK, "b"]
    assert isinstance(pieces[1], Tag)


def test_the_longest_of_the_stop_strings_that_end_together_counts():
    assert stop(["xaab"], ["b", "aab", "ab"]) == ("x", True)


@pytest.mark.parametrize("length", [200_000])
def test_time_is_linear_even_for_stop_strings_that_nearly_match(length: int):
    started = time.perf_counter()
    text, matched = stop(["a" * 10] * (length // 10), ["a" * 500 + "b"])
    assert not matched
    assert len(text) == length
    assert time.perf_counter() - started < 5
