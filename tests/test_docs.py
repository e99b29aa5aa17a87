"""What README and docs say to type is real: links lead somewhere, commands parse, Python compiles.

Every command is run by some test, or says what it needs that a test does not have. Knows no page by name
but for the table of environment variables. Runs nothing itself; test_walk.py does.
"""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from glm_jax.environment import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "checkpoints" / "nano" / "README.md", *(ROOT / "docs").glob("*.md")]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
ROUTES = {"GET": ["/v1/models", "/healthz", "/readyz", "/metrics"], "POST": ["/v1/completions", "/v1/chat/completions"]}  # fmt: skip
# Which test runs a command, with smaller numbers where the command would take long. `make -n` says
# below what the others of make's targets would run.
RUN_BY = (
    (r"make (test|check)$", ".ci/run"),
    (r"make ", "tests/test_docs.py"),
    (r"curl ", "tests/serving/test_walk.py"),
    (r"python -m serving serve --model-dir checkpoints/nano --mock", "tests/serving/test_bench_servers.py"),
    (r"python -m serving serve .*--speculative-tokens", "tests/serving/test_speculation.py"),
    (r"python -m serving serve .*checkpoints/nano --load-format dummy", "tests/serving/test_model_engine.py"),
    (r"python -m serving serve --model-dir checkpoints/nano --engine", "tests/aot/test_saved.py"),
    (r"python -m serving.bench (startup|frontend|decode)", "tests/serving/test_bench_commands.py"),
    (r"python -m serving.bench .*(--request-rate|--model-dir)", "tests/serving/test_bench_servers.py"),
    (r"python -m serving.bench$", "tests/serving/test_walk.py"),
    (r"python -m glm_jax.aot plan", "tests/serving/test_walk.py"),
    (r"python -m glm_jax.aot build --config checkpoints/nano", "tests/aot/test_saved.py"),
    (r"python -m checkpoints evaluate", "tests/checkpoints/test_evaluation.py"),
    (r"python -m checkpoints --help", "tests/test_command_lines.py"),
    (r"python -m serving.modal_app", "tests/serving/test_modal_app.py"),
)  # fmt: skip
# What a test does not have, by what the command or its comment says.
NEEDS = (
    (r"/models/|/path/to/", "the weights"),
    (r"needs a GPU", "a GPU"),
    (r"needs Modal", "an account"),
    (r"needs the image", "a cluster"),
    (r"docker build", "Docker; tests/test_container.py runs its steps"),
    (r"-m perf ", "quiet cores"),
    (r"jupyterlab", "packages that the lock does not have; tests/test_notebooks.py runs the notebooks"),
)  # fmt: skip
# What make hands on to what it runs.
MAKES_OWN = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "WORKERS", "EXTRAS")
# Programs that are not this project's: their line must name something that is here.
OTHERS = {"docker": "Dockerfile", "kubectl": ".yaml", "modal": "serving/modal_app.py"}


def blocks(language: str) -> list[Any]:
    return [*_blocks(language)]


def _blocks(language: str) -> Iterator[Any]:
    for page in PAGES:
        for number, (name, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            if name == language:
                yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")


def commands(script: str) -> list[list[str]]:
    """The words of each command, without comments and environment variables set for it."""
    text = re.sub(r"(^|\s)# .*$", "", script.replace("\\\n", " "), flags=re.MULTILINE)
    split = shlex.shlex(text, posix=True, punctuation_chars="\n")
    split.whitespace, split.whitespace_split, split.commenters = " \t", True, ""
    found: list[list[str]] = [[]]
    for word in split:
        if set(word) == {"\n"}:
            found.append([])
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


def lines_of(script: str) -> list[str]:
    """Each command with its comment, its lines joined where a quote or a backslash goes over them."""
    found: list[str] = []
    is_open = False
    for line in script.replace("\\\n", " ").splitlines():
        found[-1:] = [f"{found[-1]} {line}"] if is_open else [*found[-1:], line]
        is_open = found[-1].count("'") % 2 == 1
    return [line for line in found if line]


def without_code(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in HEADING.findall(without_code(page))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in ("".join(pair) for pair in LINK.findall(without_code(page))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{target}: {file.name} has no such heading"


@pytest.mark.parametrize("script", blocks("bash"))
def test_every_command_is_one_that_would_be_understood(script: str) -> None:
    for words in commands(script):
        understand(words)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles_and_imports_what_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_pages_have_commands_and_code() -> None:
    assert len(blocks("bash")) >= 10 and len(blocks("python")) >= 3


def test_every_block_is_of_a_kind_that_some_test_reads() -> None:
    """Commands, code, the figure (test_architecture.py), the tree (test_readme.py); one more has no kind."""
    kinds: dict[str, int] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("\n```") == 2 * len(BLOCK.findall(text)), (
            f"{page.name}: a block has no end"
        )
        for name, _ in BLOCK.findall(text):
            kinds[name] = kinds.get(name, 0) + 1
    assert kinds.keys() == {"bash", "python", "mermaid", ""} and kinds[""] == 2


@pytest.mark.parametrize("script", blocks("bash"))
def test_every_command_is_run_by_a_test_or_says_what_it_needs(script: str) -> None:
    for line in lines_of(script):
        (words,) = commands(line)
        command = re.sub(r"^\S*/python", "python", " ".join(words))
        runners = [test for pattern, test in RUN_BY if re.match(pattern, command)]
        needs = [what for pattern, what in NEEDS if re.search(pattern, line)]
        assert runners or needs, f"no test runs this, nor does it say what it needs: {line}"
        assert all((ROOT / test).is_file() for test in runners)


@pytest.mark.parametrize(
    "target", ["serve", "plan", "test", "check", "format", "tree", "docs", "nano"]
)
def test_what_make_would_run_is_understood(target: str) -> None:
    # Where make runs these tests, it hands its own variables on: ARGS of the tests are none of serve's.
    environment = {name: value for name, value in os.environ.items() if name not in MAKES_OWN}
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "-o", ".venv", target],
        cwd=ROOT, capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    lines = [
        line for line in done.stdout.splitlines() if re.match(r"\S*\.venv/bin/python -m ", line)
    ]
    own = [line for line in lines if " -m pip " not in line]
    assert own or target == "tree"
    for line in own:
        understand(shlex.split(line))


def understand(words: list[str]) -> None:
    """Raises where a command is not one of ours or of those we name."""
    program = words[0]
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        assert not unknown, f"make has no target {unknown}"
    elif program in ("python", ".venv/bin/python"):
        understand_python(words[1:])
    elif program == "curl":
        understand_curl(words[1:])
    else:
        assert program in OTHERS, f"{program} is not known to this test"
        assert any(OTHERS[program] in word for word in words), shlex.join(words)


def understand_python(words: list[str]) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), f"{words[0]} is not there"
        return
    name, rest = words[1], words[2:]
    if name in ("pip", "jupyterlab", "ruff", "pyright", "pdoc"):
        return
    if name == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.endswith(".py"))
        return
    candidates = (f"{name}.__main__", name)
    path = next((c for c in candidates if (ROOT / f"{c.replace('.', '/')}.py").is_file()), None)
    assert path is not None, f"there is no module {name}"
    command = getattr(importlib.import_module(path), "main", None)
    if isinstance(command, click.Command):
        parse(command, name, rest)


def parse(command: click.Command, name: str, words: list[str]) -> None:
    """As click would, but that files need not be there; --help is understood by all."""
    if "--help" in words:
        return
    try:
        context = command.make_context(name, list(words))
    except click.BadParameter as error:
        assert "does not exist" in error.format_message(), error.format_message()
        return
    left = [*context._protected_args, *context.args]
    if isinstance(command, click.Group) and left:
        first, *rest = left
        assert first in command.commands, f"{name} has no command {first}"
        parse(command.commands[first], first, rest)


def understand_curl(words: list[str]) -> None:
    url = next(word for word in words if word.startswith("localhost:5000"))
    body = next((words[i + 1] for i, word in enumerate(words) if word == "-d"), None)
    assert url.removeprefix("localhost:5000") in ROUTES["GET" if body is None else "POST"], url
    if body is not None:
        json.loads(body)


def test_the_page_for_operators_lists_the_environment_as_it_is_set() -> None:
    page = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    rows = [f"| `{s.names[0]}` | {s.value} | {s.reason} |" for s in SETTINGS]
    assert "\n".join(rows) in page, "docs/operating.md should have:\n" + "\n".join(rows)
