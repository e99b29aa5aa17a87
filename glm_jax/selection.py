"""Which form of the operations a step runs: a GPU's kernels, those in C, or the references.

Knows no operation.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm_jax import host_kernels, references
from glm_jax.native import library
from glm_jax.pallas.chip import Chip, chip_in_trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """On a CPU the operations in C where they can be built, the references elsewhere; on a GPU the
    kernels, which are for FP8 weights and as many devices as there are kv heads.

    Attributes:
      allow_reference: on a GPU, what has no kernel runs as XLA makes it of the reference, which copies
        weights and is many times slower; otherwise it is an error.
      fused_all_reduce: sums over devices, the addition and the norm in one kernel of ours, which
        writes into the other devices' memory, up to 256 rows and within one process; otherwise the sum is XLA's.
      interpreted: kernels of this chip, interpreted on a CPU: for tests.
      native: a CPU may run C, which has no derivatives.
    """

    allow_reference: bool = False
    fused_all_reduce: bool = True
    interpreted: Chip | None = None
    native: bool = True

    @property
    def _interprets(self) -> bool:
        return self.interpreted is not None

    def _chip(self) -> Chip | None:
        return self.interpreted or chip_in_trace()

    @property
    def _runs_c(self) -> bool:
        return self.native and self._chip() is None and library.is_available()

    @property
    def _plain(self) -> Any:
        """The module of operations that run without a kernel."""
        return host_kernels if self._runs_c else references

    def _run[T](self, kernel: Callable[[Chip], T], reference: Callable[[], T]) -> T:
        chip = self._chip()
        if chip is None:
            return reference()
        try:
            return kernel(chip)
        except NotImplementedError as error:
            if not self.allow_reference:
                raise NotImplementedError(
                    f"{error}; --allow-reference-ops runs the plain operation in its place"
                ) from error
            logger.warning("no kernel, so the plain operation runs, slowly: %s", error)
            return reference()
