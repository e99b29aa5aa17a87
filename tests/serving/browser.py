"""A headless Chromium, driven by its DevTools protocol: what a page does in the hands of a person.

Knows no page.
"""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # it needs rights that containers lack; the page is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
)
_SECONDS = 20.0


def find_chromium() -> str | None:
    """The program GLM_CHROMIUM names, or one on the path; None where there is none."""
    named = os.environ.get("GLM_CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """One open page.

    Attributes:
      complaints: what the page's scripts threw or logged as errors, and what was kept from loading.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._session: dict[str, str] = {}
        self._num_calls = 0
        self.complaints: list[str] = []

    async def open(self, url: str) -> None:
        """Attaches to a new page of the browser, and loads it."""
        target = await self.call("Target.createTarget", url="about:blank")
        wanted = {"targetId": target["targetId"], "flatten": True}
        attached = await self.call("Target.attachToTarget", **wanted)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Page"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until(f"location.href.startsWith({url!r}) && document.readyState == 'complete'")

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        self._num_calls += 1
        message = {"id": self._num_calls, "method": method, "params": params}
        await self._socket.send_json(message | self._session)
        while True:
            heard = await self._socket.receive_json(timeout=_SECONDS)
            if heard.get("id") == self._num_calls:
                assert "error" not in heard, heard
                return heard["result"]
            self._note(heard)

    def _note(self, heard: dict[str, Any]) -> None:
        params = heard.get("params", {})
        match heard.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(json.dumps(params["entry"]))

    async def value(self, script: str) -> Any:
        """The value of an expression of JavaScript, in JSON's types."""
        wanted = {"expression": script, "returnByValue": True, "awaitPromise": True}
        told = await self.call("Runtime.evaluate", **wanted)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, script: str) -> None:
        """Waits until the expression is true."""
        async with asyncio.timeout(_SECONDS):
            while not await self.value(f"Boolean({script})"):
                await asyncio.sleep(0.02)

    async def texts(self, selector: str) -> list[str]:
        """The text of all elements that match, as far as it is shown."""
        return await self.value(
            f"[...document.querySelectorAll({selector!r})].map(e => e.innerText)"
        )

    async def type(self, selector: str, text: str) -> None:
        """Types into an element, in place of what stands there."""
        await self.value(f"document.querySelector({selector!r}).focus()")
        await self.value(f"document.querySelector({selector!r}).select()")
        await self.call("Input.insertText", text=text)

    async def press_enter(self) -> None:
        """Presses the key, in whatever has the focus."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    async def click(self, selector: str) -> None:
        """Clicks in the middle of an element."""
        box = await self.value(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        where = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        await self.call("Input.dispatchMouseEvent", type="mousePressed", **where)
        await self.call("Input.dispatchMouseEvent", type="mouseReleased", **where)


@asynccontextmanager
async def opened(program: str, url: str, profile: Path) -> AsyncIterator[Page]:
    """A page in a browser of its own, loaded.

    Args:
      program: of the browser.
      profile: an empty directory for what it keeps.
    """
    nothing = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        program,
        *_FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,
    )
    try:
        address = await _address(process, profile / "DevToolsActivePort")
        async with (
            aiohttp.ClientSession() as client,
            client.ws_connect(address, max_msg_size=0) as socket,
        ):
            page = Page(socket)
            await page.open(url)
            yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it is several processes
        await process.wait()


async def _address(process: asyncio.subprocess.Process, file: Path) -> str:
    """Where it listens, which it writes as two lines: the port and a path."""
    async with asyncio.timeout(_SECONDS):
        while not (file.exists() and len(lines := file.read_text().split()) == 2):
            assert process.returncode is None, "the browser has ended"
            await asyncio.sleep(0.05)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
