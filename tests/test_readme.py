"""The README's tree is made of the modules' first lines.

Knows nothing else of the README. `make tree` runs this file as a program, which writes the tree.
"""

import ast
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PACKAGES = ("glm_jax", "checkpoints", "serving")
TREE = re.compile(r"(?<=<!-- tree: written by `make tree` -->\n```\n).*?(?=```\n)", re.DOTALL)
WIDTH = 26  # columns of indentation and name before the first line of the docstring


def first_line(module: Path) -> str:
    """The first line of a module's docstring, or "" if it has none."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    return docstring.splitlines()[0] if docstring else ""


def tree_of(package: Path, indent: str = "") -> Iterator[str]:
    """The lines of a package: its modules by name, then its subpackages."""
    yield f"{indent}{package.name}/"
    indent += "  "
    for module in sorted(package.glob("*.py")):
        yield f"{indent + module.name:<{WIDTH}} {first_line(module)}".rstrip()
    for inner in sorted(package.glob("*/__init__.py")):
        yield from tree_of(inner.parent, indent)


def tree() -> str:
    """The whole tree, as it belongs into the README."""
    return "".join(f"{line}\n" for package in PACKAGES for line in tree_of(ROOT / package))


def test_every_module_says_in_its_first_line_what_it_is() -> None:
    modules = [module for package in PACKAGES for module in (ROOT / package).rglob("*.py")]
    assert modules
    silent = [str(module.relative_to(ROOT)) for module in modules if not first_line(module)]
    assert not silent, f"without a module docstring: {', '.join(sorted(silent))}"


def test_the_readme_shows_every_module_with_its_own_first_line() -> None:
    shown = TREE.search(README.read_text(encoding="utf-8"))
    assert shown is not None, "README.md has lost its tree; its opening lines are in TREE above"
    changes = difflib.unified_diff(
        shown.group().splitlines(), tree().splitlines(), "README.md", "modules", lineterm="", n=0
    )
    difference = "\n".join(changes)
    assert not difference, f"run `make tree`, or paste the lines marked + :\n{difference}"


if __name__ == "__main__":
    README.write_text(
        TREE.sub(lambda _: tree(), README.read_text(encoding="utf-8")), encoding="utf-8"
    )
