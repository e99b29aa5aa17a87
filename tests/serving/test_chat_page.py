"""The chat page in a real browser: streamed, stopped, thinking folded, calls and numbers shown.

Skipped where there is no Chromium; GLM_CHROMIUM names one that is not on the path.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from glm_jax.engine.request import Request
from serving.app import create_app
from tests.serving.browser import Page, find_chromium, opened
from tests.serving.live import free_port
from tests.serving.scripted import END, TOKENIZER, ScriptedEngine, scripted_service, tokens

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the path, and GLM_CHROMIUM names none"
)
TOOL = '[{"type": "function", "function": {"name": "now", "parameters": {}}}]'
IS_IDLE = "document.querySelector('#send').textContent == 'Send'"
SCRIPTS = {
    "story": "Let me plan." + "</think>" + "Once upon a time <b>there</b> was a fox. " * 3,
    "time": "A clock is needed.</think>I look.<tool_call>now</tool_call>",
    "endless": "</think>" + "on and " * 500,
}


def script(request: Request) -> list[int]:
    """The answer that the last message's word asks for."""
    asked = TOKENIZER.decode(request.prompt)
    word = max(SCRIPTS, key=asked.rfind)
    return [*tokens(SCRIPTS[word]), END]


@asynccontextmanager
async def chatting(tmp_path: Path) -> AsyncIterator[tuple[Page, ScriptedEngine]]:
    """The page of a server that answers by `script`, open in a browser."""
    assert CHROMIUM is not None
    engine = ScriptedEngine(script, pause=0.008)
    async with scripted_service(engine, tmp_path / "tiny") as service:
        port, closing = free_port(), asyncio.Event()
        app = create_app(service)

        async def closed() -> None:
            await closing.wait()

        running = app.run_task("127.0.0.1", port, shutdown_trigger=closed)
        serving = asyncio.create_task(running)
        try:
            async with opened(CHROMIUM, f"http://127.0.0.1:{port}/", tmp_path / "profile") as page:
                yield page, engine
                assert page.complaints == []
        finally:
            closing.set()
            await serving


async def ask(page: Page, text: str) -> None:
    await page.type("#text", text)
    await page.press_enter()


async def test_a_person_can_talk_to_the_model(tmp_path):
    async with chatting(tmp_path) as (page, engine):
        await page.until("document.querySelectorAll('#model option').length == 2")
        assert await page.texts("#model") == ["tiny\nalias/of-tiny"]

        # Streamed: the answer grows while the button offers to stop it.
        await ask(page, "a story")
        await page.until("document.querySelector('.content')?.textContent.length > 5")
        [early] = await page.texts(".content")
        assert not await page.value(IS_IDLE)
        await page.until(IS_IDLE)
        story = SCRIPTS["story"].partition("</think>")[2]
        assert early != story.strip() and story.startswith(early)
        assert (await page.value("document.querySelector('.content').textContent")) == story
        assert await page.texts(".user") == ["a story"]

        # Thinking is there, folded away until it is clicked.
        assert await page.texts("details.thinking") == ["Thinking"]
        assert not await page.value("document.querySelector('.thinking').open")
        await page.click(".thinking summary")
        assert await page.texts(".thinking div") == ["Let me plan."]
        [numbers] = await page.texts(".numbers")
        count = len(tokens(SCRIPTS["story"])) + 1
        assert f"+ {count} tokens" in numbers and numbers.endswith("tokens/s")
        assert float(numbers.split()[-2]) > 10

        # Settings reach the engine; what the model calls is shown; the conversation goes on.
        await page.click("header summary")
        settings = {"temperature": "0.25", "top_p": "0.5", "top_k": "7", "seed": "11"}
        for id, value in settings.items():
            await page.type(f"#{id}", value)
        await page.type("#system", "Be brief.")
        await page.type("#tools", TOOL)
        await ask(page, "the time")
        await page.until(f"document.querySelector('.call') && {IS_IDLE}")
        assert await page.texts(".call") == ["Calls now\n{}"]
        sampling = engine.requests[-1].sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.5, 7)
        assert sampling.seed == 11
        asked = TOKENIZER.decode(engine.requests[-1].prompt)
        assert "Be brief." in asked and "was a fox" in asked

        # Stopped: the request is cancelled, what was said stays.
        await page.type("#tools", " ")
        await ask(page, "endless")
        await page.until("[...document.querySelectorAll('.content')].at(-1).innerText.length > 30")
        await page.click("#send")
        await page.until(IS_IDLE)
        async with asyncio.timeout(5):
            while not engine.cancelled:
                await asyncio.sleep(0.01)
        assert (await page.texts(".content"))[-1].startswith("on and on and")
        assert await page.texts(".error") == []

        # A refusal is shown in the server's words; a new conversation is empty.
        await page.type("#max_completion_tokens", "999999")
        await ask(page, "a story")
        await page.until("document.querySelector('.error')")
        [error] = await page.texts(".error")
        assert "max_completion_tokens is too large" in error
        page.complaints.clear()  # the browser's own note of the refused request
        await page.click("#fresh")
        assert await page.texts("main > *") == []
