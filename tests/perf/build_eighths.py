"""Compiles the steps that decode_gpu.py loads, for GPUs that are not there.

    python tests/perf/build_eighths.py DIR [--target h200] [--layers N] [--buckets N,…] [--prefill N,…]

To be run with the jax, and the wheels of the CUDA, of the machine that will load them. Beside the steps
stands one, of 64 rows, whose kernels no graph holds.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from jax.experimental import serialize_executable

from glm_jax.aot import saved
from glm_jax.aot.topology import mesh_of, stay_off_devices
from glm_jax.kernels import Kernels
from glm_jax.steps import StepOptions, lower
from glm_jax.targets.target import parse_target
from tests.perf import decode_gpu
from tests.perf.eighths import eighths, held_parts


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--target", default="h200", help="as glm_jax.aot build takes it")
    parser.add_argument("--workers", type=int, default=2)
    decode_gpu.add_shape_options(parser)
    options = parser.parse_args(arguments)
    stay_off_devices()
    target = parse_target(options.target)
    mesh, devices = mesh_of(target), target.num_devices
    how = StepOptions(
        kv_dtype=decode_gpu.PAGES, kernels=Kernels(fused_all_reduce=not options.plain_sums)
    )
    shapes, began = decode_gpu.shapes_of(options, decode_gpu.VOCABULARY), time.perf_counter()
    with held_parts(devices):
        config = eighths(devices, options.layers)
        written = saved.build(
            config, shapes, mesh, decode_gpu.DTYPE, {"layers": options.layers}, options.directory,
            how, num_workers=options.workers,
            on_compiled=lambda bucket, seconds: print(bucket, f"{seconds:.1f} s", flush=True),
        )  # fmt: skip
        if 64 in shapes.decode_buckets:
            lowered = lower(config, shapes, mesh, decode_gpu.DTYPE, "decode", 64, how)
            step = lowered.compile(compiler_options=decode_gpu.OUT_OF_GRAPHS)
            blob, _, _ = serialize_executable.serialize(step)
            (options.directory / decode_gpu.UNCAPTURED).write_bytes(blob)
    seconds = time.perf_counter() - began
    print(f"{options.directory}: {written / 1e6:.1f} MB in {seconds:.0f} s, for {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
