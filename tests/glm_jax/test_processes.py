"""Promises of several processes that share one mesh."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from glm_jax.engine.engine import Engine
from glm_jax.processes import Followers, Kind, Leader, Member, ProcessesError
from tests.engine.attentive import small_shapes
from tests.engine.test_real_schedules import LEAN, make_runner
from tests.glm_jax.one_of_several import answers


def free_port() -> int:
    """A port that is free, and so is the one above."""
    while True:
        with socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("", port + 1)):
                    return port
            except OSError:
                continue


def start(num_processes: int, *how: str) -> list[subprocess.Popen[str]]:
    coordinator = f"127.0.0.1:{free_port()}"
    flags = f"--xla_force_host_platform_device_count={8 // num_processes}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    module = [sys.executable, "-m", "tests.glm_jax.one_of_several"]
    return [
        subprocess.Popen(
            [*module, coordinator, str(num_processes), str(index), *how],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(num_processes)
    ]


@pytest.mark.slow
def test_two_processes_of_four_devices_give_the_bits_of_one_of_eight():
    processes = start(2)
    alone = answers(Engine(make_runner(8, LEAN), LEAN, 8))
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # The lines before are gloo's, about its connections.
    assert json.loads(outputs[0][0].splitlines()[-1]) == alone


@pytest.mark.slow
def test_when_a_process_dies_the_other_ends_with_a_word():
    leader, follower = start(2, "die")
    _, error = leader.communicate(timeout=300)
    follower.communicate(timeout=300)
    assert follower.returncode == 9
    assert leader.returncode == 1
    assert "process 1 has ended" in error or "process 1 is gone" in error


# --- Connections --------------------------------------------------------------------------------


class Pair:
    """Both ends of a connection, in one process; what would end a process is noted instead."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.has_died = threading.Event()
        address = f"127.0.0.1:{free_port()}"
        ends: list[Followers] = []
        first = threading.Thread(
            target=lambda: ends.append(Followers(Member(address, 2, 0), self._die))
        )
        first.start()
        self.leader = Leader(Member(address, 2, 1), self._die)
        first.join()
        [self.followers] = ends

    def _die(self, why: str):
        self.words.append(why)
        self.has_died.set()


class Listing:
    """A runner that notes what it is told to run."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[list[list[int]]]]] = []

    def dispatch(self, phase: str, batch: np.ndarray) -> None:
        self.calls.append((phase, [batch.tolist()]))

    def control(self, controls: np.ndarray) -> None:
        self.calls.append(("control", [controls.tolist()]))

    def prepare_scores(self) -> None:
        self.calls.append(("prepare", []))

    def score(self, *arrays: np.ndarray) -> None:
        self.calls.append(("score", [array.tolist() for array in arrays]))


def test_what_is_sent_is_run_in_the_order_in_which_it_was_sent():
    pair, listing = Pair(), Listing()
    batch = np.array([[1, -2, 2**31 - 1], [-(2**31), 0, 5]], np.int32)
    pair.followers.begin(small_shapes(num_drafts=2), "what")
    pair.followers.send(Kind.PREFILL, batch)
    pair.followers.send(Kind.CONTROL, batch[:1])
    pair.followers.send(Kind.DECODE, batch[:, :1])
    pair.followers.send(Kind.PREPARE_SCORES)
    pair.followers.send(Kind.SCORE, batch, batch[:, 1:])
    pair.followers.end()
    assert pair.leader.begun("what") == small_shapes(num_drafts=2)
    pair.leader.follow(listing)  # type: ignore[arg-type]
    assert listing.calls == [
        ("prefill", [batch.tolist()]),
        ("control", [batch[:1].tolist()]),
        ("decode", [batch[:, :1].tolist()]),
        ("prepare", []),
        ("score", [batch.tolist(), batch[:, 1:].tolist()]),
    ]
    assert not pair.words


def test_a_process_of_something_else_is_refused():
    pair = Pair()
    pair.followers.begin(small_shapes(), "this")
    with pytest.raises(ProcessesError, match="another model.* this, here that"):
        pair.leader.begun("that")
    pair.followers.end()


@pytest.mark.parametrize("is_leader", [True, False])
def test_the_end_of_either_end_is_noticed_while_nothing_is_sent(is_leader: bool):
    pair = Pair()
    if is_leader:
        for connection in pair.followers._connections.values():
            connection.shutdown(socket.SHUT_RDWR)
    else:
        pair.leader._connection.shutdown(socket.SHUT_RDWR)
    assert pair.has_died.wait(10)
    assert any("ended" in word or "gone" in word for word in pair.words)
    pair.followers._is_ending = True


@pytest.mark.parametrize(
    "coordinator, num_processes, process_id",
    [("host", 2, 0), ("host:x", 2, 0), ("host:65535", 2, 0), (":80", 2, 0), ("host:80", 2, 2)],
)
def test_a_place_that_does_not_exist_is_refused(
    coordinator: str, num_processes: int, process_id: int
):
    with pytest.raises(ValueError):
        Member(coordinator, num_processes, process_id)
