"""Times decode steps of a few layers at the shapes of one of eight devices, against what the card can do.

    python tests/perf/layer.py [--devices N] [--layers N,…] [--rows N,…] [--context N] [--json FILE]

Each device has what it has in the deployment (eighths.py): one KV head with its 12 query heads, 20 of the
160 experts that the router knows, an eighth of the shared expert and of the vocabulary. Knows no kernel.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints.dummy import dummy_weights
from glm_jax import shapes as columns
from glm_jax.cache import KVCache
from glm_jax.shapes import StepShapes
from glm_jax.sharding import make_mesh, partition_spec, sharding_for
from glm_jax.steps import Slots, StepOptions, lower, step_specs
from tests.perf.card import Card, measure_card
from tests.perf.eighths import eighths, even_loads, held_parts
from tests.perf.measure import profile as kernel_times

_DTYPE = np.dtype(jnp.bfloat16)
_OPTIONS = StepOptions(kv_dtype=np.dtype(jnp.float8_e4m3fn))
_STEPS, _ROUNDS, _MARGIN = 10, 5, 192
_OUT_OF_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


class State(NamedTuple):
    """What a step is given and gives back."""

    cache: KVCache
    slots: Slots


class Decoding:
    """Decode steps of a model of random weights, every row at the same context."""

    def __init__(self, mesh: Mesh, num_layers: int, rows: int, context: int) -> None:
        # All of them with experts.
        self.config = replace(eighths(mesh.devices.size, num_layers), first_k_dense_replace=0)
        self.mesh, self.rows, self.context = mesh, rows, context
        pages = -(-context // 64)
        self.shapes = StepShapes(
            num_slots=rows, num_pages=rows * pages, page_size=64, max_seq_len=pages * 64,
            prefill_tile=64, prefill_buckets=(1,), decode_buckets=(rows,),
        )  # fmt: skip
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
        self.program = self.compile()

    def compile(self, options: dict[str, Any] | None = None) -> Callable[..., Any]:
        """The step, compiled with the options a deployment has but for these."""
        lowered = lower(self.config, self.shapes, self.mesh, _DTYPE, "decode", self.rows, _OPTIONS)
        return lowered.compile(compiler_options=options)

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

    def floor_bytes(self) -> float:
        """What a device reads at least in a layer of one step: weights in use, keys and values."""
        config, devices = self.config, self.mesh.devices.size
        share = config.num_experts_per_tok / config.n_routed_experts
        in_use = 1 - (1 - share) ** self.rows
        total = 0.0
        for path, spec in self.specs.weights.items():
            if path.startswith("layers."):
                is_shared_out = any(axis is not None for axis in partition_spec(spec.axes))
                size = np.prod(spec.shape) * spec.dtype.itemsize / (devices if is_shared_out else 1)
                total += size * (in_use if ".experts." in path else 1)
        positions = self.rows * (self.context - _MARGIN)
        return total / config.num_hidden_layers + 2 * positions * config.head_dim


def time_steps(decoding: Decoding) -> float:
    """Milliseconds a step takes, the median of several rounds of steps in a row."""
    state, outputs = decoding.run(decoding.start(), 3)
    jax.block_until_ready(outputs)
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        state, outputs = decoding.run(state, _STEPS)
        jax.block_until_ready(outputs)
        times.append((time.perf_counter() - begin) / _STEPS * 1e3)
    return statistics.median(times)


def profile(decoding: Decoding) -> list[tuple[str, int, float]]:
    """Each kernel of a step on all devices: its name, how often it runs, its microseconds."""
    state, outputs = decoding.run(decoding.start(), 2)
    jax.block_until_ready(outputs)
    timings = kernel_times(lambda: jax.block_until_ready(decoding.run(state, _ROUNDS)[1]))
    counts: dict[str, int] = defaultdict(int)
    sums: dict[str, float] = defaultdict(float)
    for name, milliseconds in timings:
        counts[name] += 1
        sums[name] += milliseconds * 1e3
    devices = decoding.mesh.devices.size
    rows = [
        (name, counts[name] // (_ROUNDS * devices), sums[name] / (_ROUNDS * devices))
        for name in counts
    ]
    return sorted(rows, key=lambda row: -row[2])


def compare(decoding: Decoding) -> dict[str, bool]:
    """Whether several steps have the same bits when they are run again, and outside of graphs."""

    def outputs(program: Callable[..., Any] | None = None) -> np.ndarray:
        return np.stack([np.asarray(x) for x in decoding.run(decoding.start(), 4, program)[1]])

    first = outputs()
    uncaptured = outputs(decoding.compile(_OUT_OF_GRAPHS))
    return {
        "again": bool((first == outputs()).all()),
        "uncaptured": bool((first == uncaptured).all()),
        "distinct": len(np.unique(first[:, columns.OUTPUT_TOKENS])) > 1 or decoding.rows == 1,
    }


def main(arguments: list[str]) -> None:
    """Prints a line for each number of layers and rows, and what the last step consists of."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--layers", default="1,5", help="numbers of layers")
    parser.add_argument("--rows", default="64,1,8,256", help="numbers of rows")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    mesh, card = make_mesh(options.devices), measure_card()
    print(f"{options.devices} x {card.name}, jax {jax.__version__}, {card.copy / 1e12:.2f} TB/s")
    with held_parts(options.devices):
        measure(mesh, card, options)


def measure(mesh: Mesh, card: Card, options: argparse.Namespace) -> None:
    """Every number of rows with every number of layers."""
    results = []
    counts = [int(count) for count in options.layers.split(",")]
    for rows in map(int, options.rows.split(",")):
        timed: dict[int, float] = {}
        for num_layers in counts:
            decoding = Decoding(mesh, num_layers, rows, options.context)
            timed[num_layers] = time_steps(decoding)
            floor = decoding.floor_bytes() / card.copy * 1e6
            print(
                f"{rows} rows, {num_layers} layers: {timed[num_layers]:.3f} ms a step; "
                f"floor of a layer {floor:.1f} us",
                flush=True,
            )
            entry = {"rows": rows, "layers": num_layers, "ms": timed[num_layers], "floor_us": floor}
            results.append(entry)
            if num_layers == counts[-1]:
                entry |= {"bits": compare(decoding), "kernels": profile(decoding)}
                print("same bits:", entry["bits"])
                for name, count, microseconds in entry["kernels"][:24]:
                    print(f"  {microseconds:9.1f} us in {count:3d} of {name[:90]}", flush=True)
            del decoding
        for few, many in itertools.pairwise(counts):
            each = (timed[many] - timed[few]) / (many - few) * 1e3
            print(f"{rows} rows: {each:.1f} us for each layer of the last {many - few}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"card": card.name, "results": results}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
