"""What a start finds out: facts and seconds, logged as they come and once more when it is done.

Knows neither models nor addresses: it is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# Told the name of each phase of the start and the seconds it took.
ReportPhase = Callable[[str, float], object]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that is known of the server: words for people, values for programs."""

    text: str
    values: dict[str, object]


class Start:
    """Collects what the start of one server finds out.

    Args:
      report: told every phase and its seconds.
      began: time.perf_counter() when the process began.

    Attributes:
      phases: seconds, by phase; some run side by side.
      facts: by name, in the order in which they were told.
    """

    def __init__(
        self, report: ReportPhase = lambda phase, seconds: None, began: float | None = None
    ) -> None:
        self._report = report
        self._began = time.perf_counter() if began is None else began
        self.phases: dict[str, float] = {}
        self.facts: dict[str, Fact] = {}

    def tell(self, name: str, text: str, **values: object) -> None:
        """Something is known: `text` for people, `values` for programs."""
        self.facts[name] = Fact(text, values)
        logger.info("%s: %s", name, text, extra={"facts": {"fact": name, **values}})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Takes the seconds of what is done inside; of what fails, none."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.phases[name] = seconds
        self._report(name, seconds)
        told = {"phase": name, "seconds": round(seconds, 3)}
        logger.info("start, %s: %.2f s", name, seconds, extra={"facts": told})

    def ready(self, **places: str) -> None:
        """Everything that was told, in one block; `places` are lines below it."""
        seconds = time.perf_counter() - self._began
        block = [(name, fact.text) for name, fact in self.facts.items()]
        if self.phases:
            each = ", ".join(f"{name} {took:.2f} s" for name, took in self.phases.items())
            block.append(("start", each.replace("_", " ")))
        block += places.items()
        told = {
            "event": "ready",
            "seconds": round(seconds, 3),
            "phases": {name: round(took, 3) for name, took in self.phases.items()},
            **{name: fact.values for name, fact in self.facts.items()},
            **places,
        }
        logger.info("ready after %.2f s", seconds, extra={"facts": told, "block": block})
