"""The model's tokenizer: text into tokens, with or without control tokens, and a token's bytes.

Knows neither conversations nor streams.

Control tokens are all tokens that stand outside the byte-level vocabulary: turns (`<|user|>`),
and the tags of the model's output (`<think>`). In the text of a raw prompt they are recognized;
in what a user says in a conversation they must not be, or anyone could speak as anyone. So there
are two tokenizers: the model's own, and one without any control token, for text that is only text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path

from tokenizers import Tokenizer


class Tag(StrEnum):
    """The control tokens that structure the model's output."""

    THINK = "<think>"
    END_THINK = "</think>"
    CALL = "<tool_call>"
    END_CALL = "</tool_call>"
    KEY = "<arg_key>"
    END_KEY = "</arg_key>"
    VALUE = "<arg_value>"
    END_VALUE = "</arg_value>"


# What a token means in an answer: a tag, or bytes of text (none for a silent control token).
Meaning = Tag | bytes


class _Meanings(dict[int, Meaning]):
    """Fills itself as tokens are asked for: most of a vocabulary never is."""

    def __init__(self, find: Callable[[int], Meaning]) -> None:
        self._find = find

    def __missing__(self, token: int) -> Meaning:
        meaning = self[token] = self._find(token)
        return meaning


class ModelTokenizer:
    """Wraps a byte-level tokenizer that has the model's control tokens.

    Attributes:
      size: token ids are in 0 … size-1.
      control_tokens: text of every control token -> its id.
      control_pattern: matches any control token, in one group.
      longest_token: characters of the longest token; no prompt has fewer tokens than its length
        divided by it.
      meanings: what every token contributes to an answer; ids beyond the vocabulary are silent.

    Raises:
      ValueError: the tokenizer is not byte-level, or a tag is not one of its tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        description = json.loads(tokenizer.to_str())
        if (description["decoder"] or {}).get("type") != "ByteLevel":
            raise ValueError("tokenizer.json: the decoder must be ByteLevel, as GLM's is")
        added = tokenizer.get_added_tokens_decoder()
        self.control_tokens = {token.content: id for id, token in added.items()}
        missing = [tag.value for tag in Tag if tag not in self.control_tokens]
        if missing:
            raise ValueError(f"tokenizer.json: no added tokens {', '.join(missing)}")
        self._tokenizer = tokenizer
        self._silent = {id for id, token in added.items() if token.special}
        self._text_only = Tokenizer.from_str(
            json.dumps({**description, "added_tokens": [], "post_processor": None})
        )
        vocabulary = tokenizer.get_vocab()
        self.size = max(vocabulary.values()) + 1
        self.longest_token = max(map(len, vocabulary))
        # The longest first, so that no token hides one that begins with it.
        names = sorted(self.control_tokens, key=len, reverse=True)
        self.control_pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
        self.meanings = _Meanings(self._bytes)
        self.meanings.update((self.control_tokens[tag], tag) for tag in Tag)

    @classmethod
    def from_directory(cls, model_dir: Path) -> ModelTokenizer:
        """Reads `tokenizer.json` of a model directory.

        Raises:
          ValueError: the file is missing, unreadable, or not a tokenizer this class can wrap.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give the directory of a model")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} cannot be read: {error}") from error
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a raw prompt; control tokens in the text are recognized."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_text(self, texts: Iterable[str]) -> list[list[int]]:
        """Tokens of each text, in which nothing is a control token."""
        encodings = self._text_only.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def meaning(self, token: int) -> Meaning:
        """What a token contributes to an answer; ids beyond the vocabulary are silent."""
        return self.meanings[token]

    def spelling(self, token: int) -> bytes:
        """A token as it would be written, control tokens too; nothing for unknown ids."""
        meaning = self.meanings[token]
        if not meaning:
            return (self._tokenizer.id_to_token(token) or "").encode()
        return meaning if isinstance(meaning, bytes) else meaning.encode()

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, control tokens included."""
        return b"".join(map(self.spelling, tokens)).decode("utf-8", errors="replace")

    def _bytes(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._silent:
            return b""
        try:
            return bytes(_BYTE_OF[char] for char in text)
        except KeyError:  # an added token is written as it is read
            return text.encode()


def _byte_alphabet() -> dict[str, int]:
    # Byte-level BPE writes printable Latin-1 bytes as themselves and the rest from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return alphabet


_BYTE_OF = _byte_alphabet()
