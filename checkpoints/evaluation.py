"""What a checkpoint of nano can do: accuracy per skill in FP8 and in bf16, and how often MTP is right.

Knows the product's engine and nano's held-out questions; every answer is generated freely and
greedily, and judged as a client would see it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from checkpoints.acceptance import NUM_DRAFTED, Generated, acceptance
from checkpoints.dequantize import dequantized
from checkpoints.load import load_weights
from checkpoints.nano_training.conversation import Conversation
from checkpoints.nano_training.data import conversation
from checkpoints.nano_training.rendering import render_prompt
from checkpoints.reader import Checkpoint
from glm_jax.config import ModelConfig
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams, TokenEvent
from glm_jax.model import Weights, abstract_weights
from glm_jax.runner import Runner, compile_steps
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh, sharding_for

_SEED = 0
_BF16 = np.dtype(jnp.bfloat16)
_MAX_NEW_TOKENS = 160
# Training drops longer conversations; questions longer than this are not asked.
_MAX_PROMPT_TOKENS = 500
_SLOTS, _PAGE = 64, 64
_SHAPES = StepShapes(
    num_slots=_SLOTS,
    num_pages=_SLOTS * math.ceil((_MAX_PROMPT_TOKENS + _MAX_NEW_TOKENS) / _PAGE),
    page_size=_PAGE,
    max_seq_len=_MAX_PROMPT_TOKENS + _MAX_NEW_TOKENS,
    prefill_tile=16,
    prefill_buckets=(32,),
    decode_buckets=(8, _SLOTS),
)


@dataclass(frozen=True, slots=True)
class Score:
    """How many questions of a skill were answered rightly."""

    num_asked: int
    num_right_fp8: int
    num_right_bf16: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What evaluate() found.

    Attributes:
      skills: by name.
      accepted: for one, two and three drafted tokens, the share of places where all were right.
    """

    skills: dict[str, Score]
    accepted: tuple[float, ...]

    @property
    def overall(self) -> Score:
        """All skills together."""
        scores = self.skills.values()
        return Score(
            sum(score.num_asked for score in scores),
            sum(score.num_right_fp8 for score in scores),
            sum(score.num_right_bf16 for score in scores),
        )

    def to_json(self) -> str:
        """Every number, for programs."""
        skills = {
            skill: {"asked": s.num_asked, "fp8": s.num_right_fp8, "bf16": s.num_right_bf16}
            for skill, s in self.skills.items()
        }
        return json.dumps({"skills": skills, "mtp_accepted": self.accepted}, indent=2)

    def to_table(self) -> str:
        """A Markdown table, for people and for the model card."""
        lines = ["| skill | asked | FP8 | bf16 |", "|---|---:|---:|---:|"]
        for skill, score in [*self.skills.items(), ("all", self.overall)]:
            fp8, bf16 = (
                f"{100 * right / max(score.num_asked, 1):.1f} %"
                for right in (score.num_right_fp8, score.num_right_bf16)
            )
            lines.append(f"| {skill} | {score.num_asked} | {fp8} | {bf16} |")
        shares = ", ".join(f"{100 * share:.1f} %" for share in self.accepted)
        drafted = ", ".join(str(count) for count in range(1, NUM_DRAFTED + 1))
        return "\n".join([*lines, "", f"MTP, all of {drafted} drafted tokens accepted: {shares}"])


class Generator:
    """The product's engine around one set of weights.

    Args:
      config: what the weights are of.
      weights: on one device.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        mesh = make_mesh(1)
        programs = compile_steps(config, _SHAPES, mesh, _BF16)
        self._runner = Runner(config, _SHAPES, mesh, _BF16, weights, programs)
        self._stops = frozenset(config.eos_token_id)

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The greedy completion of each prompt, without the token that ended it."""
        engine = Engine(self._runner, _SHAPES, max_queue=len(prompts))
        sampling = SamplingParams(
            max_new_tokens=_MAX_NEW_TOKENS, temperature=0.0, stop_token_ids=self._stops
        )
        for number, prompt in enumerate(prompts):
            engine.submit(Request(id=str(number), prompt=tuple(prompt), sampling=sampling))
        engine.stop()
        answers: list[list[int]] = [[] for _ in prompts]

        def deliver(events: list[TokenEvent]) -> None:
            for event in events:
                if event.token is not None and event.token not in self._stops:
                    answers[int(event.request_id)].append(event.token)

        engine.run(deliver)
        return answers


def evaluate(directory: Path, limit: int, skills: Collection[str] = ()) -> Evaluation:
    """Asks held-out questions and checks the answers.

    Args:
      directory: an FP8 checkpoint of nano, with its tokenizer.
      limit: questions to ask.
      skills: ask about these only; about all, if empty.

    Raises:
      ConfigError, CheckpointError: the files are broken.
      ValueError: the checkpoint is not FP8.
    """
    config = ModelConfig.from_directory(directory)
    if not config.is_fp8:
        raise ValueError(f"{directory} is not FP8: there is nothing to compare")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    asked = itertools.islice(_questions(tokenizer, skills), limit)
    items, prompts = zip(*asked, strict=True)
    fp8 = Generator(config, fp8_weights(directory, config)).generate(prompts)
    plain = replace(config, is_fp8=False)
    bf16 = Generator(plain, bf16_weights(directory, plain)).generate(prompts)
    scores: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for item, *answers in zip(items, fp8, bf16, strict=True):
        first, second = (is_right(item, tokenizer, answer) for answer in answers)
        scores[item.skill].append((first, second))
    skills = {
        skill: Score(len(pairs), sum(a for a, _ in pairs), sum(b for _, b in pairs))
        for skill, pairs in sorted(scores.items())
    }
    said = [Generated(tuple(p), tuple(a)) for p, a in zip(prompts, bf16, strict=True)]
    return Evaluation(skills, acceptance(directory, config, said))


def is_right(item: Conversation, tokenizer: Tokenizer, answer: Sequence[int]) -> bool:
    """Whether a completion passes the item's check; an unfinished thought is no answer."""
    text = tokenizer.decode(list(answer), skip_special_tokens=False)
    if item.enable_thinking and "</think>" not in text:
        return False
    return item.check.passes(text, item.tools)


def fp8_weights(directory: Path, config: ModelConfig) -> Weights:
    """The checkpoint as it is, on one device."""
    specs = abstract_weights(config, _BF16)
    return load_weights(directory, config, specs, make_mesh(1), progress=False)


def bf16_weights(directory: Path, plain: ModelConfig) -> Weights:
    """The checkpoint with its scales multiplied in, on one device."""
    mesh = make_mesh(1)
    with Checkpoint(directory) as checkpoint:
        arrays = dequantized(checkpoint, plain, {})
    specs = abstract_weights(plain, _BF16)
    return {
        path: jax.device_put(arrays[path], sharding_for(spec.axes, mesh))
        for path, spec in specs.items()
    }


def _questions(
    tokenizer: Tokenizer, skills: Collection[str]
) -> Iterator[tuple[Conversation, list[int]]]:
    """Held-out conversations without end, each with its prompt."""
    for number in itertools.count():
        item = conversation(_SEED, number, "held out")
        if not skills or item.skill in skills:
            prompt = tokenizer.encode(render_prompt(item), add_special_tokens=False).ids
            if len(prompt) <= _MAX_PROMPT_TOKENS:
                yield item, prompt
