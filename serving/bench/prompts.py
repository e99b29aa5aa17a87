"""What is asked: random prompts, prompts that share a beginning, prompts from a file.

Knows neither servers nor time. Prompts are pure functions of the seed and of their number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# Every vocabulary has these, and as plain text; with a tokenizer at hand all of it is used.
_TOKENS_WITHOUT_TOKENIZER = range(100, 1000)

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How long prompts and answers are.

    Attributes:
      prompt_len, output_len: in tokens.
      range_ratio: lengths are drawn evenly from len * (1 - ratio) … len * (1 + ratio).
      prefix_len: tokens of the prompt that prompts of one group share.
      num_prefixes: groups.
    """

    prompt_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    num_prefixes: int = 1

    def __post_init__(self) -> None:
        if self.prefix_len >= self.prompt_len * (1 - self.range_ratio):
            raise ValueError(f"{self.prefix_len=} leaves no token of a prompt its own")


class Vocabulary:
    """The tokens that random prompts are drawn from.

    Args:
      directory: of a model, with its tokenizer.json; None: tokens that every vocabulary has.

    Raises:
      ValueError: the directory has no tokenizer.json.
    """

    def __init__(self, directory: Path | None) -> None:
        self._tokenizer: Tokenizer | None = None
        self.tokens = _TOKENS_WITHOUT_TOKENIZER
        if directory is not None:
            path = directory / "tokenizer.json"
            if not path.is_file():
                raise ValueError(f"{path} does not exist")
            self._tokenizer = Tokenizer.from_file(str(path))
            added = self._tokenizer.get_added_tokens_decoder()
            # Control tokens stand behind the text in every published GLM.
            end = min(added, default=self._tokenizer.get_vocab_size())
            self.tokens = range(end)

    def text(self, tokens: list[int]) -> str:
        """The text of tokens.

        Raises:
          ValueError: there is no tokenizer.
        """
        if self._tokenizer is None:
            raise ValueError("random prompts for the chat endpoint need --tokenizer")
        return self._tokenizer.decode(tokens)


def random_prompts(
    shape: Shape, vocabulary: Vocabulary, *, seed: tuple[int, ...], is_chat: bool
) -> Iterator[Fields]:
    """Prompts without end, each of tokens drawn evenly; answers run to their full length.

    As text (for chat) a prompt's length is only about what was asked; the server's usage tells it.
    """
    draw = np.random.default_rng(seed)
    first, last = vocabulary.tokens[0], vocabulary.tokens[-1]
    prefixes = draw.integers(first, last + 1, (shape.num_prefixes, shape.prefix_len))
    while True:
        prefix = prefixes[draw.integers(shape.num_prefixes)].tolist()
        length = _length(draw, shape.prompt_len, shape.range_ratio) - shape.prefix_len
        tokens = prefix + draw.integers(first, last + 1, length).tolist()
        output_len = _length(draw, shape.output_len, shape.range_ratio)
        if is_chat:
            yield {
                "messages": [{"role": "user", "content": vocabulary.text(tokens)}],
                "max_tokens": output_len,
            }
        else:
            yield {"prompt": tokens, "max_tokens": output_len}


def _length(draw: np.random.Generator, length: int, ratio: float) -> int:
    low, high = int(length * (1 - ratio)), int(length * (1 + ratio))
    return max(1, int(draw.integers(low, high + 1)))


def read_prompts(path: Path, output_len: int) -> list[Fields]:
    """The prompts of a file of JSON lines, all for one endpoint.

    Each line has `messages`, or `prompt` (text or token ids); further fields (`max_tokens`,
    `tools`, …) go to the server as they are.

    Raises:
      ValueError: a line is no such object, or some have messages and some a prompt.
    """
    prompts: list[Fields] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(fields, dict) or ("messages" in fields) == ("prompt" in fields):
            raise ValueError(f"{path}, line {number}: needs either messages or prompt")
        prompts.append({"max_tokens": output_len, **fields})
    if not prompts:
        raise ValueError(f"{path} has no prompt")
    if len({"messages" in fields for fields in prompts}) == 2:
        raise ValueError(f"{path} mixes messages and prompts; they go to different endpoints")
    return prompts


def cycled(prompts: list[Fields], first: int) -> Iterator[Fields]:
    """The prompts over and over, beginning with number `first`."""
    return itertools.islice(itertools.cycle(prompts), first % len(prompts), None)


# Prompts for the runs of a sweep, told the number of the run.
MakePrompts = Callable[[int], Iterator[Fields]]
