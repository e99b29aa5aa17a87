"""Measure, in a process of its own, the peak memory of loading a checkpoint on the CPU.

Run as `measure_load.py DIR write`, then `measure_load.py DIR load`, which prints the bytes of the
model, of its largest tensor, and of the peak above what the process held before.
"""

import os
import resource
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax.numpy as jnp
import psutil

from checkpoints.dummy import dummy_weights
from checkpoints.load import load_weights
from checkpoints.reader import Checkpoint
from checkpoints.writer import tensors_from_weights, write_checkpoint
from glm_jax.config import ModelConfig
from glm_jax.model import abstract_weights
from glm_jax.sharding import make_mesh
from tests.checkpoints.samples import make_config

SMALL = make_config()
LARGE = make_config(
    vocab_size=8192, hidden_size=512, num_hidden_layers=4, intermediate_size=4096,
    n_routed_experts=48, moe_intermediate_size=768,
)  # fmt: skip


def write(directory: Path, config: ModelConfig) -> None:
    weights = dummy_weights(abstract_weights(config, jnp.bfloat16), make_mesh(1), seed=0)
    tensors = tensors_from_weights(config, weights)
    write_checkpoint(directory, {}, tensors, max_shard_bytes=50 << 20)


def load(directory: Path, config: ModelConfig) -> int:
    """Loads and forgets the weights; returns their bytes."""
    specs = abstract_weights(config, jnp.bfloat16)
    weights = load_weights(directory, config, specs, make_mesh(1), progress=False)
    return sum(weight.block_until_ready().nbytes for weight in weights.values())


def peak_bytes() -> int:
    """The most memory this process ever had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts a parent's memory into a child's ru_maxrss
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    directory, step = Path(sys.argv[1]), sys.argv[2]
    small, large = directory / "small", directory / "large"
    if step == "write":
        write(small, SMALL)
        write(large, LARGE)
        return
    load(small, SMALL)  # so that code, threads and plans are not counted as the model's
    abstract_weights(LARGE, jnp.bfloat16)
    before = psutil.Process().memory_info().rss
    model = load(large, LARGE)
    with Checkpoint(large) as checkpoint:
        largest = max(info.nbytes for info in checkpoint)
    print(model, largest, peak_bytes() - before)


if __name__ == "__main__":
    main()
