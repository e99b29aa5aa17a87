"""What guessed tokens bring on the bundled model: `pytest -m perf -s tests/perf/speculation.py`.

Knows no GPU. Everything is measured in one run, one number of guesses after the other: whether the
answers to 200 held-out questions are the same, bit by bit, and how fast one answer comes.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from checkpoints.nano_training.data import conversation
from checkpoints.nano_training.rendering import NANO_DIRECTORY, render_prompt
from glm_jax.engine.request import SamplingParams
from glm_jax.shapes import MAX_DRAFTS
from serving.llm import LLM

pytestmark = pytest.mark.perf

NUM_QUESTIONS, NUM_TIMED = 200, 12
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 350, 120
GREEDY = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
DRAWN = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=11)

Answers = list[tuple[list[int], list[float]]]


@dataclass
class Measured:
    """What one number of guesses gave.

    Attributes:
      greedy, drawn: the answers, as tokens and log-probabilities.
      per_step: tokens that a row gained in a decode step.
      accepted: by place, the share of guesses that were right.
      tokens_per_second: of one answer after another.
    """

    greedy: Answers
    drawn: Answers
    per_step: float
    accepted: list[float]
    tokens_per_second: float


def questions() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(Path(NANO_DIRECTORY) / "tokenizer.json"))
    rendered = (
        tokenizer.encode(render_prompt(conversation(0, i, "held out")), add_special_tokens=False)
        for i in itertools.count()
    )
    short = (each.ids for each in rendered if len(each.ids) <= MAX_PROMPT_TOKENS)
    return list(itertools.islice(short, NUM_QUESTIONS))


def measure(num_drafts: int, prompts: list[list[int]]) -> Measured:
    def answers(llm: LLM, asked: list[list[int]], sampling: SamplingParams) -> Answers:
        return [(each.tokens, each.logprobs) for each in llm.generate(asked, sampling)]

    with LLM(
        NANO_DIRECTORY,
        max_concurrency=8,
        max_seq_len=MAX_PROMPT_TOKENS + MAX_NEW_TOKENS,
        max_batch_tokens=256,
        speculative_tokens=num_drafts,
    ) as llm:
        greedy = answers(llm, prompts, GREEDY)
        stats = llm.engine.stats()
        drawn = answers(llm, prompts, DRAWN)
        seconds, num_tokens = [], 0
        for _ in range(2):
            start = time.perf_counter()
            num_tokens = sum(len(answers(llm, [p], GREEDY)[0][0]) for p in prompts[:NUM_TIMED])
            seconds.append(time.perf_counter() - start)
    gained = stats.num_gained
    return Measured(
        greedy,
        drawn,
        sum(gained) / gained[0],
        [kept / made for made, kept in zip(stats.num_offered, gained, strict=True)][1:],
        num_tokens / min(seconds),
    )


def test_guesses_change_no_answer_and_make_one_alone_faster():
    prompts = questions()
    found = [measure(num_drafts, prompts) for num_drafts in range(MAX_DRAFTS + 1)]
    none = found[0]
    table = Table(
        "guesses", "tokens a step", "right, by place", "tok/s alone", "ratio", "same answers",
        title=f"nano, {len(prompts)} held-out questions", title_justify="left",
    )  # fmt: skip
    for num_drafts, each in enumerate(found):
        same = [
            sum(a == b for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in ((each.greedy, none.greedy), (each.drawn, none.drawn))
        ]
        table.add_row(
            str(num_drafts),
            f"{each.per_step:.2f}",
            ", ".join(f"{share:.1%}" for share in each.accepted),
            f"{each.tokens_per_second:.0f}",
            f"{each.tokens_per_second / none.tokens_per_second:.2f}",
            f"{same[0]} greedy, {same[1]} drawn",
        )
    Console(width=120).print(table)
    assert all((each.greedy, each.drawn) == (none.greedy, none.drawn) for each in found)
    assert found[1].per_step > 1.5
    assert found[1].tokens_per_second > none.tokens_per_second
