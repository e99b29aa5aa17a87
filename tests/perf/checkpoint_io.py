"""How fast checkpoints are read and loaded here, against a plain sequential read of the same bytes.

Run as `python tests/perf/checkpoint_io.py CONVERTED PUBLISHED`. Every row starts with the files out of
the page cache, and plain reads and loads take turns. Needs as much memory as the weights, or as those
that `--only TEXT` leaves: paths with the text in them, of the converted form alone.
"""

import argparse
import mmap
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from checkpoints.load import Reading, load_weights
from checkpoints.reader import aligned_empty
from glm_jax.config import ModelConfig
from glm_jax.mtp import weight_specs
from glm_jax.sharding import make_mesh

BUFFER_BYTES = 16 << 20
SAMPLE_BYTES = 1 << 29  # read in each of the ways to read
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


def size_of(files: list[Path]) -> int:
    """Bytes of the files together."""
    return sum(file.stat().st_size for file in files)


def all_files(files: list[Path], read: Callable, num_readers: int, *arguments: Any) -> None:
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
    parser.add_argument("published", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    config = ModelConfig.from_directory(options.converted)
    specs = weight_specs(config, np.dtype("bfloat16"), with_mtp=True)
    specs = {path: spec for path, spec in specs.items() if options.only in path}
    chunks = sorted((options.converted / "weights").glob("*/c.*"))
    wanted = [file for file in chunks if file.parent.name in specs]
    rates: dict[str, float] = {}

    def measure(name: str, files: list[Path], work: Callable[[], object], nbytes: int) -> None:
        forget(files)
        start = time.perf_counter()
        work()
        rates[name] = nbytes / (time.perf_counter() - start) / 1e9
        share = rates[name] / rates["sequential read"]
        print(f"{name:32} {rates[name]:7.3f} GB/s  {share:5.2f}", flush=True)

    def measure_files(name: str, files: list[Path], *how: Any) -> None:
        measure(name, files, lambda: all_files(files, *how), size_of(files))

    def measure_load(name: str, directory: Path, files: list[Path], num_readers: int) -> None:
        reading = Reading(num_readers=num_readers)
        work = partial(load_weights, directory, config, specs, make_mesh(1), False, reading=reading)
        measure(name, files, work, size_of(wanted))

    few = wanted[:: max(1, size_of(wanted) // SAMPLE_BYTES)]
    print(f"{size_of(few) / 1e9:.3f} GB in {len(few)} chunks")
    measure_files("sequential read", few, read_plainly, 1)
    for count in (1, 4, 16):
        measure_files(f"pread, {count} readers", few, read_plainly, count)
        measure_files(f"O_DIRECT, {count} readers", few, read_plainly, count, os.O_DIRECT)
    measure_files("mapped, 1 reader", few[:1], read_mapped, 1)
    print(f"{size_of(wanted) / 1e9:.3f} GB in {len(wanted)} chunks")
    for _ in range(options.turns):
        measure_files("sequential read", wanted, read_plainly, 1)
        measure_load("load converted", options.converted, wanted, 4)
        if not options.only:
            shards = sorted(options.published.glob("*.safetensors"))
            measure_load("load published", options.published, shards, 4)


if __name__ == "__main__":
    main()
