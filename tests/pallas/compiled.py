"""What a GPU that is not here would run: each Mosaic kernel's PTX, and what ptxas says of it.

Knows no kernel. A compilation runs in a process of its own, for one kind of GPU only: within a process
Mosaic keeps what it compiled by the kernel alone, and would hand code for the first kind to the second.
"""

import functools
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec

from glm_jax.aot.topology import mesh_of, missing_wheels, stay_off_devices
from glm_jax.pallas import launch_order
from glm_jax.pallas.chip import Chip, chip_in_trace
from glm_jax.targets.target import parse_target

# A program is a function and its arguments' shapes; all are replicated over the target's devices.
Program = tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]
Programs = Callable[[Chip], dict[str, Program]]

needs_compiler = pytest.mark.skipif(
    bool(missing_wheels()), reason=f"compiling for absent GPUs needs {', '.join(missing_wheels())}"
)
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel of a compiled program.

    Attributes:
      name: the name of the kernel's body.
      ptx: its PTX.
      registers: per thread.
      stack: bytes of local memory per thread, spills included.
      spill_stores: bytes.
      spill_loads: bytes.
      threads: per CTA, as the PTX's launch bound says.
      shared: bytes of shared memory per CTA, static and dynamic.
      tensor_memory: columns of tensor memory.
      linked: what ptxas says where it compiles the same PTX to be linked, as nvJitLink does for jax
        0.12 where it is installed. There setmaxnreg is ignored, which kernels have to do well without.
    """

    name: str
    ptx: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    threads: int
    shared: int
    tensor_memory: int
    linked: str

    @property
    def loses_when_linked(self) -> list[str]:
        """What ptxas reports of it then: products one by one, and spills."""
        spills = r"[1-9]\d* bytes spill stores"
        return [x for x in self.linked.splitlines() if "serialized" in x or re.search(spills, x)]

    @property
    def uses_local_memory(self) -> bool:
        """Whether anything of a thread lies outside its registers."""
        in_ptx = re.search(r"\b(ld|st)\.local\b|\.local \.align", self.ptx) is not None
        return in_ptx or self.stack + self.spill_stores + self.spill_loads > 0

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.registers} registers, {self.threads} threads, {self.stack} B stack, "
            f"{self.spill_stores}/{self.spill_loads} B spilled, {self.shared} B shared, "
            f"{self.tensor_memory} TMEM columns"
        )


@functools.cache
def compile_programs(target: str, programs: Programs) -> dict[str, tuple[CompiledKernel, ...]]:
    """The Mosaic kernels of each program, in the order they were traced.

    Args:
      target: "b200", "h200x8", …
      programs: a function at the top level of its module, which is called in another process with
        the target's chip and returns programs by name. Kernels that differ in nothing are compiled
        once: the second of two such programs has none.

    Raises:
      RuntimeError: a program did not compile; the message holds what the compiler said.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "kernels.json"
        environment = dict(os.environ, MOSAIC_GPU_DUMP_TO=folder, PYTHONPATH=str(_ROOT))
        # Tests ask for 8 CPU devices here; and a cache could not read back what is for other devices.
        for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
            environment.pop(name, None)
        child = subprocess.run(
            [
                sys.executable,
                __file__,
                target,
                inspect.getfile(programs),
                programs.__name__,
                result,
            ],
            env=environment,
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if child.returncode:
            raise RuntimeError(f"{programs.__name__} for {target}: {child.stdout[-6000:]}")
        return {
            name: tuple(CompiledKernel(**kernel) for kernel in kernels)
            for name, kernels in json.loads(result.read_text()).items()
        }


def _load(path: str, name: str) -> Programs:
    spec = importlib.util.spec_from_file_location("programs", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["programs"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _compile_all(target: str, path: str, name: str) -> dict[str, list[dict[str, Any]]]:
    stay_off_devices()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    mesh = mesh_of(parse_target(target))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        chip = chip_in_trace()
    assert chip is not None, f"{target} is no GPU"
    folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    kernels: dict[str, list[dict[str, Any]]] = {}
    for program, (function, arguments) in _load(path, name)(chip).items():
        # What fails below has no name of its own.
        print("program", program, flush=True)
        before = set(folder.iterdir())
        replicated = PartitionSpec()
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False
        )
        # As in a step's layers of experts.
        with launch_order.overlapping():
            jax.jit(sharded).lower(*arguments).compile()
        kernels[program] = [asdict(kernel) for kernel in _read_all(set(folder.iterdir()) - before)]
    return kernels


def _read_all(written: set[Path]) -> list[CompiledKernel]:
    """The kernels of one program, from what was dumped of them."""
    resources = sorted((path for path in written if ".resources." in path.name), key=_order)
    kernels = []
    for ptx in sorted((path for path in written if path.suffix == ".ptx"), key=_order):
        # Resources are numbered as kernels are traced, PTX as it is made: kernels made before have none.
        traced = next(path for path in resources if _name(path) == _name(ptx))
        resources.remove(traced)
        kernels.append(_read(ptx, traced))
    return kernels


def _order(path: Path) -> int:
    return int(path.name.split(".")[0].rsplit("_", 1)[1])


def _name(path: Path) -> str:
    return path.name.split(".")[0].rsplit("_", 1)[0]


def _read(path: Path, traced: Path) -> CompiledKernel:
    ptx, ptxas = path.read_text(), path.with_suffix(".ptxas").read_text()
    resources = traced.read_text()

    def number(pattern: str, text: str) -> int:
        return max((int(found) for found in re.findall(pattern, text)), default=0)

    return CompiledKernel(
        name=_name(path),
        ptx=ptx,
        registers=number(r"Used (\d+) registers", ptxas),
        stack=number(r"(\d+) bytes stack frame", ptxas),
        spill_stores=number(r"(\d+) bytes spill stores", ptxas),
        spill_loads=number(r"(\d+) bytes spill loads", ptxas),
        threads=number(r"\.(?:req|max)ntid (\d+)", ptx),
        shared=number(r"(\d+) bytes smem", ptxas) + number(r"smem_scratch_bytes=(\d+)", resources),
        tensor_memory=number(r"tmem_(?:collective_)?scratch_cols=(\d+)", resources),
        linked=_linked(path, ptx),
    )


def _linked(path: Path, ptx: str) -> str:
    """What ptxas says when it compiles to be linked."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None, path
    # XLA takes the newest of these; Mosaic names the wheel's when it is imported.
    wheels = os.path.join(os.environ["MOSAIC_GPU_CUDA_ROOT"], "bin", "ptxas")
    said = ""
    for ptxas in filter(None, (shutil.which("ptxas"), wheels)):
        run = subprocess.run(
            [ptxas, "-c", "-v", f"-arch={target[1]}", path, "-o", os.devnull],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if run.returncode == 0:
            return run.stdout
        said += run.stdout
    raise RuntimeError(f"{path}: {said}")


if __name__ == "__main__":
    _, asked, file, function_name, output = sys.argv
    Path(output).write_text(json.dumps(_compile_all(asked, file, function_name)))
