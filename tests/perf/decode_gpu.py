"""The whole engine on one H200 or a few: GLM-4.7 at full width and depth, each device with its eighth.

    python tests/perf/decode_gpu.py [--devices N] [--layers N] [--engine DIR] [--json FILE]

Weights are random and made on the devices; prompts are random. Requests go through engine, scheduler,
packing and compiled steps, as the server's do. Each device holds what each of eight has (eighths.py), so
a step does a device's whole work but for the other devices' part of the sums. Prefill is timed on prompts
that are computed; where decoding is timed, prompts are taken as read: their pages hold random keys and
values. Every part that fails says so, and the others go on.
"""

import argparse
import hashlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from checkpoints.dummy import dummy_weights
from glm_jax import environment
from glm_jax import shapes as columns
from glm_jax.aot import saved
from glm_jax.cache import KVCache
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Request, SamplingParams
from glm_jax.kernels import Kernels
from glm_jax.runner import Programs, Runner, compile_steps
from glm_jax.shapes import Phase, StepShapes
from glm_jax.sharding import make_mesh, sharding_for
from glm_jax.steps import StepOptions, lower, step_specs
from tests.perf import step_profile
from tests.perf.eighths import Eighths, eighths, even_loads, held_parts

DTYPE = np.dtype(jnp.bfloat16)
PAGES = np.dtype(jnp.float8_e4m3fn)
_NEW_TOKENS = 40
# A graph ends a turn of the loop over layers before XLA's kernels begin; a stream would not.
OUT_OF_GRAPHS: dict[str, Any] = {"xla_gpu_enable_command_buffer": "", "xla_gpu_enable_pdl": False}
# The file of a step of 64 rows that was compiled so, beside the others.
UNCAPTURED = "decode-64-out-of-graphs"
VOCABULARY = 151_552
_TINY: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "n_routed_experts": 16, "num_experts_per_tok": 2, "head_dim": 32, "max_position_embeddings": 16384,
}  # fmt: skip


class Report:
    """What is found, printed as it comes with the seconds since the start."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._path, self._began, self._seconds = path, time.perf_counter(), seconds
        self._said = self._began
        self.found: dict[str, Any] = {}

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._seconds - (time.perf_counter() - self._began)

    def say(self, text: str) -> None:
        self._said = time.perf_counter()
        print(f"[{self._said - self._began:6.1f}] {text}", flush=True)

    def tell(self, key: str, value: Any) -> None:
        """Takes a result in, and writes all so far."""
        self.found[key] = value
        self.say(f"{key}: {json.dumps(value)}")
        if self._path is not None:
            self._path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def watch(self, seconds: float) -> None:
        """From now on, says where the main thread is when nothing was said for so long."""
        main = threading.main_thread().ident
        assert main is not None

        def look() -> None:
            while True:
                time.sleep(seconds / 4)
                if time.perf_counter() - self._said > seconds:
                    stack = traceback.format_stack(sys._current_frames()[main])
                    self.say("stuck?\n" + "".join(stack[-4:]))

        threading.Thread(target=look, daemon=True).start()

    @contextmanager
    def part(self, name: str, least: float = 0.0):
        """A part whose failure is told and ends nothing; skipped within `least` seconds of the limit."""
        begin = time.perf_counter()
        self.say(f"{name} ...")
        try:
            if self.left < least:
                raise TimeoutError(f"{self.left:.0f} s are left, and it takes {least:.0f}")
            yield
        except Exception as error:
            traceback.print_exc()
            self.tell(f"{name}, failed", f"{type(error).__name__}: {error}"[:600])
        self.found.setdefault("seconds", {})[name] = round(time.perf_counter() - begin, 2)


@dataclass
class AtContext:
    """A runner that computes no prompt: it tells the slots where their sequences are.

    Takes prefill batches of any number of rows, so that all sequences begin in one step.
    """

    runner: Runner
    last_decode: np.ndarray | None = None

    def control(self, controls: np.ndarray) -> None:
        self.runner.control(controls)

    def score(self, batch: np.ndarray, targets: np.ndarray) -> np.ndarray:
        raise AssertionError("nobody asks for scores here")

    def prepare_scores(self) -> None:
        raise AssertionError("nobody asks for scores here")

    def dispatch(self, phase: Phase, batch: np.ndarray) -> Any:
        if phase == "decode":
            self.last_decode = batch
            return self.runner.dispatch(phase, batch)
        ends = batch[batch[:, columns.IS_LAST] == 1]
        slots = self.runner._slots  # no runner sets them but by a step
        tokens, lengths = np.array(slots.tokens), np.array(slots.lengths)
        lengths[ends[:, columns.SLOT]] = ends[:, columns.START] + ends[:, columns.NUM_TOKENS]
        tokens[ends[:, columns.SLOT]] = ends[:, -self.runner.shapes.prefill_tile]
        self.runner._slots = slots._replace(
            tokens=jax.device_put(tokens, slots.tokens.sharding),
            lengths=jax.device_put(lengths, slots.lengths.sharding),
        )
        return np.zeros((columns.NUM_OUTPUTS, len(batch)), np.int32)


@dataclass
class Answers:
    """What a round brought: each request's tokens and log-probabilities, and when they came."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    stamps: list[tuple[float, int]] = field(default_factory=list)
    firsts: dict[str, float] = field(default_factory=dict)
    began: float = 0.0

    def take(self, turn: Any) -> None:
        now = time.perf_counter()
        events = list(getattr(turn, "events", turn))
        told = [(event.request_id, event.token, event.logprob) for event in events]
        if hasattr(turn, "ids"):
            told += zip(turn.ids, turn.tokens, turn.logprobs, strict=True)
        for id, token, logprob in told:
            assert token is not None, f"{id} ended without its tokens: {events}"
            self.tokens.setdefault(id, []).append(int(token))
            self.logprobs.setdefault(id, []).append(float(logprob))
            self.firsts.setdefault(id, now)
        self.stamps.append((now, len(told)))

    def digest(self) -> str:
        """The same for the same bits, also of other processes."""
        told = [(id, self.tokens[id], self.logprobs[id]) for id in sorted(self.tokens)]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def round_of(
    runner: Any, shapes: StepShapes, prompts: dict[str, np.ndarray], new_tokens: int
) -> Answers:
    """All prompts at once through an engine of their own, to the last token of the last."""
    engine = Engine(runner, shapes, 0)
    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.0)
    for id, prompt in prompts.items():
        engine.submit(Request(id=id, prompt=tuple(prompt.tolist()), sampling=sampling))
    engine.stop()
    answers = Answers(began=time.perf_counter())
    engine.run(answers.take)
    return answers


def prompts_of(config: Eighths, number: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """So many random prompts; the same names have the same tokens whatever their number."""
    generators = ((name, np.random.default_rng([seed, name, length])) for name in range(number))
    return {
        str(name): rng.integers(2, config.vocab_size, length, np.int32) for name, rng in generators
    }


class Bench:
    """An engine's parts on the devices, made phase by phase."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report = options, report
        self.mesh = make_mesh(options.devices)
        kernels = Kernels(fused_all_reduce=not options.plain_sums)
        self.how = StepOptions(kv_dtype=PAGES, kernels=kernels)
        changes = _TINY if options.tiny else {}
        self.config = eighths(options.devices, options.layers, **changes)
        self.shapes = shapes_of(options, changes.get("vocab_size", VOCABULARY))
        self.programs = self._load() if options.engine else self._compile()
        specs = step_specs(self.config, self.shapes, DTYPE, self.how)
        with report.part("weights"):
            self.weights = dummy_weights(specs.weights, self.mesh, 0)
            even_loads(self.weights)
            jax.block_until_ready(self.weights)
        num_bytes = sum(weight.nbytes for weight in self.weights.values())
        report.tell("weights", f"{num_bytes / 1e9:.2f} GB")
        with report.part("runner"):
            self.runner = Runner(
                self.config, self.shapes, self.mesh, DTYPE, self.weights, self.programs,
                noise(specs.cache, self.mesh), self.how,
            )  # fmt: skip

    def warm_up(self, phase: Phase) -> None:
        """Runs every step of a phase once, and says what is in memory then."""
        with self.report.part(f"warm-up, {phase}"):
            for bucket in [bucket for bucket in self.programs if bucket[0] == phase]:
                self.report.say(f"first run of {bucket}")
                self.runner.warm_up([bucket])
        self.report.tell(f"memory after {phase}", memory_of(self.mesh))

    def _compile(self) -> Programs:
        def on_compiled(bucket: tuple[Phase, int], seconds: float) -> None:
            self.report.say(f"compiled {bucket} in {seconds:.1f} s")

        with self.report.part("compile"):
            return compile_steps(
                self.config, self.shapes, self.mesh, DTYPE, self.how,
                on_compiled=on_compiled, num_workers=self.options.workers,
            )  # fmt: skip
        raise SystemExit("nothing compiled")

    def _load(self) -> Programs:
        with self.report.part("load"):
            limits = {"layers": self.options.layers}
            loaded = saved.load(
                self.config, self.mesh, DTYPE, limits, self.options.engine, self.how
            )
            self.shapes = loaded.shapes
            return loaded.programs
        return self._compile()

    def uncaptured(self, rows: int) -> Any:
        """A decode step whose kernels no graph holds: loaded where it was compiled before."""
        file = (self.options.engine or Path()) / UNCAPTURED
        if rows == 64 and self.options.engine and file.exists():
            specs = step_specs(self.config, self.shapes, DTYPE, self.how)
            cache = KVCache(0, 0)  # type: ignore[arg-type]
            return serialize_executable.deserialize_and_load(
                file.read_bytes(),
                jax.tree.structure(((specs.weights, cache, specs.slots, 0, 0), {})),
                jax.tree.structure((cache, specs.slots, 0)),
                execution_devices=list(self.mesh.devices.flat),
            )
        lowered = lower(self.config, self.shapes, self.mesh, DTYPE, "decode", rows, self.how)
        return lowered.compile(compiler_options=OUT_OF_GRAPHS)


def shapes_of(options: argparse.Namespace, vocab_size: int) -> StepShapes:
    """Room for as many sequences of the longest context as decode at once at most."""
    page_size = 16 if getattr(options, "tiny", False) else 64
    pages = -(-(max(options.contexts) + 4 * page_size) // page_size)
    return StepShapes(
        num_slots=options.buckets[-1],
        num_pages=options.buckets[-1] * pages,
        page_size=page_size,
        max_seq_len=pages * page_size,
        prefill_tile=2 * page_size,
        prefill_buckets=options.prefill,
        decode_buckets=options.buckets,
        vocab_size=vocab_size,
    )


def noise(spec: Any, mesh: Mesh) -> Callable[[], jax.Array]:
    """A program that makes pages of random FP8 values below 2: what a cache holds costs no time."""

    def make() -> jax.Array:
        bits = jnp.zeros(spec.shape, jnp.uint32)
        for axis in range(len(spec.shape)):
            odd = np.uint32(pow(0x9E3779B1, axis + 1, 1 << 32))
            bits = bits + jax.lax.broadcasted_iota(jnp.uint32, spec.shape, axis) * odd
        bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
        pattern = ((bits >> 24) & 0xBF).astype(jnp.uint8)
        # Without one bit of the exponent nothing is NaN.
        return jax.lax.bitcast_convert_type(pattern, spec.dtype)

    return jax.jit(make, out_shardings=sharding_for(spec.axes, mesh)).lower().compile()


def memory_of(mesh: Mesh) -> dict[str, float]:
    """Of the first device, in GB."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    kept = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    return {name: round(stats[name] / 1e9, 2) for name in kept if name in stats}


def copy_rate() -> float:
    """Bytes per second that a large copy reads and writes on one device."""
    source = jnp.zeros(1 << 28, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(source))
    begin = time.perf_counter()
    for _ in range(20):
        source = copy(source)
    jax.block_until_ready(source)
    return 20 * 2 * source.nbytes / (time.perf_counter() - begin)


def time_prefill(bench: Bench, number: int, length: int) -> None:
    """Prompts computed whole: tokens per second, from the first submit to the last first token."""
    prompts = prompts_of(bench.config, number, length)
    answers = round_of(bench.runner, bench.shapes, prompts, 2)
    seconds = max(answers.firsts.values()) - answers.began
    bench.report.tell(
        f"prefill, {number} x {length}",
        {"tokens_per_second": round(number * length / seconds), "seconds": round(seconds, 4)},
    )


def time_decode(bench: Bench, rows: int, context: int, how: str = "") -> AtContext:
    """Steps of so many sequences around a context: through the engine, and one after another without it."""
    budget = rows * -(-context // bench.shapes.prefill_tile)
    shapes = replace(bench.shapes, prefill_buckets=(budget,))
    runner = AtContext(bench.runner)
    prompts = prompts_of(bench.config, rows, context - _NEW_TOKENS // 2)
    answers = round_of(runner, shapes, prompts, _NEW_TOKENS)
    begun, ended = max(answers.firsts.values()), answers.stamps[-1][0]
    step = (ended - begun) * rows / sum(count for at, count in answers.stamps if at > begun)
    alone = device_step(bench.runner, runner.last_decode)
    bench.report.tell(
        f"decode, {rows} at {context}{how}",
        {
            "ms": round(step * 1e3, 3),
            "tokens_per_second": round(rows / step, 1),
            "device_ms": round(alone * 1e3, 3),
            "bits": answers.digest(),
        },
    )
    return runner


def device_step(runner: Runner, batch: np.ndarray | None, number: int = 15) -> float:
    """Seconds a decode step takes when the next ones are dispatched already."""
    assert batch is not None
    np.asarray(runner.dispatch("decode", batch))
    begin = time.perf_counter()
    outputs = [runner.dispatch("decode", batch) for _ in range(number)]
    jax.block_until_ready(outputs)
    return (time.perf_counter() - begin) / number


def compare_bits(bench: Bench, rows: int, length: int) -> None:
    """Whether answers are the same again, alone, and with steps that no graph holds.

    Together, prompts are computed in the largest prefill step, whose sums over devices are XLA's;
    alone, in the smallest, where sums are fused.
    """
    prompts = prompts_of(bench.config, rows, length, seed=1)
    first = round_of(bench.runner, bench.shapes, prompts, 16)
    tell = bench.report.tell
    again = round_of(bench.runner, bench.shapes, prompts, 16)
    tell("bits", [first.digest(), again.digest()])
    distinct = len({tuple(tokens) for tokens in first.tokens.values()})
    tell("bits, distinct answers", f"{distinct} of {rows}")
    alone = round_of(bench.runner, bench.shapes, {"0": prompts["0"]}, 16)
    tell("bits, alone: tokens", alone.tokens["0"] == first.tokens["0"])
    tell("bits, alone: logprobs", alone.logprobs["0"] == first.logprobs["0"])
    with bench.report.part("out of graphs", least=10):
        bucket = ("decode", bench.shapes.rows("decode", rows))
        usual = bench.programs[bucket]
        bench.programs[bucket] = bench.uncaptured(bucket[1])
        tell("bits, out of graphs", round_of(bench.runner, bench.shapes, prompts, 16).digest())
        time_decode(bench, rows, bench.options.contexts[0], ", out of graphs")
        bench.programs[bucket] = usual


def run(options: argparse.Namespace, report: Report) -> None:
    """Everything, part by part."""
    bench = Bench(options, report)
    if "decode" in options.parts:
        bench.warm_up("decode")
        decode(bench, options)
    if "prefill" in options.parts:
        bench.warm_up("prefill")
        with report.part("prefill"):
            for number, length in options.prompts:
                time_prefill(bench, number, length)
                time_prefill(bench, number, length)
    if "bits" in options.parts:
        with report.part("bits"):
            compare_bits(bench, options.bits_rows, 200)


def decode(bench: Bench, options: argparse.Namespace) -> None:
    """Every number of rows at every context, and some of these step by step."""
    report = bench.report
    with report.part("decode"):
        for context in options.contexts:
            for rows in bench.shapes.decode_buckets:
                last = time_decode(bench, rows, context)
                if rows in options.profiled and context == options.contexts[0]:
                    batch = last.last_decode
                    assert batch is not None
                    with report.part(f"profile of {rows}"):
                        report.tell(
                            f"profile, {rows} at {context}",
                            step_profile.profile(
                                partial(bench.runner.dispatch, "decode", batch), 3
                            ),
                        )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """What decides which steps there are."""
    parser.add_argument("--layers", type=int, default=92)
    parser.add_argument("--buckets", type=numbers, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--prefill", type=numbers, default=(2, 64), help="rows of prefill steps")
    parser.add_argument("--contexts", type=numbers, default=(2048, 8192))
    parser.add_argument("--plain-sums", action="store_true", help="XLA's sums over devices")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    add_shape_options(parser)
    parser.add_argument(
        "--prompts", default="1x2000,1x8000,8x2000", help="prompts that are computed"
    )
    parser.add_argument("--profiled", type=numbers, default=(1, 64, 256), help="rows to take apart")
    parser.add_argument("--bits-rows", type=int, default=64)
    parser.add_argument("--engine", type=Path, help="load steps that were compiled before")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument(
        "--stuck-after", type=float, default=30, help="seconds of silence to a stack trace"
    )
    parser.add_argument("--parts", default="decode,prefill,bits")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.prompts = [tuple(map(int, pair.split("x"))) for pair in options.prompts.split(",")]
    environment.prepare()
    report = Report(options.json, options.seconds)
    report.watch(options.stuck_after)
    report.say(f"{jnp.ones(8).sum()} on {len(jax.devices())} x {jax.devices()[0].device_kind}")
    report.tell("jax", jax.__version__)
    report.tell("device", f"{options.devices} x {jax.devices()[0].device_kind}")
    report.tell("copy, TB/s", round(copy_rate() / 1e12, 3) if not options.tiny else None)
    with held_parts(options.devices):
        run(options, report)
    report.say("done")


if __name__ == "__main__":
    main(sys.argv[1:])
