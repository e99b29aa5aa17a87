"""All answers to one request as they are made: several prompts, several choices, the best of them.

Knows neither HTTP nor JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from glm_jax.engine.request import PromptLogprob
from serving.answer import Answer, Finish, Part, Sampled, Usage
from serving.metrics import Times
from serving.parsers import Delta


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer, complete.

    Attributes:
      deltas, tokens: of all its parts.
      finish: how it ended.
      prompt: the prompt's tokens but the first, if they are wanted.
    """

    deltas: list[Delta]
    tokens: list[Sampled]
    finish: Finish
    prompt: tuple[PromptLogprob, ...] = ()


class Reply:
    """Iterate it once, or take its choices, inside a `with`.

    Leaving the `with` early cancels what still runs.

    Args:
      id: the request's.
      answers: of each prompt in turn, as many as there are candidates.
      num_candidates, num_choices: per prompt; fewer choices are the best of the candidates.
    """

    def __init__(
        self, id: str, answers: Sequence[Answer], *, num_candidates: int = 1, num_choices: int = 1
    ) -> None:
        self.id = id
        self._answers = answers
        self._num_candidates = num_candidates
        self._num_choices = num_choices
        self._exits = ExitStack()

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all answers together."""
        if len(self._answers) == 1:
            return self._answers[0].usage
        return sum((answer.usage for answer in self._answers), Usage(0))

    @property
    def finish_reasons(self) -> list[str | None]:
        """How the answers have ended, in their order; None: not, or not yet."""
        return [answer.finish and answer.finish.reason for answer in self._answers]

    @property
    def times(self) -> list[Times]:
        """When the parts of each answer began."""
        return [answer.times for answer in self._answers]

    def __enter__(self) -> Self:
        for answer in self._answers:
            self._exits.enter_context(answer)
        return self

    def __exit__(self, *exception) -> None:
        self._exits.__exit__(*exception)

    def nudge(self) -> None:
        """Makes the iteration yield now, with an empty part if nothing has come."""
        self._answers[0].nudge()

    def parts(self) -> AsyncGenerator[tuple[int, Part]]:
        """The parts of all answers as they come, each with the index of its answer.

        Raises, while iterating:
          ApiError: 500, the engine failed.
        """
        # One answer's parts pass through no generator but its own.
        return self._answers[0].parts() if len(self._answers) == 1 else self._merged()

    async def _merged(self) -> AsyncGenerator[tuple[int, Part]]:
        queue: asyncio.Queue[tuple[int, Part | Exception]] = asyncio.Queue()

        async def pump(index: int, answer: Answer) -> None:
            try:
                async for indexed in answer.parts(index):
                    queue.put_nowait(indexed)
            except Exception as error:
                queue.put_nowait((index, error))

        pumps = [asyncio.create_task(pump(*entry)) for entry in enumerate(self._answers)]
        try:
            unfinished = len(pumps)
            while unfinished:
                index, part = await queue.get()
                if isinstance(part, Exception):
                    raise part
                unfinished -= part.finish is not None
                yield index, part
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def choices(self) -> list[Choice]:
        """The answers, complete.

        Raises:
          ApiError: 500, the engine failed.
        """
        deltas: list[list[Delta]] = [[] for _ in self._answers]
        tokens: list[list[Sampled]] = [[] for _ in self._answers]
        async for index, part in self.parts():
            deltas[index] += part.deltas
            tokens[index] += part.tokens
        finishes = [answer.finish for answer in self._answers]
        return [
            Choice(deltas[index], tokens[index], finish, self._answers[index].prompt_logprobs)
            for index in self._best()
            if (finish := finishes[index]) is not None
        ]

    def _best(self) -> list[int]:
        """The answers to give, per prompt the likeliest by the mean over its tokens."""
        every = range(len(self._answers))
        if self._num_choices == self._num_candidates:
            return list(every)

        def mean_logprob(index: int) -> float:
            answer = self._answers[index]
            return answer.logprob / max(1, answer.usage.completion_tokens)

        groups = [every[i : i + self._num_candidates] for i in every[:: self._num_candidates]]
        return [
            index
            for group in groups
            for index in sorted(group, key=mean_logprob, reverse=True)[: self._num_choices]
        ]
