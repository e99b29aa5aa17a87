"""Kernels that do not begin before the one ahead of them has ended: so that each has a time of its own.

Knows no kernel. Where kernels overlap, CUPTI counts what one waits for the other as its time. What is
traced here lacks nothing but the wait, and is launched as kernels that never had one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from glm_jax.pallas import launch_order

# Cases are traced by several threads, and not all of them so.
_here = threading.local()
_wait = launch_order.wait


def _wait_unless_alone(*, interpret: Any) -> None:
    if not getattr(_here, "is_alone", False):
        _wait(interpret=interpret)


@contextmanager
def alone() -> Iterator[None]:
    """What this thread traces inside does not wait, and so is not launched early."""
    # Kernels find it by its name whenever they are traced.
    launch_order.wait = _wait_unless_alone
    _here.is_alone = True
    try:
        yield
    finally:
        _here.is_alone = False
