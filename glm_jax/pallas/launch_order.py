"""Kernels begin while the one ahead of them still runs, and wait for it where it matters.

Knows no kernel. In a graph of jax 0.12, and on a stream, a kernel that waits is launched as soon as every
CTA of the kernel ahead lets it or has ended (programmatic dependent launch). Beside that one's end it
makes its barriers, fetches descriptors, and reads what the kernel ahead does not write: weights. An
older jax makes a graph of its own of each kernel, and there all of this does nothing. Kernels let the next
one begin only within `overlapping`.

Why the order stays:
- A CTA lets the next kernel begin after its own wait. So when a kernel begins, all kernels but the one
  right ahead have ended and what they wrote is there; what that one writes is there after the wait.
- A thread of every CTA waits, also of one that has nothing to do. So a kernel ends after those ahead
  of it, and who waits for it waits for them.
- Nothing is written to device memory before the wait: kernels ahead may still read what it overwrites.
- A kernel begins when all CTAs of the one ahead run or have ended. So it takes no room from CTAs that
  others of their kernel, or of other devices, wait for.
- XLA's own kernels wait too; one between ours that did not would end before what is ahead of it. But
  they read what they take for constant by loads that ptxas may put before the wait: so none of them may
  read what a kernel right ahead makes that lets the next one begin. Compiled steps are tested for both.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

_is_overlapping = ContextVar("_is_overlapping", default=False)


@contextmanager
def overlapping(does: bool = True) -> Iterator[None]:
    """Within it, kernels that are traced let the next one begin.

    That one is another of ours, or reads nothing of what they make: who traces them sees to that.

    Args:
      does: False for kernels of which that is not so, within others of which it is.
    """
    token = _is_overlapping.set(does)
    try:
        yield
    finally:
        _is_overlapping.reset(token)


def kernel(
    body: Callable[..., None], *, interpret: Any = None, waits: bool = True, **options: Any
) -> Callable[..., Any]:
    """What plgpu.kernel makes of a body, each of whose threads first waits.

    Args:
      waits: False where the body does it itself, by `wait`.
      options: plgpu.kernel's.
    """

    @functools.wraps(body)
    def ordered(*refs: Any, **scratch: Any) -> None:
        wait(interpret=interpret)
        body(*refs, **scratch)

    return plgpu.kernel(ordered if waits else body, interpret=interpret, **options)


def wait(*, interpret: Any) -> None:
    """Holds the calling thread until the kernel ahead has ended; then it may let the next one begin.

    For every thread that reads what the kernel ahead wrote, or writes to device memory, itself or by who
    waits for it. The interpreter runs one kernel after the other.
    """
    if interpret:
        return
    plgpu.griddepcontrol_wait()
    if _is_overlapping.get():
        plgpu.griddepcontrol_launch_dependents()
