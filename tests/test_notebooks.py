"""The notebooks run from the first cell to the last, draw what they promise, and are stored unrun."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("agg")

from matplotlib import pyplot

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NUM_FIGURES = {"inside_nano": 4, "fp8_against_bf16": 2}


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS} == set(NUM_FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(path.parent)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for number, cell in enumerate(code_cells(path)):
            code = compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec")
            exec(code, names)
        figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
        assert len(figures) == NUM_FIGURES[path.stem]
        assert all(axis.has_data() for figure in figures for axis in figure.axes)
    finally:
        pyplot.close("all")
        if "llm" in names:
            names["llm"].close()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path):
    for cell in code_cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
