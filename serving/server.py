"""The process's life: listen, load, serve, drain, end.

Knows neither routes nor models: an application, an engine to build, an address.

The ASGI server is Granian, embedded, so that the event loop and the engine's thread share one
process. Draining is done here and not by it: until the last request has finished the listener
stays open, so that new requests are told to go elsewhere instead of finding nobody.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server
from quart import Quart

from serving.bridge import Bridge, Engine

logger = logging.getLogger(__name__)

# Far above slots and queue together: refusals are the engine's to make, with a reason.
_MAX_CONNECTIONS = 8192

# More than the tokens that wait for their readers: those go without being looked at.
_YOUNG_OBJECTS = 20_000

# How long the last answers may take to reach their readers, once all are complete.
_FLUSH_SECONDS = 30


class ListenError(Exception):
    """The server cannot listen at this address; the message is for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to listen.

    Attributes:
      host, port: the address.
      certificate, key: PEM files for TLS, both or neither.
      header_timeout: seconds in which a request's head must have come.
    """

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None
    header_timeout: float = 30.0

    @property
    def url(self) -> str:
        scheme = "http" if self.certificate is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"


async def serve(
    app: Quart, bridge: Bridge, build_engine: Callable[[], Engine], address: Address
) -> int:
    """Serves until a signal or the engine's death; returns the process's exit code.

    SIGTERM or SIGINT: what runs finishes, what comes is refused with 503, and the code is 0. While
    the model still loads, the process ends at once, and so it does at a second signal. An engine
    that dies, or cannot start: 1.

    Raises:
      ListenError: the address is taken or does not exist, or the TLS files are none.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, bridge, number)
    server, listening = await _listen(app, address)
    logger.info("listening on %s; /readyz answers 200 once the model is loaded", address.url)
    bridge.start(lambda: _settled(build_engine()))
    await asyncio.wait([listening, bridge.ended], return_when=asyncio.FIRST_COMPLETED)
    if listening.done():
        logger.critical("the listener ended", exc_info=listening.exception())
        return 1
    cause = bridge.ended.result()
    server.stop()
    _, stalled = await asyncio.wait([listening], timeout=_FLUSH_SECONDS)
    if stalled:
        logger.warning("some client did not read its answer in %d s", _FLUSH_SECONDS)
    if cause is not None:
        logger.critical("ending, since there is no engine")  # the bridge has told why
        return 1
    logger.info("all requests have finished")
    return 0


def _settled(engine: Engine) -> Engine:
    """Keeps the garbage collector from what is there to stay, and from looking at every token."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 100)
    return engine


def _on_signal(bridge: Bridge, number: int) -> None:
    name = signal.Signals(number).name
    if bridge.state == "starting":
        logger.info("%s: ending, the model is not loaded yet", name)
        _exit_now(0)
    if bridge.state == "draining":
        logger.warning("%s again: ending at once", name)
        _exit_now(128 + number)
    logger.info("%s: finishing %d requests, taking no new ones", name, bridge.num_streams)
    bridge.stop()


def _exit_now(code: int) -> NoReturn:
    # Past the interpreter's own end, which would wait for threads that load or compile.
    logging.shutdown()
    os._exit(code)


async def _listen(app: Quart, address: Address) -> tuple[Server, asyncio.Future[None]]:
    try:
        server = _granian(app, address)
    except (OSError, ValueError) as error:
        raise ListenError(f"cannot listen on {address.url}: {error}") from error
    listening = asyncio.ensure_future(server.serve())
    await asyncio.wait([listening], timeout=0.05)  # it binds at once, or fails at once
    if listening.done() and (error := listening.exception()) is not None:
        reason = str(error).partition("\n")[0]  # a stack trace follows
        raise ListenError(f"cannot listen on {address.url}: {reason}")
    return server, listening


def _granian(app: Quart, address: Address) -> Server:
    # Granian takes numeric addresses only, and would share a port that is taken.
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    family, *_, where = found[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)
    return Server(
        app,
        address=str(where[0]),
        port=address.port,
        interface=Interfaces.ASGI,
        http=HTTPModes.auto,
        http1_settings=HTTP1Settings(header_read_timeout=round(1000 * address.header_timeout)),
        websockets=False,
        backlog=2048,
        backpressure=_MAX_CONNECTIONS,
        log_level=LogLevels.error,
        ssl_cert=address.certificate,
        ssl_key=address.key,
        ssl_protocol_min=SSLProtocols.tls12,
    )
