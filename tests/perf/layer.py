"""Times decode steps of a few layers at the shapes of one of eight devices, against what the card can do.

    python tests/perf/layer.py [--devices N] [--layers N,…] [--rows N,…] [--context N] [--json FILE]
    python tests/perf/layer.py --build DIR [--target h200] …    # compiles for GPUs that are not there
    python tests/perf/layer.py --programs DIR …                 # and takes what was compiled so

A layer's time is the difference of steps of few and of many layers, as XLA captures them, with its share of
the loop over layers; and the same of steps whose kernels do not overlap (alone.py). In those CUPTI counts what
each kernel takes, and the rest is launches and gaps. Each device has what it has in the deployment
(eighths.py): one KV head with its 12 query heads, 20 of the 160 experts that the router knows, an eighth of
the shared expert and of the vocabulary. Knows no kernel.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints.dummy import dummy_weights
from glm_jax import shapes as columns
from glm_jax.aot.topology import mesh_of, stay_off_devices
from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh, sharding_for
from glm_jax.steps import Slots, StepOptions, lower, step_specs
from glm_jax.targets.target import parse_target
from tests.perf import layer_floors
from tests.perf.alone import alone
from tests.perf.card import Card, measure_copy
from tests.perf.clock import blocker
from tests.perf.clock import profile as kernel_times
from tests.perf.eighths import eighths, even_loads, held_parts

_DTYPE = np.dtype(jnp.bfloat16)
_OPTIONS = StepOptions(kv_dtype=np.dtype(jnp.float8_e4m3fn))
# Steps of a round, few and many; milliseconds that the device has other work before them.
_FEW, _MANY, _BLOCKED = 2, 14, 40.0
_ROUNDS, _MARGIN = 5, 192
_OURS = "_mosaic_gpu_kernel"


class State(NamedTuple):
    """What a step is given and gives back."""

    cache: KVCache
    slots: Slots


class Decoding:
    """Decode steps of a model of random weights, every row at the same context."""

    def __init__(
        self, mesh: Mesh, num_layers: int, rows: int, context: int, programs: Path | None = None
    ) -> None:
        self.mesh, self.rows, self.context = mesh, rows, context
        self.config, self.shapes = model_of(mesh, num_layers, rows, context)
        pages = self.shapes.max_seq_len // self.shapes.page_size
        self.specs = step_specs(self.config, self.shapes, _DTYPE, _OPTIONS)
        self.weights = dummy_weights(self.specs.weights, mesh, 0)
        even_loads(self.weights)
        replicated = NamedSharding(mesh, PartitionSpec())
        batch = np.zeros((rows, self.shapes.columns("decode")), np.int32)
        batch[:, columns.SLOT] = np.arange(rows)
        batch[:, columns.NUM_TOKENS] = 1
        table = np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages)
        batch[:, columns.NUM_FIELDS : columns.NUM_FIELDS + pages] = table
        controls = np.zeros((rows, self.shapes.control_columns), np.int32)
        self.inputs = [jax.device_put(array, replicated) for array in (controls, batch)]
        self.program, self.alone = (
            self.load(programs, is_alone) if programs else self.compile(is_alone)
            for is_alone in (False, True)
        )

    def compile(self, is_alone: bool) -> Callable[..., Any]:
        """The step, compiled as a deployment has it or of kernels that do not overlap."""
        with alone() if is_alone else nullcontext():
            step = lower(self.config, self.shapes, self.mesh, _DTYPE, "decode", self.rows, _OPTIONS)
        return step.compile()

    def load(self, programs: Path, is_alone: bool) -> Callable[..., Any]:
        """The step that build compiled."""
        cache = KVCache(0, 0)  # type: ignore[arg-type]
        return serialize_executable.deserialize_and_load(
            (programs / file_of(self.config.num_hidden_layers, self.rows, is_alone)).read_bytes(),
            jax.tree.structure(((self.specs.weights, cache, self.specs.slots, 0, 0), {})),
            jax.tree.structure((cache, self.specs.slots, 0)),
            execution_devices=list(self.mesh.devices.flat),
        )

    def start(self) -> State:
        """Random pages and tokens, and room for as many steps as are timed."""

        def pages(key: jax.Array) -> jax.Array:
            bits = jax.random.bits(key, self.specs.cache.shape, jnp.uint8)
            # Without one bit of the exponent nothing is NaN and all is below 2.
            return jax.lax.bitcast_convert_type(bits & jnp.uint8(0xBF), jnp.float8_e4m3fn)

        sharding = sharding_for(self.specs.cache.axes, self.mesh)
        made = jax.jit(pages, out_shardings=sharding)
        cache = KVCache(*(made(jax.random.key(seed)) for seed in range(2)))
        tokens = np.arange(self.rows, dtype=np.int32) * 7 + 11
        lengths = np.full(self.rows, self.context - _MARGIN, np.int32)
        history = np.zeros((self.shapes.num_pages, self.shapes.page_size), np.int32)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        placed = [jax.device_put(array, replicated) for array in (tokens, lengths, history)]
        return State(cache, Slots(*placed))

    def run(
        self, state: State, steps: int, program: Callable[..., Any] | None = None
    ) -> tuple[State, list[jax.Array]]:
        """So many steps one after the other, none waited for; their outputs."""
        outputs = []
        for _ in range(steps):
            *after, output = (program or self.program)(self.weights, *state, *self.inputs)
            state = State(*after)
            outputs.append(output)
        return state, outputs


def model_of(
    mesh: Mesh, num_layers: int, rows: int, context: int
) -> tuple[ModelConfig, StepShapes]:
    """So many layers, all of them with experts, and steps of so many rows at a context."""
    pages = -(-context // 64)
    shapes = StepShapes(
        num_slots=rows, num_pages=rows * pages, page_size=64, max_seq_len=pages * 64,
        prefill_tile=64, prefill_buckets=(1,), decode_buckets=(rows,),
    )  # fmt: skip
    return replace(eighths(mesh.devices.size, num_layers), first_k_dense_replace=0), shapes


def file_of(num_layers: int, rows: int, is_alone: bool) -> str:
    return f"layers-{num_layers}-rows-{rows}{'-alone' * is_alone}"


def build(directory: Path, mesh: Mesh, counts: list[int], rows: list[int], context: int) -> None:
    """Compiles every step for devices that are only described."""
    directory.mkdir(parents=True, exist_ok=True)
    with held_parts(mesh.devices.size):
        for num_rows, num_layers, is_alone in itertools.product(rows, counts, (False, True)):
            begin = time.perf_counter()
            config, shapes = model_of(mesh, num_layers, num_rows, context)
            with alone() if is_alone else nullcontext():
                step = lower(config, shapes, mesh, _DTYPE, "decode", num_rows, _OPTIONS)
            blob, _, _ = serialize_executable.serialize(step.compile())
            (directory / file_of(num_layers, num_rows, is_alone)).write_bytes(blob)
            seconds = time.perf_counter() - begin
            print(f"{num_rows} rows, {num_layers} layers: {seconds:.0f} s", flush=True)


def time_steps(decoding: Decoding, program: Callable[..., Any]) -> float:
    """Microseconds that a step takes on the device, by either of its programs, the median of several rounds.

    The host needs longer for a step of one layer than the device does. So the device is given other work
    first, for as long as the host needs for all steps; and a few steps are taken from many.
    """
    block = blocker(_BLOCKED)
    state, outputs = decoding.run(decoding.start(), 3, program)
    jax.block_until_ready(outputs)
    times = []
    for _ in range(_ROUNDS):
        walls = []
        for steps in (_FEW, _MANY):
            begin = time.perf_counter()
            blocked = block()
            state, outputs = decoding.run(state, steps, program)
            jax.block_until_ready((blocked, outputs))
            walls.append((time.perf_counter() - begin) * 1e3)
        times.append((walls[1] - walls[0]) / (_MANY - _FEW))
    return statistics.median(times) * 1e3


def profile(decoding: Decoding) -> dict[str, tuple[float, float]]:
    """Each kernel of a step on all devices, by name: how often it runs, its microseconds in all."""
    state, outputs = decoding.run(decoding.start(), 2, decoding.alone)
    jax.block_until_ready(outputs)
    timings = kernel_times(
        lambda: jax.block_until_ready(decoding.run(state, _ROUNDS, decoding.alone)[1])
    )
    durations: dict[str, list[float]] = defaultdict(list)
    for name, milliseconds in timings:
        durations[name.removesuffix(_OURS)].append(milliseconds * 1e3)
    steps = _ROUNDS * decoding.mesh.devices.size
    return {
        name: (len(times) / steps, statistics.median(times) * len(times) / steps)
        for name, times in durations.items()
    }


def compare(decoding: Decoding) -> dict[str, bool]:
    """Whether several steps have the same bits when they are run again, and when no kernels overlap."""

    def outputs() -> np.ndarray:
        return np.stack([np.asarray(x) for x in decoding.run(decoding.start(), 4)[1]])

    first = outputs()
    others = decoding.run(decoding.start(), 4, decoding.alone)[1]
    return {
        "again": bool((first == outputs()).all()),
        "alone": bool((first == np.stack([np.asarray(x) for x in others])).all()),
        "distinct": len(np.unique(first[:, columns.OUTPUT_TOKENS])) > 1 or decoding.rows == 1,
    }


def main(arguments: list[str]) -> None:
    """Prints a line for each number of layers and rows, and what the last step consists of."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--layers", default="8,16", help="numbers of layers, few and many")
    parser.add_argument("--rows", default="64,1,8,256", help="numbers of rows")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--build", type=Path, help="compile into this directory, and end")
    parser.add_argument("--target", default="h200", help="to compile for, as glm_jax.aot takes it")
    parser.add_argument("--programs", type=Path, help="a directory of what was compiled before")
    parser.add_argument("--commit", default="", help="what this is a copy of")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    counts, rows = ([int(n) for n in text.split(",")] for text in (options.layers, options.rows))
    if options.build:
        stay_off_devices()
        mesh = mesh_of(parse_target(options.target))
        return build(options.build, mesh, counts, rows, options.context)
    mesh, card = make_mesh(options.devices), measure_copy()
    print(f"{options.devices} x {card.name}, jax {jax.__version__}, {card.copy / 1e12:.2f} TB/s")
    report = {
        "kind": "layer",
        "date": time.strftime("%Y-%m-%d"),
        "commit": options.commit,
        "command": f"python tests/perf/layer.py {' '.join(arguments)}",
        "device": f"{options.devices} x {card.name}",
        "jax": jax.__version__,
        "layers": counts,
        "copy_bytes_per_second": card.copy,
        "results": [],
    }
    with held_parts(options.devices):
        for number in rows:
            report["results"].append(measure(mesh, card, number, counts, options))
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    return None


def measure(
    mesh: Mesh, card: Card, rows: int, counts: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    """Steps of so many rows, with few layers and with many; see layer_floors.compare."""
    steps: dict[int, float] = {}
    apart: dict[int, float] = {}
    kernels: dict[int, dict[str, tuple[float, float]]] = {}
    bits: dict[str, bool] = {}
    floors: dict[str, layer_floors.Floor] = {}
    for num_layers in counts:
        decoding = Decoding(mesh, num_layers, rows, options.context, options.programs)
        steps[num_layers] = time_steps(decoding, decoding.program)
        apart[num_layers] = time_steps(decoding, decoding.alone)
        took = f"{steps[num_layers]:.1f} us a step, {apart[num_layers]:.1f} one by one"
        print(f"{rows} rows, {num_layers} layers: {took}", flush=True)
        kernels[num_layers] = profile(decoding)
        if num_layers == counts[-1]:
            bits = compare(decoding)
            floors = layer_floors.floors_of(
                decoding.config, decoding.specs.weights, mesh.devices.size, rows,
                options.context - _MARGIN, card,
            )  # fmt: skip
        del decoding
    few, many = counts[0], counts[-1]
    found = layer_floors.compare(steps, apart, kernels, few, many, floors)
    print(f"{layer_floors.text(found)}\n{bits}", flush=True)
    return {"rows": rows, "context": options.context, "bits": bits, "steps_us": steps, **found}


if __name__ == "__main__":
    main(sys.argv[1:])
