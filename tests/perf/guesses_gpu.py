"""Guesses and steps in a row on one GPU: their answers against those of single steps, and their time.

    python tests/perf/guesses_gpu.py build DIR [--target h200] [--layers N] [--kinds NAME,…]
    python tests/perf/guesses_gpu.py run DIR [--layers N] [--kinds NAME,…] [--json FILE]

The model is decode_gpu.py's: eighths of GLM-4.7 with random weights, here with the MTP layer. Its guesses
are worth nothing where answers are greedy; where they are drawn at a high temperature, guess and token
are drawn by the same noise and mostly agree: so both paths are taken.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from jax.experimental import serialize_executable

from checkpoints.dummy import dummy_weights
from glm_jax import attention_kernels, environment
from glm_jax import shapes as columns
from glm_jax.aot.topology import mesh_of, stay_off_devices
from glm_jax.cache import KVCache
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.runner import Runner, buckets
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import make_mesh
from glm_jax.steps import StepOptions, lower, step_specs
from glm_jax.targets.target import parse_target
from tests.perf import step_profile
from tests.perf.decode_gpu import (
    DTYPE,
    PAGES,
    VOCABULARY,
    Answers,
    AtContext,
    Report,
    device_step,
    memory_of,
    noise,
    numbers,
    prompts_of,
    shapes_of,
)
from tests.perf.eighths import eighths, even_loads, held_parts

HOW = StepOptions(kv_dtype=PAGES)
# What each kind changes of the shapes of a single step.
KINDS: dict[str, dict[str, int]] = {
    "single": {},
    "guess": {"num_drafts": 1},
    "guess3": {"num_drafts": 3},
    "racing": {"num_drafts": 1},
    "row8": {"decode_steps": 8},
}
# Compiled for one number of rows.
_OF_ONE_SIZE = ("racing", "row8", "guess3")
# Prefill is the same with a kind that takes the same arrays.
_PREFILL = {"racing": "guess", "row8": "single"}
_NEW_TOKENS = 40
_TEMPERATURES = (0.0, 0.0, 1.0, 50.0)


@contextmanager
def racing(does: bool) -> Iterator[None]:
    """Within it, rows of one sequence are written by the kernel in which they attend to each other."""
    right = attention_kernels.write_and_attend

    def wrong(*arguments: Any, rows_per_sequence: int, **options: Any) -> Any:
        return right(*arguments, rows_per_sequence=1, **options)

    with mock.patch.object(attention_kernels, "write_and_attend", wrong if does else right):
        yield


def kinds_of(options: argparse.Namespace) -> dict[str, StepShapes]:
    """The shapes of each kind."""
    shapes = shapes_of(options, VOCABULARY)
    kinds = {name: replace(shapes, **KINDS[name]) for name in options.kinds}
    small = {"num_slots": options.bits_rows, "decode_buckets": (options.bits_rows,)}
    return {n: replace(s, **small) if n in _OF_ONE_SIZE else s for n, s in kinds.items()}


def file_of(kind: str, phase: Phase, rows: int) -> str:
    return f"{_PREFILL.get(kind, kind) if phase == 'prefill' else kind}-{phase}-{rows}"


def build(options: argparse.Namespace) -> None:
    """Compiles the steps of each kind, one file a step."""
    stay_off_devices()
    mesh = mesh_of(parse_target(options.target))
    options.directory.mkdir(parents=True, exist_ok=True)
    with held_parts(mesh.size):
        config = eighths(mesh.size, options.layers, with_mtp=True)
        for kind, shapes in kinds_of(options).items():
            for phase, rows in buckets(shapes):
                if (options.directory / file_of(kind, phase, rows)).exists():
                    continue
                began = time.perf_counter()
                with racing(kind == "racing"):
                    lowered = lower(config, shapes, mesh, DTYPE, phase, rows, HOW)
                lowering = time.perf_counter() - began
                program = lowered.compile()
                blob, _, _ = serialize_executable.serialize(program)
                (options.directory / file_of(kind, phase, rows)).write_bytes(blob)
                (options.directory / f"{kind}-{phase}-{rows}.hlo").write_text(program.as_text())
                seconds, memory = time.perf_counter() - began, program.memory_analysis()
                assert memory is not None
                held = f"{len(blob) / 1e6:.1f} MB, and {memory.temp_size_in_bytes / 1e6:.1f} of temporaries"
                print(
                    f"{kind} {phase} {rows}: {seconds:.0f} s, {lowering:.0f} to lower, {held}",
                    flush=True,
                )


class Fullest(AtContext):
    """Keeps the batch whose rows may gain most."""

    def dispatch(self, phase: Phase, batch: np.ndarray) -> Any:
        before = self.last_decode
        output = super().dispatch(phase, batch)
        if phase == "decode" and before is not None and gains(before) > gains(batch):
            self.last_decode = before
        return output


def gains(batch: np.ndarray) -> int:
    return int(batch[:, columns.NUM_TOKENS].sum())


@dataclass
class Round:
    """Answers, the engine's statistics, and tokens a second from the last first token on."""

    answers: Answers
    stats: Any
    rate: float

    def different(self, other: "Round") -> dict[str, Any]:
        """How many answers, or log-probabilities alone, are not the same bits; and where first."""
        mine, theirs = self.answers, other.answers
        tokens = [id for id in mine.tokens if mine.tokens[id] != theirs.tokens.get(id)]
        either = [id for id in mine.logprobs if mine.logprobs[id] != theirs.logprobs.get(id)]
        firsts = [
            next(
                (
                    i
                    for i, (a, b) in enumerate(
                        zip(mine.logprobs[id], theirs.logprobs[id], strict=False)
                    )
                    if a != b
                ),
                -1,
            )
            for id in either
        ]
        return {
            "answers": len(mine.tokens), "tokens differ": len(tokens), "bits differ": len(either),
            "first at": sorted(firsts)[:8],
        }  # fmt: skip


def ask(
    runner: Any, shapes: StepShapes, prompts: dict[str, np.ndarray], new_tokens: int,
    temperatures: tuple[float, ...] = (0.0,),
) -> Round:  # fmt: skip
    """All prompts at once through an engine of their own; every so many are drawn differently."""
    engine = Engine(runner, shapes, 0)
    for place, (id, prompt) in enumerate(prompts.items()):
        sampling = SamplingParams(
            max_new_tokens=new_tokens,
            temperature=temperatures[place % len(temperatures)],
            seed=place,
        )
        engine.submit(Request(id=id, prompt=tuple(prompt.tolist()), sampling=sampling))
    engine.stop()
    answers = Answers(began=time.perf_counter())
    engine.run(answers.take)
    begun, ended = max(answers.firsts.values()), answers.stamps[-1][0]
    rate = sum(count for at, count in answers.stamps if at > begun) / (ended - begun)
    return Round(answers, engine.stats(), rate)


class Bench:
    """A runner of each kind, on the same weights."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report, self.mesh = options, report, make_mesh(1)
        self.config = eighths(1, options.layers, with_mtp=True)
        self.kinds = kinds_of(options)
        specs = {
            kind: step_specs(self.config, shapes, DTYPE, HOW) for kind, shapes in self.kinds.items()
        }
        with report.part("load"):
            programs = {kind: self._load(kind, specs[kind]) for kind in self.kinds}
        with report.part("weights"):
            wanted = {path: spec for each in specs.values() for path, spec in each.weights.items()}
            weights = dummy_weights(wanted, self.mesh, 0)
            even_loads(weights)
            jax.block_until_ready(weights)
        self.runners: dict[str, Runner] = {}
        with report.part("runners"):
            for kind, shapes in self.kinds.items():
                own = {path: weights[path] for path in specs[kind].weights}
                self.runners[kind] = Runner(
                    self.config, shapes, self.mesh, DTYPE, own, programs[kind],
                    noise(specs[kind].cache, self.mesh), HOW,
                )  # fmt: skip
        report.tell("memory", memory_of(self.mesh))

    def _load(self, kind: str, specs: Any) -> dict[Any, Any]:
        cache = KVCache(0, 0)  # type: ignore[arg-type]
        trees = (
            jax.tree.structure(((specs.weights, cache, specs.slots, 0, 0), {})),
            jax.tree.structure((cache, specs.slots, 0)),
        )
        return {
            (phase, rows): serialize_executable.deserialize_and_load(
                (self.options.directory / file_of(kind, phase, rows)).read_bytes(), *trees,
                execution_devices=list(self.mesh.devices.flat),
            )
            for phase, rows in buckets(self.kinds[kind])
        }  # fmt: skip

    def compare(self, rows: int, length: int, new_tokens: int) -> None:
        """Answers of every kind to the same prompts, against those of single steps."""
        prompts, rounds = prompts_of(self.config, rows, length, seed=1), {}
        for kind, runner in self.runners.items():
            with self.report.part(f"answers, {kind}"):
                rounds[kind] = ask(runner, self.kinds[kind], prompts, new_tokens, _TEMPERATURES)
                stats = rounds[kind].stats
                found = rounds["single"].different(rounds[kind])
                found |= {"offered": stats.num_offered, "gained": stats.num_gained}
                self.report.tell(
                    f"answers, {kind}", found | {"digest": rounds[kind].answers.digest()}
                )
        # What has failed once is not timed.
        self.runners = {kind: self.runners[kind] for kind in rounds}

    def time(self, rows: int, context: int) -> None:
        """Milliseconds a step of every kind, in turns."""
        prompts, batches = prompts_of(self.config, rows, context - _NEW_TOKENS), {}
        for kind, runner in self.runners.items():
            if kind == "racing" or rows not in self.kinds[kind].decode_buckets:
                continue
            budget = rows * -(-context // self.kinds[kind].prefill_tile)
            shapes = replace(self.kinds[kind], prefill_buckets=(budget,))
            at = Fullest(runner)
            rate = ask(at, shapes, prompts, _NEW_TOKENS).rate
            batches[kind] = at.last_decode
            self.report.tell(f"{kind}, {rows} at {context}: engine, tokens/s", round(rate, 1))
        taken: dict[str, list[float]] = {kind: [] for kind in batches}
        for _ in range(5):
            for kind, batch in batches.items():
                taken[kind].append(device_step(self.runners[kind], batch, 8) * 1e3)
        for kind, each in taken.items():
            middle = round(statistics.median(each), 3)
            self.report.tell(
                f"{kind}, {rows} at {context}: ms a step", [middle, round(min(each), 3)]
            )
        for kind in self.options.profiled if rows == self.options.bits_rows else ():
            step = partial(self.runners[kind].dispatch, "decode", batches[kind])
            with self.report.part(f"profile, {kind}"):
                self.report.tell(f"profile, {kind}, {rows}", step_profile.profile(step, 3))


def run(options: argparse.Namespace) -> None:
    """Everything, part by part."""
    environment.prepare()
    report = Report(options.json, options.seconds)
    report.watch(30)
    report.tell("jax", f"{jax.__version__}, {jax.devices()[0].device_kind}")
    with held_parts(1):
        bench = Bench(options, report)
        bench.compare(options.bits_rows, 200, options.new_tokens)
        for rows, context in options.timed:
            with report.part(f"time, {rows} at {context}", least=10):
                bench.time(rows, context)
    report.say("done")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("build", "run"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--layers", type=int, default=92)
    parser.add_argument(
        "--kinds", type=lambda text: text.split(","), default=["single", "guess", "row8"]
    )
    parser.add_argument("--buckets", type=numbers, default=(1, 64, 128))
    parser.add_argument("--prefill", type=numbers, default=(64,))
    parser.add_argument("--contexts", type=numbers, default=(2048, 8192))
    parser.add_argument("--timed", default="64x2048,1x2048,128x2048,64x8192")
    parser.add_argument(
        "--profiled", type=lambda text: text.split(","), default=["single", "guess"]
    )
    parser.add_argument("--bits-rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.timed = [tuple(map(int, pair.split("x"))) for pair in options.timed.split(",")]
    (build if options.what == "build" else run)(options)


if __name__ == "__main__":
    main(sys.argv[1:])
