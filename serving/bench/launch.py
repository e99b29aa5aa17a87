"""A server started for a measurement and ended after it.

Knows servers by their command line and their endpoints only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.01
_END_SECONDS = 30
_LOG_LINES = 15


class ServerError(Exception):
    """The server does not start; the message, with the end of its log, is for the user."""


class LaunchedServer:
    """A server's process.

    Attributes:
      url: where it will listen.
      started_at: time.perf_counter() just before the process was made.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.started_at = time.perf_counter()
        self.process = process
        self.url = url
        self._log = log

    def wait_for(self, path: str, timeout: float) -> float:
        """Seconds from the process's start until this path answers 200.

        Raises:
          ServerError: the process has ended, or the time is over.
        """
        while (passed := time.perf_counter() - self.started_at) < timeout:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise ServerError(f"the server ended with exit code {code}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(self.url + path, timeout=5) as response:
                    if response.status == 200:
                        return time.perf_counter() - self.started_at
            except (OSError, urllib.error.URLError):
                time.sleep(_POLL_SECONDS)
        raise ServerError(f"{path} is not 200 after {passed:.0f} s:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines that it wrote."""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])


@contextmanager
def launched(
    model_dir: Path,
    flags: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[LaunchedServer]:
    """Starts `python -m serving serve` on a free port; ends it, by force if it must, on leaving.

    Args:
      flags: of the server, beyond --model-dir, --host and --port.
      environment: variables beyond ours.
      prefix: words before the command, as of `taskset`.
    """
    port = free_port()
    command = [*prefix, sys.executable, "-m", "serving", "serve", "--model-dir", str(model_dir)]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    with running(command, port, environment=environment) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str], port: int, *, environment: Mapping[str, str] | None = None
) -> Iterator[LaunchedServer]:
    """Runs any server's command, which makes it listen at this port; ends it on leaving."""
    with tempfile.TemporaryDirectory(prefix="glm-bench-") as directory:
        log = Path(directory) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the client, which then ends the server
            )
        try:
            yield LaunchedServer(process, f"http://127.0.0.1:{port}", log)
        finally:
            _end(process)


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
