"""The look of the log: colors and bars on a terminal, plain lines in a pipe, JSON for collectors.

Knows no message. A record may bring `facts`, a mapping that JSON shows as fields, and `block`, lines
of (label, text) that belong below its message.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

_COLORS = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
_TIME = "%H:%M:%S"
_DATE_AND_TIME = "%Y-%m-%d %H:%M:%S"


def set_up(
    level: str,
    log_format: str,
    stream: TextIO,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Sends what is logged, from this level on, to a stream.

    Args:
      log_format: "auto", "text" or "json", as --log-format.
      environ: NO_COLOR (not empty) and TERM=dumb there are heeded.
    """
    is_terminal = stream.isatty() and log_format == "auto"
    handler = _AboveBars(stream) if is_terminal else logging.StreamHandler(stream)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    elif is_terminal:
        is_plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
        handler.setFormatter(_TerminalFormatter(colors=not is_plain))
    else:
        handler.setFormatter(_TextFormatter())
    if stream.isatty() and not is_terminal:
        os.environ["TQDM_DISABLE"] = "1"  # a bar would stand in the middle of the lines
    logging.basicConfig(level=level, handlers=[handler], force=True)
    warnings.showwarning = _log_warning
    if level == "INFO":
        logging.getLogger("jax").setLevel("WARNING")  # it tells which back ends are not there


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object
) -> None:
    """What Python would write over lines of its own is a record like any other."""
    logger = logging.getLogger("py.warnings")
    logger.warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)


class _AboveBars(logging.StreamHandler[TextIO]):
    """Writes lines above the progress bars, which then stand below them unbroken."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _TextFormatter(logging.Formatter):
    """Every line with its time, so that each is whole by itself."""

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime(_DATE_AND_TIME, time.localtime(record.created))
        head = f"{when} {record.levelname:<8} {record.name}: "
        lines = [
            super().format(record),
            *(f"  {label:<9} {text}" for label, text in _block(record)),
        ]
        return "\n".join(head + line if line else "" for line in lines)


class _TerminalFormatter(logging.Formatter):
    """For eyes: the time of day, the level where it is not INFO, no logger's name."""

    def __init__(self, *, colors: bool) -> None:
        super().__init__("%(message)s")
        self._has_colors = colors

    def _painted(self, text: str, color: str) -> str:
        return f"\033[{color}m{text}\033[0m" if self._has_colors and text else text

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime(_TIME, time.localtime(record.created))
        level = "" if record.levelname == "INFO" else f"{record.levelname.lower()}: "
        color = _COLORS.get(record.levelname)
        message = level + super().format(record)
        if _block(record):
            message = self._painted(message, "1;32")
        elif color:
            message = self._painted(message, color)
        lines = [f"{self._painted(when, '2')} {message}"]
        lines += [f"  {self._painted(f'{label:<9}', '1')} {text}" for label, text in _block(record)]
        return "\n".join(lines)


class _JsonFormatter(logging.Formatter):
    """One object a line; facts are fields of their own."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _iso(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def _block(record: logging.LogRecord) -> list[tuple[str, str]]:
    return [*_lines_of(getattr(record, "block", ()))]


def _lines_of(block: Any) -> Iterator[tuple[str, str]]:
    """A text of several lines keeps its label on the first."""
    for label, text in block:
        first, *others = text.splitlines() or [""]
        yield label, first
        yield from (("", other) for other in others)


def _iso(seconds: float) -> str:
    """In: seconds since 1970. Out: 2026-11-29T12:00:00.123Z."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"
