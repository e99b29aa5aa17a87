"""Server-sent events out of a stream of bytes, however it is cut.

Knows neither HTTP nor what the events say.
"""


class EventDecoder:
    """Gathers bytes and gives back the data of each event that is complete.

    Lines may end in CRLF; comments and fields other than `data` are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that these bytes complete, lines joined by a newline."""
        data = self._rest + data
        if b"\r" in data:
            held = data[-1:] == b"\r"  # the newline may come with the next bytes
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n") + (b"\r" if held else b"")
        *events, self._rest = data.split(b"\n\n")
        return [found for event in events if (found := _data(event)) is not None]

    @property
    def rest(self) -> bytes:
        """What has come of the next event."""
        return self._rest


def _data(event: bytes) -> bytes | None:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [
        line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")
    ]
    return b"\n".join(lines) if lines else None
