"""Tokens into text, incrementally; stop strings.

Knows neither HTTP nor the output grammar: tags pass through as they are.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable

from serving.tokenizer import ModelTokenizer, Tag

# A piece of output: a Tag (which is a str too), or text without tags.
Piece = str


class Detokenizer:
    """Turns the tokens of one answer into pieces, each byte looked at once.

    A character whose bytes are spread over tokens comes out whole with its last byte. Bytes that
    can be no UTF-8 become U+FFFD, as in the tokenizer's own decoder.

    Attributes:
      meanings: of tokens, as the tokenizer has them.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self.meanings = tokenizer.meanings
        self._undecoded = b""  # the beginning of a character

    def push(self, token: int) -> list[Piece]:
        """The pieces that this token completes; often one, sometimes none."""
        meaning = self.meanings[token]
        if isinstance(meaning, Tag):
            return [*self.finish(), meaning]
        return self.push_bytes(meaning)

    def push_bytes(self, data: bytes) -> list[Piece]:
        """The piece that the bytes of any number of tokens complete, if they complete one."""
        data = self._undecoded + data
        text, num_decoded = codecs.utf_8_decode(data, "replace", False)
        self._undecoded = data[num_decoded:]
        return [text] if text else []

    def finish(self) -> list[Piece]:
        """What an unfinished character leaves behind."""
        text = self._undecoded.decode(errors="replace")
        self._undecoded = b""
        return [text] if text else []


class StopStrings:
    """Ends the output at the first stop string, wherever the pieces are cut.

    Text that may be the beginning of a stop string is held back until that is decided. Tags are
    text here: a stop string can match them, wholly or in part. Of stop strings that end at the
    same character the longest counts. Takes time linear in the text, per stop string.

    Args:
      stops: the strings, none empty.
      include: whether the matched string stays in the output.

    Attributes:
      has_any: whether there is a stop string at all.
      matched: the stop string that ended the output; None so far.
    """

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        self._stops = [_Matcher(stop) for stop in stops]
        self.has_any = bool(self._stops)
        self._include = include
        self._held: deque[Piece] = deque()
        self._num_held = 0  # characters in _held
        self.matched: str | None = None

    def push(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces that are certain now. After a match nothing more may be pushed."""
        if not self.has_any:
            return pieces
        released: list[Piece] = []
        for piece in pieces:
            self._held.append(piece)
            for index, char in enumerate(piece):
                length = max([stop.advance(char) for stop in self._stops])
                if length:
                    self.matched = next(
                        m.stop for m in self._stops if m.length == len(m.stop) == length
                    )
                    end = self._num_held + index + 1
                    released += self._release(end if self._include else end - length)
                    self._held.clear()
                    self._num_held = 0
                    return released
            self._num_held += len(piece)
            undecided = max(stop.length for stop in self._stops)
            released += self._release(self._num_held - undecided)
        return released

    def finish(self) -> list[Piece]:
        """What was held back, once no more can come."""
        return self._release(self._num_held)

    def _release(self, length: int) -> list[Piece]:
        # A tag leaves whole or, when a match cuts it, as mere text.
        released: list[Piece] = []
        while length > 0:
            piece = self._held.popleft()
            if len(piece) > length:
                if isinstance(piece, Tag) and self.matched is None:
                    self._held.appendleft(piece)
                    break
                self._held.appendleft(piece[length:])
                piece = piece[:length]
            released.append(piece)
            length -= len(piece)
            self._num_held -= len(piece)
        return released


class _Matcher:
    """Knuth, Morris and Pratt's automaton of one stop string.

    Attributes:
      length: how many of the string's first characters the text so far ends with.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        # borders[n]: length of the longest proper border of the first n characters.
        self._borders = [0] * (len(stop) + 1)
        border = 0
        for end in range(1, len(stop)):
            while border and stop[end] != stop[border]:
                border = self._borders[border]
            border += stop[end] == stop[border]
            self._borders[end + 1] = border
        self.length = 0

    def advance(self, char: str) -> int:
        """Takes one character; the string's length if that completes it, else 0."""
        length = self.length
        while length and self.stop[length] != char:
            length = self._borders[length]
        self.length = length + (self.stop[length] == char)
        return self.length if self.length == len(self.stop) else 0
