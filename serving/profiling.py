"""The JAX profiler, as the server starts and stops it.

Knows no HTTP.
"""

from __future__ import annotations

import threading
from pathlib import Path

import jax


class JaxProfiler:
    """Records into a directory, for TensorBoard or xprof.

    Args:
      directory: made when there is something to write.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._is_active = False

    def start(self) -> None:
        """Raises:
        RuntimeError: a profile is being recorded.
        """
        with self._lock:
            if self._is_active:
                raise RuntimeError("a profile is being recorded already")
            jax.profiler.start_trace(str(self._directory))
            self._is_active = True

    def stop(self) -> str:
        """Ends the record; returns where it is.

        Raises:
          RuntimeError: none is being recorded.
        """
        with self._lock:
            if not self._is_active:
                raise RuntimeError("no profile is being recorded")
            self._is_active = False
            jax.profiler.stop_trace()
        return str(self._directory)
