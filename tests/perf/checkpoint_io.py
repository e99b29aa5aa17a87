"""How fast checkpoints are read and loaded here, against a plain sequential read of the same bytes.

Run as `python tests/perf/checkpoint_io.py CONVERTED [--published DIR] [--without-mtp]`. Every row starts
with the files out of the page cache; the plain read is taken before and after the rest. Needs as much
memory as the weights.
"""

import argparse
import mmap
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from checkpoints.load import Reading, load_weights
from checkpoints.reader import aligned_empty
from glm_jax.config import ModelConfig
from glm_jax.mtp import weight_specs
from glm_jax.sharding import make_mesh

BUFFER_BYTES = 16 << 20
BLOCK_BYTES = 4096  # what O_DIRECT reads in multiples of


def forget(files: Iterable[Path]) -> None:
    """Drops the files' clean pages from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(file: Path, buffer: np.ndarray, flags: int = 0) -> None:
    """One file from beginning to end, in pieces of the buffer."""
    descriptor = os.open(file, os.O_RDONLY | flags)
    done = 0
    while count := os.preadv(descriptor, [buffer], done):
        done += count
        if count % BLOCK_BYTES:
            break
    os.close(descriptor)


def read_mapped(file: Path, buffer: np.ndarray) -> None:
    """One file copied out of a mapping of it."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    whole = np.frombuffer(mapped, np.uint8)
    for first in range(0, whole.size, buffer.size):
        piece = whole[first : first + buffer.size]
        buffer[: piece.size] = piece


def all_files(files: list[Path], read: Callable, num_readers: int, *arguments: object) -> None:
    """Every file, several at a time, each reader with a buffer of its own."""

    def share(number: int) -> None:
        buffer = aligned_empty((BUFFER_BYTES,), np.dtype(np.uint8))
        for file in files[number::num_readers]:
            read(file, buffer, *arguments)

    with ThreadPoolExecutor(num_readers) as pool:
        list(pool.map(share, range(num_readers)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("converted", type=Path)
    parser.add_argument("--published", type=Path)
    parser.add_argument("--without-mtp", action="store_true")
    options = parser.parse_args()
    config = ModelConfig.from_directory(options.converted)
    specs = weight_specs(config, np.dtype("bfloat16"), with_mtp=not options.without_mtp)
    chunks = sorted((options.converted / "weights").glob("*/c.*"))
    wanted = [file for file in chunks if file.parent.name in specs]
    nbytes = sum(file.stat().st_size for file in wanted)
    rates: dict[str, float] = {}

    def measure(name: str, files: list[Path], work: Callable[[], object]) -> None:
        forget(files)
        start = time.perf_counter()
        work()
        rates[name] = nbytes / (time.perf_counter() - start) / 1e9
        share = rates[name] / rates["sequential read"]
        print(f"{name:40} {rates[name]:7.3f} GB/s  {share:5.2f}", flush=True)

    def load(directory: Path, num_readers: int) -> None:
        reading = Reading(num_readers=num_readers)
        load_weights(directory, config, specs, make_mesh(1), progress=False, reading=reading)

    direct = os.O_DIRECT
    print(f"{nbytes / 1e9:.3f} GB of weights in {len(wanted)} chunks")
    measure("sequential read", wanted, lambda: all_files(wanted, read_plainly, 1))
    for count in (4, 16):
        measure(
            f"pread, {count} readers", wanted, lambda n=count: all_files(wanted, read_plainly, n)
        )
        measure(
            f"mapped, {count} readers", wanted, lambda n=count: all_files(wanted, read_mapped, n)
        )
        measure(
            f"O_DIRECT, {count} readers", wanted,
            lambda n=count: all_files(wanted, read_plainly, n, direct),
        )  # fmt: skip
    for count in (4, 16):
        measure(
            f"load converted, {count} readers", wanted, lambda n=count: load(options.converted, n)
        )
    if options.published:
        shards = sorted(options.published.glob("*.safetensors"))
        measure("load published, 4 readers", shards, lambda: load(options.published, 4))
    measure("sequential read again", wanted, lambda: all_files(wanted, read_plainly, 1))


if __name__ == "__main__":
    main()
