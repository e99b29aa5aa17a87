"""Kinds of values on the command line.

Knows not what they are for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
RESULT = click.Path(dir_okay=False, writable=True, path_type=Path)

SloValue = tuple[str, float]


class _List(click.ParamType):
    """Positive numbers with commas between them."""

    def __init__(self, name: str, type: type[int] | type[float]) -> None:
        self.name = name
        self._type = type

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._type(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not {self.name} with commas between", param, ctx)
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r} has a number that is not positive", param, ctx)
        return numbers


class _Slo(click.ParamType):
    """What may take how many milliseconds, as in ttft:500."""

    name = "NAME:MS"

    def convert(self, value: Any, param: Any, ctx: Any) -> SloValue:
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).partition(":")
        name = {"e2el": "e2e"}.get(name, name)
        if name not in ("ttft", "tpot", "e2e"):
            self.fail(f"{value!r}: {name!r} is none of ttft, tpot, e2e", param, ctx)
        try:
            return name, float(number)
        except ValueError:
            self.fail(f"{value!r}: {number!r} is no number of milliseconds", param, ctx)


COUNTS = _List("INTEGERS", int)
RATES = _List("NUMBERS", float)
SLO = _Slo()
