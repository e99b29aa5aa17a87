"""The training samples, made by as many processes as there are cores.

Knows which conversations are asked for, not how they become rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from tokenizers import Tokenizer

from checkpoints.nano_training.data import conversation
from checkpoints.nano_training.rendering import Sample, to_sample

_PART = 500


def make_samples(
    directory: Path, seed: int, count: int, num_processes: int | None = None
) -> Iterator[Sample]:
    """The first `count` training conversations in order, whatever process made them.

    Args:
      directory: has a tokenizer.json.
      num_processes: as many as there are cores, if None.
    """
    work = partial(_part, directory, seed)
    starts = range(0, count, _PART)
    # Not forked: the caller may already run threads of JAX.
    context = get_context("spawn")
    with ProcessPoolExecutor(num_processes or os.cpu_count(), mp_context=context) as pool:
        for part in pool.map(work, starts):
            yield from islice(part, count)
            count -= len(part)


def _part(directory: Path, seed: int, start: int) -> list[Sample]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    numbers = range(start, start + _PART)
    return [to_sample(conversation(seed, number), tokenizer) for number in numbers]
