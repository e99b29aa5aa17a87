"""Builds the operations in C for this machine's processor, and hands them to XLA.

Knows no operation. A machine without a C compiler runs the references in their place.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

# What XLA knows the operations by, and what the library exports.
OPERATIONS = ("glm_attend", "glm_experts", "glm_product", "glm_route", "glm_write")

_SOURCES = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
# Sums in one order wherever they stand: no -ffast-math. A product and the sum that takes it are one
# instruction, which -ffp-contract=fast grants to whole vectors.
_FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi",
    "-shared", "-fPIC",
)  # fmt: skip
_SECONDS = 120.0
# Steps are traced by several threads at once.
_BUILDING = threading.Lock()


class BuildError(Exception):
    """The library cannot be built or loaded here; the message says why."""


def is_available() -> bool:
    """Whether XLA can run the operations; the first call builds them where nobody has yet."""
    with _BUILDING:
        return _registers()


@functools.cache
def _registers() -> bool:
    try:
        library = ctypes.CDLL(str(build(directory())))
    except (BuildError, OSError) as error:
        logger.warning("the CPU runs plain operations, several times slower: %s", error)
        return False
    for name in OPERATIONS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def directory() -> Path:
    """Where libraries are kept: beside XLA's compiled programs."""
    kept = jax.config.jax_compilation_cache_dir
    if kept is None or "://" in kept:
        return Path("~/.cache/glm-jax/steps").expanduser()
    return Path(kept)


def build(kept: Path) -> Path:
    """The library for this processor, compiled into `kept` if it is not there.

    Raises:
      BuildError: there is no C compiler, or it fails.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"there is no C compiler on PATH ({', '.join(_COMPILERS)}); install one")
    library = kept / f"glm-{_digest(compiler)}.so"
    if library.is_file():
        return library
    # Under a name of its own first: another process may be at it.
    try:
        kept.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=kept)
    except OSError:  # it cannot be written
        library = Path(tempfile.mkdtemp(prefix="glm-")) / library.name
        place = tempfile.TemporaryDirectory(dir=library.parent)
    with place as own:
        made = Path(own) / library.name
        command = [compiler, *_FLAGS, "-I", jax.ffi.include_dir(), str(_SOURCES / "host.c"), "-lm"]
        try:
            subprocess.run(
                [*command, "-o", str(made)],
                check=True, capture_output=True, text=True, timeout=_SECONDS,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{' '.join(command)} failed:\n{error.stderr[-2000:]}") from error
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler} took longer than {_SECONDS:.0f} s") from error
        os.replace(made, library)
    return library


def _digest(compiler: str) -> str:
    """Of all that decides the library: sources, flags, compiler, XLA's interface and processor."""
    found = hashlib.sha256(repr((_FLAGS, os.path.realpath(compiler), jax.__version__)).encode())
    for source in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.c")]):
        found.update(source.read_bytes())
    found.update(_processor().encode())
    return found.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: a home may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kinds = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
