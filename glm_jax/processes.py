"""Several processes, one mesh: the first one leads, and the others run the same steps.

Knows neither requests nor models: batches go out, as they are, before the steps they are for.

All processes compile the same programs and load what their own devices hold. Then process 0
decides what runs: it sends every batch to the others over TCP, one port above the coordinator's,
and each hands it to its own devices in the order in which it came. Nothing is sent back. A connection
that breaks ends the process at its other end too, at once and with a word: a step that waits for
devices that are gone would wait forever.

Whoever reaches either port can take part; they belong into a network of the processes' own.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, NoReturn

import jax
import numpy as np
from numpy.typing import NDArray

from glm_jax.runner import Runner
from glm_jax.shapes import Phase, StepShapes

logger = logging.getLogger(__name__)

Array = NDArray[np.int32]
Die = Callable[[str], object]

# How long processes wait for each other at the start.
START_SECONDS = 300
# A host that is gone says nothing: after so many seconds of silence it is asked, and then given up.
_IDLE_SECONDS, _PROBE_SECONDS, _NUM_PROBES = 10, 5, 3

_HEADER = struct.Struct("!BB")
_SHAPE = struct.Struct("!II")
_HELLO = struct.Struct("!I")


class Kind(IntEnum):
    """What a message is about."""

    BEGIN = 0
    PREFILL = 1
    DECODE = 2
    CONTROL = 3
    SCORE = 4
    PREPARE_SCORES = 5
    END = 6


_STEPS: dict[Phase, Kind] = {"prefill": Kind.PREFILL, "decode": Kind.DECODE}


class ProcessesError(Exception):
    """The processes did not come together; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Member:
    """A process's place among others.

    Attributes:
      coordinator: HOST:PORT of process 0, the same for all; port + 1 carries the batches.
      num_processes: how many there are.
      process_id: which one this is; 0 leads.

    Raises:
      ValueError: there is no such place, or coordinator is not HOST:PORT.
    """

    coordinator: str
    num_processes: int
    process_id: int

    def __post_init__(self) -> None:
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"process {self.process_id} is none of {self.num_processes}")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65535:
            raise ValueError(f"{self.coordinator!r} is not HOST:PORT with a port below 65535")

    @property
    def steps_address(self) -> tuple[str, int]:
        """Where process 0 sends batches from."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1


def join(member: Member) -> None:
    """Makes the devices of all processes JAX's; before anything asks for a device.

    Raises:
      ProcessesError: they did not all come.
    """
    # SIGTERM means what the server says it means.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            member.coordinator,
            member.num_processes,
            member.process_id,
            initialization_timeout=START_SECONDS,
        )
    except RuntimeError as error:
        raise ProcessesError(
            f"not all of {member.num_processes} processes came: {error}"
        ) from error


def end_process(why: str) -> NoReturn:
    """Ends this process at once: its devices may be waiting for others that are gone."""
    logger.critical("%s: ending", why)
    logging.shutdown()
    os._exit(1)


class Followers:
    """Process 0's connections to all others.

    Raises:
      ProcessesError: they did not all connect, or the port is taken.
    """

    def __init__(self, member: Member, die: Die = end_process) -> None:
        self._die = die
        self._lock = threading.Lock()
        self._is_ending = False
        self._connections: dict[int, socket.socket] = {}
        deadline = time.monotonic() + START_SECONDS
        try:
            with _listener(member.steps_address) as listener:
                while len(self._connections) < member.num_processes - 1:
                    listener.settimeout(max(0.0, deadline - time.monotonic()))
                    connection, _ = listener.accept()
                    self._welcome(connection)
        except OSError as error:
            raise ProcessesError(f"not all processes connected: {error}") from error
        for process_id, connection in self._connections.items():
            threading.Thread(target=self._watch, args=(process_id, connection), daemon=True).start()
        atexit.register(self.end)

    def _welcome(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        if len(hello) == _HELLO.size:
            connection.settimeout(None)
            _keep_alive(connection)
            self._connections[_HELLO.unpack(hello)[0]] = connection

    def begin(self, shapes: StepShapes, what: str) -> None:
        """Tells all others the shapes to compile, and for what: it must be the same for all."""
        text = json.dumps([asdict(shapes), what]).encode()
        self.send(Kind.BEGIN, np.frombuffer(text, np.uint8).astype(np.int32)[None])

    def send(self, kind: Kind, *arrays: Array, then: Callable[[], object] = lambda: None) -> None:
        """Sends a message to all, then does this process's own part of it, before the next is sent."""
        message = _HEADER.pack(kind, len(arrays))
        for array in arrays:
            message += _SHAPE.pack(*array.shape) + array.astype("<i4", copy=False).tobytes()
        with self._lock:
            for process_id, connection in self._connections.items():
                try:
                    connection.sendall(message)
                except OSError as error:
                    self._die(f"process {process_id} does not listen any more ({error})")
            then()

    def end(self) -> None:
        """Tells all others that nothing more will come; any number of times."""
        if not self._is_ending:
            self._is_ending = True
            self.send(Kind.END)

    def _watch(self, process_id: int, connection: socket.socket) -> None:
        try:
            connection.recv(1)
            why = f"process {process_id} has ended"
        except OSError as error:
            why = f"process {process_id} is gone ({error})"
        if not self._is_ending:
            self._die(why)


class LeadingRunner:
    """A runner of process 0 that has all others run what it runs."""

    def __init__(self, runner: Runner, followers: Followers) -> None:
        self.shapes = runner.shapes
        self._runner = runner
        self._followers = followers

    def dispatch(self, phase: Phase, batch: Array) -> jax.Array:
        """See Runner.dispatch."""
        output: list[jax.Array] = []
        self._followers.send(
            _STEPS[phase], batch, then=lambda: output.append(self._runner.dispatch(phase, batch))
        )
        return output[0]

    def control(self, controls: Array) -> None:
        """See Runner.control."""
        self._followers.send(Kind.CONTROL, controls, then=lambda: self._runner.control(controls))

    def prepare_scores(self) -> None:
        """See Runner.prepare_scores; the others compile when it is their turn."""
        self._followers.send(Kind.PREPARE_SCORES)
        self._runner.prepare_scores()

    def score(self, batch: Array, targets: Array) -> jax.Array:
        """See Runner.score."""
        output: list[jax.Array] = []
        self._followers.send(
            Kind.SCORE,
            batch,
            targets,
            then=lambda: output.append(self._runner.score(batch, targets)),
        )
        return output[0]


class Leader:
    """Another process's connection to process 0.

    Raises:
      ProcessesError: there is no process 0.
    """

    def __init__(self, member: Member, die: Die = end_process) -> None:
        self._die = die
        self._connection = _connected(member.steps_address)
        self._connection.sendall(_HELLO.pack(member.process_id))
        self._messages: queue.SimpleQueue[tuple[Kind, list[Array]]] = queue.SimpleQueue()
        # A thread of its own notices the end of process 0 also while this one waits for devices.
        threading.Thread(target=self._read, name="leader", daemon=True).start()

    def begun(self, what: str) -> StepShapes:
        """The shapes to compile; waits for process 0 to say it.

        Raises:
          ProcessesError: process 0 ended, or computes something else than `what`.
        """
        kind, arrays = self._messages.get()
        if kind is not Kind.BEGIN:
            raise ProcessesError("process 0 ended before it began")
        fields, its = json.loads(arrays[0].astype(np.uint8).tobytes())
        if its != what:
            raise ProcessesError(
                f"process 0 has another model, other options or another JAX: {its}, here {what}"
            )
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return StepShapes(**known)

    def follow(self, runner: Runner) -> None:
        """Runs what process 0 runs, until it says that nothing more will come."""
        phases: dict[Kind, Phase] = {kind: phase for phase, kind in _STEPS.items()}
        while True:
            kind, arrays = self._messages.get()
            match kind:
                case Kind.PREFILL | Kind.DECODE:
                    runner.dispatch(phases[kind], arrays[0])
                case Kind.CONTROL:
                    runner.control(arrays[0])
                case Kind.PREPARE_SCORES:
                    runner.prepare_scores()
                case Kind.SCORE:
                    runner.score(*arrays)
                case Kind.END:
                    return
                case Kind.BEGIN:
                    raise ProcessesError("process 0 began twice")

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                kind = None
                while kind is not Kind.END:
                    code, num_arrays = _HEADER.unpack(_exactly(stream.read, _HEADER.size))
                    kind = Kind(code)
                    self._messages.put((kind, [_array(stream.read) for _ in range(num_arrays)]))
        except (OSError, EOFError) as error:
            self._die(f"process 0 has ended without a word ({error or 'connection closed'})")


def _array(read: Callable[[int], bytes]) -> Array:
    shape = _SHAPE.unpack(_exactly(read, _SHAPE.size))
    values = _exactly(read, 4 * shape[0] * shape[1])
    return np.frombuffer(values, "<i4").reshape(shape)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = read(size)
    if len(data) < size:
        raise EOFError
    return data


def _listener(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return socket.create_server(("", address[1]), family=family)


def _connected(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            connection = socket.create_connection(address, timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ProcessesError(f"process 0 is not at {address}: {error}") from error
            time.sleep(0.1)
        else:
            connection.settimeout(None)
            _keep_alive(connection)
            return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # not on every system
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _NUM_PROBES)
