"""Write constraints.txt: every package of every environment of this project, pinned and hashed.

What is pinned already stays as it is, unless --upgrade asks for the newest of everything.

Knows neither where packages come from nor what is installed here. Run it as `make lock`.

pip reads the file as it is: `pip install --require-hashes -r constraints.txt` makes the environment
that serves. A package that only an extra or the tests need carries a marker such as
`extra == 'test'`, which pip finds false; the Makefile turns a scope on by replacing it with
`extra == ''`, which pip finds true. Versions are resolved for Linux on x86_64 and the oldest Python
we allow; the hashes cover every file of a release, so that the same lines hold on other platforms.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILE = ("pip", "compile", "pyproject.toml", "--python-version=3.12", "--python-platform=linux")
HEADER = """\
# Made by `make lock` from pyproject.toml; do not edit.
# What serves:   pip install --require-hashes -r constraints.txt
# With a scope:  sed "s/extra == 'cuda12'/extra == ''/" constraints.txt, and install the result
"""


def resolve(uv: str, *options: str, pins: str = "") -> list[tuple[str, list[str]]]:
    """What the given extras and groups need, as ("name==version", its hashes), by name.

    Args:
      uv: path of the uv program.
      options: extras and groups, as uv's options.
      pins: lines "name==version" that the answer must agree with.

    Raises:
      subprocess.CalledProcessError: the requirements cannot be met; uv has said why.
    """
    output = ("--generate-hashes", "--no-annotate", "--no-header", "--quiet")
    done = subprocess.run(
        [uv, *COMPILE, *output, "--constraints=-", *options],
        cwd=ROOT,
        input=pins,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    packages = []
    for entry in done.stdout.replace("\\\n", "").splitlines():
        pin, *hashes = (part.strip() for part in entry.split("--hash="))
        packages.append((pin, sorted(hashes)))
    return packages


def pinned(text: str) -> str:
    """The pins of a constraints.txt, without markers and hashes."""
    lines = text.splitlines()
    return "\n".join(line.split()[0] for line in lines if line[:1].isalnum())


def lock(uv: str, pins: str) -> str:
    """The text of constraints.txt, in which each of the pins holds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    scopes = {name: f"--extra={name}" for name in project["project"]["optional-dependencies"]}
    scopes |= {name: f"--group={name}" for name in project["dependency-groups"]}
    everything = resolve(uv, *scopes.values(), pins=pins)
    pins = "\n".join(pin for pin, _ in everything)

    runtime = dict(resolve(uv, pins=pins))
    needs = {name: dict(resolve(uv, option, pins=pins)) for name, option in scopes.items()}
    lines = [HEADER]
    for pin, hashes in everything:
        marker = ""
        if pin not in runtime:
            users = [name for name, packages in needs.items() if pin in packages]
            marker = " ; " + " or ".join(f"extra == '{name}'" for name in users)
        lines.append(" \\\n    --hash=".join([pin + marker, *hashes]) + "\n")
    return "".join(lines)


def main(uv: str, *options: str) -> None:
    path = ROOT / "constraints.txt"
    is_upgrade = "--upgrade" in options
    path.write_text(lock(uv, "" if is_upgrade else pinned(path.read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
