"""Kill conversions with SIGKILL, finish them, and compare the bytes with one that ran through.

Run as `kill_convert.py SOURCE WORK COUNT SEED`. Half of the kills come at a random call that writes,
which is cut in half, the others at a random time. Exits with 1 at the first difference.
"""

import os
import random
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

from checkpoints.convert import convert
from checkpoints.converted import Converted
from checkpoints.reader import CheckpointError

CHUNK_BYTES = 1 << 16
CALLS = [(os, "write"), (os, "fsync"), (Path, "replace"), (Path, "mkdir"), (Path, "unlink")]


def digest(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    contents = {str(file.relative_to(directory)): file.read_bytes() for file in files}
    return {name: (len(raw), zlib.crc32(raw)) for name, raw in contents.items()}


def run(source: Path, destination: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """A child that converts; its process id. Nothing in the parent has started a thread."""
    child = os.fork()
    if child == 0:
        prepare()
        convert(source, destination, 8, progress=False, max_chunk_bytes=CHUNK_BYTES)
        os._exit(0)
    return child


def kill_at(call: int) -> None:
    """Makes this process die at its call-th call that changes the disk; a write gets half through."""
    left = [call]

    def dying(name: str, original: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapped

    for owner, name in CALLS:
        setattr(owner, name, dying(name, getattr(owner, name)))


def is_whole(directory: Path) -> bool:
    try:
        with Converted(directory):
            return True
    except CheckpointError:
        return False


def main() -> None:
    source, work = Path(sys.argv[1]), Path(sys.argv[2])
    count, rng = int(sys.argv[3]), random.Random(int(sys.argv[4]))
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    start = time.monotonic()
    assert os.waitpid(run(source, work / "whole"), 0)[1] == 0
    seconds = time.monotonic() - start
    expected = digest(work / "whole")
    num_calls = 6 * sum("/c." in name for name in expected)
    killed = 0
    for number in range(count):
        destination = work / "killed"
        shutil.rmtree(destination, ignore_errors=True)
        if number % 2:
            call = rng.randint(1, num_calls)
            child = run(source, destination, lambda call=call: kill_at(call))
        else:
            child = run(source, destination)
            time.sleep(rng.uniform(0.3, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        left = digest(destination) if destination.exists() else {}
        if is_whole(destination):
            left.pop("journal.jsonl", None)  # goes last
            assert left == expected, number
        assert os.waitpid(run(source, destination), 0)[1] == 0, number
        assert digest(destination) == expected, number
    print(f"{count} conversions, {killed} of them killed: the bytes are the same every time")


if __name__ == "__main__":
    main()
