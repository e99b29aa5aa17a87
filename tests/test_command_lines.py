"""Every command line teaches: groups, units, defaults, variables, examples that parse, and hints."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from checkpoints.__main__ import main as checkpoints_main
from glm_jax.aot.__main__ import main as aot_main
from glm_jax.aot.plan import PLANNED_KV_DTYPES
from glm_jax.cache import KV_DTYPES
from glm_jax.command_line import Flag
from serving.__main__ import main as serving_main
from serving.bench.__main__ import main as bench_main
from tests.test_docs import commands, understand

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS: dict[str, click.Group] = {
    "checkpoints": checkpoints_main,
    "glm_jax.aot": aot_main,
    "serving": serving_main,
    "serving.bench": bench_main,
}
# A bare value would leave open what is counted.
VAGUE = ("INTEGER", "FLOAT", "TEXT", "RANGE", "PATH", "FILENAME", "DIRECTORY")


def everything() -> list[Any]:
    """Each command of each program, with the program's name."""
    found = []
    for program, group in PROGRAMS.items():
        found.append(pytest.param(f"python -m {program}", group, id=program))
        for name, command in group.commands.items():
            path = f"python -m {program} {name}"
            found.append(pytest.param(path, command, id=f"{program} {name}"))
    return found


def flags_of(command: click.Command) -> list[click.Option]:
    return [each for each in command.params if isinstance(each, click.Option)]


@pytest.mark.parametrize(("path", "command"), everything())
def test_every_flag_says_what_it_is_for_and_in_which_unit(path: str, command: Any) -> None:
    context = click.Context(command, info_name=path)
    for option in flags_of(command):
        assert isinstance(option, Flag), f"{option.opts} has no group"
        record = option.get_help_record(context)
        assert option.help and record is not None
        spelling = record[0]
        assert not any(word in spelling.split() for word in VAGUE), spelling
        is_plain = isinstance(option.default, int | float | str) and option.default != ""
        if is_plain and option.default is not False:
            assert "default" in option.get_help_extra(context), spelling


@pytest.mark.parametrize(("path", "command"), everything())
def test_examples_are_commands_that_would_be_understood(path: str, command: Any) -> None:
    for reason, script in command.examples:
        assert reason.endswith(".")
        for words in commands(script):
            understand(words)
    shown = command.get_help(click.Context(command, info_name=path))
    assert all(line in shown for _, script in command.examples for line in script.splitlines())


def test_the_programs_have_examples() -> None:
    all_of: list[Any] = [serving_main.commands["serve"], bench_main, checkpoints_main]
    all_of += aot_main.commands.values()
    assert all(command.examples for command in all_of)


def test_every_flag_of_serve_is_a_variable_and_stands_in_a_group() -> None:
    options = flags_of(serving_main.commands["serve"])
    for option in options:
        assert isinstance(option, Flag) and option.group != "Options"
        shown = option.get_help_record(click.Context(serving_main.commands["serve"]))
        assert shown is not None and f"[env var: {option.envvar}" in shown[1]
    assert len({option.envvar for option in options}) == len(options)


def test_kinds_of_caches_are_those_that_exist() -> None:
    """Written out on the command line, which loads no JAX to know them."""
    commands = {"serve": serving_main.commands["serve"], **aot_main.commands}
    found = {}
    for name, command in commands.items():
        for option in flags_of(command):
            if option.opts[0] == "--kv-cache-dtype":
                assert isinstance(option.type, click.Choice)
                found[name] = list(option.type.choices)
    kinds = list(KV_DTYPES)
    assert (
        found.pop("plan") == list(PLANNED_KV_DTYPES) == [kind for kind in kinds if kind != "auto"]
    )
    assert found == dict.fromkeys(("serve", "build", "inspect"), kinds)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_loads_neither_jax_nor_a_server(program: str) -> None:
    """Which is what would take seconds; a time itself is no matter for a test."""
    script = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module({program!r}, run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'jax', 'flax', 'quart', 'granian', 'pydantic', 'transformers', 'matplotlib', 'rich'}\n"
        "sys.exit(code or ', '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout and "Usage" in done.stdout


@pytest.mark.parametrize(
    ("program", "words", "hint"),
    [
        ("serving", "serve --modl-dir x", "Did you mean one of: '--model-dir'"),
        ("serving", "--port 80", "--port belongs behind a command: python -m serving serve --port"),
        ("serving", "server", "Did you mean 'serve'"),
        ("serving.bench", "--concurency 4", "Did you mean '--concurrency'"),
        ("glm_jax.aot", "plan --taget b200x8", "Did you mean '--target'"),
        ("checkpoints", "convrt a b", "Did you mean 'convert'"),
    ],
)
def test_what_is_misspelled_is_answered_with_what_was_meant(
    program: str, words: str, hint: str
) -> None:
    found = CliRunner().invoke(PROGRAMS[program], words.split(), prog_name=f"python -m {program}")
    assert found.exit_code == 2
    assert hint in found.output.replace("\n", " ")


def test_a_long_run_over_bytes_writes_plain_lines_into_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "checkpoints", "verify", "checkpoints/nano"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"verifying: (\d+\.\d{3}) of \1 GB, \S+ GB/s, 0 s left", line)
    assert "nothing wrong" in done.stdout


def test_help_fits_a_narrow_terminal() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environ = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    command = [sys.executable, "-m", "serving", "serve", "--help"]
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=theirs, stdin=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other side has been closed
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    assert process.wait(60) == 0
    flags, _, _ = text.decode().partition("Examples:")
    assert flags and max(map(len, re.split(r"\r?\n", flags))) <= 80
