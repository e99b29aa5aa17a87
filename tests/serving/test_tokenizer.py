"""The tokenizer wrapper: what is a control token, and what a token is in an answer."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models

from serving.tokenizer import ModelTokenizer, Tag
from tests.serving.model_dir import byte_tokenizer
from tests.serving.scripted import TOKENIZER


def test_control_tokens_are_recognized_in_a_raw_prompt_only():
    text = "a<|user|>b<think>"
    assert TOKENIZER.encode(text) == byte_tokenizer().encode(text).ids
    assert {TOKENIZER.control_tokens[t] for t in ("<|user|>", "<think>")} <= set(
        TOKENIZER.encode(text)
    )
    [plain] = TOKENIZER.encode_text([text])
    assert not set(plain) & set(TOKENIZER.control_tokens.values())
    assert b"".join(map(bytes, (TOKENIZER.meaning(token) for token in plain))) == text.encode()  # type: ignore


def test_tags_keep_their_meaning_and_special_tokens_are_silent():
    assert TOKENIZER.meaning(TOKENIZER.control_tokens["</think>"]) is Tag.END_THINK
    assert TOKENIZER.meaning(TOKENIZER.control_tokens["<|user|>"]) == b""
    assert TOKENIZER.meaning(TOKENIZER.control_tokens["/nothink"]) == b"/nothink"
    assert TOKENIZER.meaning(10**6) == b""


def test_every_byte_token_means_its_byte():
    text = bytes(range(256)).decode("latin-1")
    ids = TOKENIZER.encode_text([text])[0]
    assert b"".join(bytes(TOKENIZER.meaning(id)) for id in ids) == text.encode()  # type: ignore


def test_a_tokenizer_without_the_tags_is_refused_by_name():
    description = json.loads(byte_tokenizer().to_str())
    description["added_tokens"] = [
        t for t in description["added_tokens"] if "arg" not in t["content"]
    ]
    with pytest.raises(ValueError, match="<arg_key>, </arg_key>"):
        ModelTokenizer(Tokenizer.from_str(json.dumps(description)))


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    tokenizer = Tokenizer(models.BPE())
    with pytest.raises(ValueError, match="ByteLevel"):
        ModelTokenizer(tokenizer)
    tokenizer.decoder = decoders.WordPiece()  # type: ignore
    with pytest.raises(ValueError, match="ByteLevel"):
        ModelTokenizer(tokenizer)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json does not exist"):
        ModelTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        ModelTokenizer.from_directory(tmp_path)
