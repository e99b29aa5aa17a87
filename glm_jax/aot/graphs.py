"""Command buffers of a compiled step: how many a GPU is handed, and what is launched beside them.

Knows no model. Graphs are made after the program that Compiled.as_text() shows: only XLA's dump of
the thunks tells them.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

_THUNK = re.compile(r"^(?P<indent> *)\d+: k(?P<kind>[A-Za-z]+)", re.MULTILINE)
_GRAPH = "CommandBuffer"
# They order or branch; what they order is counted by itself.
_NO_LAUNCH = frozenset({"AsyncStart", "AsyncDone", "While", "Conditional", "PartitionId"})


@dataclass(frozen=True, slots=True)
class Graphs:
    """What the host launches for one step.

    Attributes:
      command_buffers: as written; one within a loop counts once.
      launches_outside_of_them: kernels, copies and collectives that no command buffer holds.
    """

    command_buffers: int
    launches_outside_of_them: int


def compile_with_graphs(
    lowered: jax.stages.Lowered, *, is_gpu: bool
) -> tuple[jax.stages.Compiled, Graphs | None]:
    """The compiled step, and its graphs if it is for a GPU."""
    if not is_gpu:
        return lowered.compile(), None
    with tempfile.TemporaryDirectory() as dump:
        options: Any = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        texts = list(Path(dump).glob("*.thunk_sequence_after_thunk_passes.txt"))
        assert texts, "XLA dumps the thunks of every program for a GPU"
        return compiled, graphs_of(texts[0].read_text(encoding="utf-8"))


def graphs_of(thunk_sequence: str) -> Graphs:
    """Counts the command buffers of a dump, and the launches that are in none of them."""
    command_buffers, outside = 0, 0
    for kind, is_inside in thunks(thunk_sequence):
        command_buffers += kind == _GRAPH
        outside += not is_inside and kind != _GRAPH and kind not in _NO_LAUNCH
    return Graphs(command_buffers, outside)


def thunks(text: str) -> Iterator[tuple[str, bool]]:
    """Each thunk, and whether a command buffer holds it: what is indented deeper."""
    graph_indent: int | None = None
    for thunk in _THUNK.finditer(text):
        indent = len(thunk["indent"])
        if graph_indent is not None and indent <= graph_indent:
            graph_indent = None
        yield thunk["kind"], graph_indent is not None
        if thunk["kind"] == _GRAPH and graph_indent is None:
            graph_indent = indent
