"""Compiled steps on disk: the executables, and the manifest that says what they are for.

Knows neither weights nor a server. An executable is trusted like the program that wrote it: it is
loaded by unpickling, so a directory from elsewhere is code from elsewhere.
"""

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from glm_jax.cache import KVCache
from glm_jax.config import ModelConfig
from glm_jax.native import library
from glm_jax.runner import Bucket, Programs, buckets, compile_steps, lower_cache
from glm_jax.shapes import StepShapes
from glm_jax.steps import DEFAULT_OPTIONS, StepOptions, compiler_options, step_specs

_MANIFEST = "manifest.json"
_FORMAT = 1
_ZEROS = "cache"
# Flags that change where things run or what is written down, not what is computed.
_HARMLESS_FLAGS = re.compile(r"--xla_(dump_.*|force_host_platform_device_count=.*)")
# A program is made by these files and by nothing else of the package.
_SOURCES = ("*.py", "native/*.[ch]", "pallas/*.py")


class EngineMismatchError(ValueError):
    """The directory holds no engine, or one for something else; says what differs."""


@dataclass(frozen=True, slots=True)
class SavedEngine:
    """What an engine directory gives a server.

    Attributes:
      shapes: those the steps were compiled for.
      programs: every bucket of shapes.
      make_zeros: the program that makes the empty cache.
    """

    shapes: StepShapes
    programs: Programs
    make_zeros: Callable[[], jax.Array]


def manifest_of(
    config: ModelConfig,
    mesh: Mesh,
    dtype: np.dtype,
    limits: Mapping[str, int],
    options: StepOptions = DEFAULT_OPTIONS,
) -> dict[str, Any]:
    """Everything that must be the same where steps are compiled and where they run."""
    device = mesh.devices.flat[0]
    flags = os.environ.get("XLA_FLAGS", "").split()
    fields = {
        "format": _FORMAT,
        "model": asdict(config),
        "dtype": np.dtype(dtype).name,
        "limits": dict(limits),
        "kv_cache_dtype": np.dtype(dtype if options.kv_dtype is None else options.kv_dtype).name,
        "allow_reference_ops": options.kernels.allow_reference,
        "plain_sums": not options.kernels.fused_all_reduce,
        "devices": mesh.size,
        "device_kind": device.device_kind,
        "host": _host(options.kernels.native) if device.platform == "cpu" else "any",
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "compiler_options": compiler_options(mesh, options.kernels),
        "xla_flags": sorted(flag for flag in flags if not _HARMLESS_FLAGS.fullmatch(flag)),
        "source": _source_digest(),
    }
    return json.loads(json.dumps(fields))  # as it reads back: tuples are lists


def _host(native: bool) -> str:
    """What a CPU can execute: its architecture, its extensions where the system says, and our C."""
    operations = "in C" if native and library.is_available() else "plain"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()} {operations}"
    features = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    digest = hashlib.sha256((features[1] if features else "").encode()).hexdigest()
    return f"{platform.machine()} {digest[:12]} {operations}"


def _source_digest() -> str:
    """Of the code that is compiled into a step."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(package.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _file_of(bucket: Bucket) -> str:
    return f"{bucket[0]}-{bucket[1]}"


def build(
    config: ModelConfig,
    shapes: StepShapes,
    mesh: Mesh,
    dtype: np.dtype,
    limits: Mapping[str, int],
    directory: Path,
    options: StepOptions = DEFAULT_OPTIONS,
    *,
    on_compiled: Callable[[Bucket, float], object],
    num_workers: int,
) -> int:
    """Compiles every step and writes the engine; it appears whole or not at all.

    Returns:
      Bytes written.

    Raises:
      EngineMismatchError: the directory holds something that is not an engine.
    """
    is_ours = (directory / _MANIFEST).is_file()
    if directory.exists() and not is_ours and (directory.is_file() or any(directory.iterdir())):
        raise EngineMismatchError(f"{directory} holds other things than an engine; choose another")
    zeros = lower_cache(config, shapes, mesh, dtype, options).compile()
    programs = compile_steps(
        config, shapes, mesh, dtype, options, on_compiled=on_compiled, num_workers=num_workers
    )
    named = {_file_of(bucket): program for bucket, program in programs.items()} | {_ZEROS: zeros}
    manifest = manifest_of(config, mesh, dtype, limits, options)
    manifest |= {"shapes": asdict(shapes), "steps": {}}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".engine-") as work:
        made = Path(work) / "made"
        made.mkdir()
        total = 0
        for name, program in named.items():
            blob, _, _ = serialize_executable.serialize(program)
            (made / name).write_bytes(blob)
            manifest["steps"][name] = hashlib.sha256(blob).hexdigest()
            total += len(blob)
        (made / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if directory.exists():
            directory.rename(Path(work) / "before")
        made.rename(directory)
    return total


def load(
    config: ModelConfig,
    mesh: Mesh,
    dtype: np.dtype,
    limits: Mapping[str, int],
    directory: Path,
    options: StepOptions = DEFAULT_OPTIONS,
) -> SavedEngine:
    """Loads the engine for exactly this model, machine, software and these limits.

    Raises:
      EngineMismatchError: there is none, it is damaged, or it is for something else.
    """
    try:
        saved = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineMismatchError(
            f"{directory} holds no engine: there is no {_MANIFEST}; make one with "
            "python -m glm_jax.aot build"
        ) from None
    except ValueError as error:
        raise EngineMismatchError(f"{directory / _MANIFEST} is not readable: {error}") from None
    wanted = manifest_of(config, mesh, dtype, limits, options)
    if differences := _differences(saved, wanted):
        raise EngineMismatchError(
            f"the engine in {directory} is for something else: {'; '.join(differences)}; build it "
            "anew with python -m glm_jax.aot build"
        )
    fields: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in saved["shapes"].items()
    }
    shapes = StepShapes(**fields)
    specs = step_specs(config, shapes, dtype, options)
    cache = KVCache(0, 0)  # type: ignore[arg-type]
    arguments = jax.tree.structure(((specs.weights, cache, specs.slots, 0, 0), {}))
    results = jax.tree.structure((cache, specs.slots, 0))
    devices = list(mesh.devices.flat)

    def read(name: str) -> jax.stages.Compiled:
        trees = (jax.tree.structure(((), {})), jax.tree.structure(0))
        return serialize_executable.deserialize_and_load(
            _checked(directory / name, saved["steps"].get(name)),
            *(trees if name == _ZEROS else (arguments, results)),
            execution_devices=devices,
        )

    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="load") as pool:
        names = [_file_of(bucket) for bucket in buckets(shapes)]
        zeros, *steps = pool.map(read, [_ZEROS, *names])
    return SavedEngine(shapes, dict(zip(buckets(shapes), steps, strict=True)), zeros)


def _differences(saved: Any, wanted: dict[str, Any]) -> list[str]:
    """What is not the same, each as "name is … there and … here"."""
    if not isinstance(saved, dict) or not {"shapes", "steps"} <= saved.keys():
        return ["its manifest is not one of ours"]
    found = []
    for key, here in wanted.items():
        there = saved.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            for name in sorted(here.keys() | there.keys()):
                if there.get(name) != here.get(name):
                    found.append(
                        f"{key}.{name} is {there.get(name)!r} there, {here.get(name)!r} here"
                    )
        elif there != here:
            found.append(f"{key} is {there!r} there, {here!r} here")
    return found


def _checked(path: Path, digest: str | None) -> bytes:
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise EngineMismatchError(f"{path} cannot be read: {error}") from None
    if hashlib.sha256(blob).hexdigest() != digest:
        raise EngineMismatchError(f"{path} is damaged: it is not what its manifest says")
    return blob
