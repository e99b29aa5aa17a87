"""Importing the rooms of policy and of the wire loads no JAX, and the figure of the rooms is true.

Knows only module names. The order of imports between rooms is checked by `lint-imports`.
"""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import grimp
import pytest

WITHOUT_JAX = [
    "glm_jax.shapes",
    "glm_jax.engine.request",
    "glm_jax.engine.sequence",
    "glm_jax.engine.pages",
    "glm_jax.engine.scheduler",
    "glm_jax.engine.batch",
    "glm_jax.engine.mock",
    "serving.app",
    "serving.__main__",
]


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_importing_it_alone_loads_no_jax(module: str) -> None:
    program = (
        f"import sys, {module}; print([name for name in ('jax', 'flax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


ROOT = Path(__file__).resolve().parents[1]
NODE = re.compile(r'(\w+)(?:\["([^"]+)"\]|\(\[([^\[\]"]+)\]\))?')


def figure() -> list[str]:
    """The lines of the figure of docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```mermaid\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [line.strip() for line in text.splitlines()]


def read_figure(lines: list[str]) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Names of nodes and their texts, and arrows; raises where a line is no flowchart of mermaid's.

    The subset that the figure keeps to: a direction, subgraphs, nodes with a text, chains of arrows.
    Mermaid itself is a package of node's, and no dependency for one figure.
    """
    assert re.fullmatch(r"flowchart (LR|TB)", lines[0])
    nodes: dict[str, str] = {}
    arrows: set[tuple[str, str]] = set()
    depth = 0
    for line in lines[1:]:
        depth += bool(re.fullmatch(r'subgraph \w+\["[^"\]]+"\]', line)) - (line == "end")
        assert depth >= 0, "an end too many"
        if re.match(r"subgraph |end$|direction (LR|TB)$", line):
            continue
        chain = [NODE.fullmatch(part) for part in line.split(" --> ")]
        assert all(chain), f"no node or arrow: {line}"
        found = [match for match in chain if match]
        nodes |= {match[1]: match[2] or match[3] for match in found if match[2] or match[3]}
        arrows |= {(one[1], other[1]) for one, other in pairwise(found)}
    assert depth == 0, "an end is missing"
    return nodes, arrows


def test_the_figure_can_be_read_and_every_node_has_a_text() -> None:
    nodes, arrows = read_figure(figure())
    assert {name for arrow in arrows for name in arrow} == nodes.keys()
    # A word on its own: a text in < > or with quotes inside would break the figure.
    assert all(re.fullmatch(r"(<b>[\w/, ]+</b><br>)?[\w ,]+", text) for text in nodes.values())


@pytest.mark.parametrize(
    "lines",
    [
        ["flowchart TB", 'a["one"] -> b["two"]'],
        ["flowchart TB", 'subgraph x["x"]', 'a["one"]'],
        ["flowchart TB", "end"],
        ["graph of a kind", "a --> b"],
        ["flowchart TB", 'a["one]'],
    ],
)
def test_a_figure_with_a_slip_is_not_read(lines: list[str]) -> None:
    with pytest.raises(AssertionError):
        read_figure(lines)


def test_arrows_between_rooms_are_imports_and_none_points_back() -> None:
    graph = grimp.build_graph("glm_jax", "checkpoints", "serving", cache_dir=None)
    _, arrows = read_figure(figure())
    rooms = {
        name: name if name in ("serving", "checkpoints") else f"glm_jax.{name}"
        for arrow in arrows
        for name in arrow
        if name not in ("client", "notebook")
    }
    for one, other in arrows:
        if one in rooms:
            direct = graph.find_shortest_chains(rooms[one], rooms[other], as_packages=True)
            assert any(len(chain) == 2 for chain in direct), f"{one} does not import {other}"
            back = graph.find_shortest_chains(rooms[other], rooms[one], as_packages=True)
            assert not back, f"{other} imports {one}"
