"""The status page in a real browser: live, readable on a phone, dark and light, and without JavaScript.

With LETTA_INGEST_PICTURES=1 in the environment, docs/status-page.md gets its pictures anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.hostile import StrangeRuns
from tests.page.test_status_page import HTML_TRICKS
from tests.support.browser import PROGRAM, browsing
from tests.support.pages import talk, watching
from tests.support.shell import SECRET
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.shell import Shell
    from worker.demo.fake_run import FakeRun

DOCS = Path(__file__).parents[2] / "docs"
TAKES_PICTURES = os.environ.get("LETTA_INGEST_PICTURES") == "1"
FITS = "document.documentElement.scrollWidth <= innerWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium here: apt-get install chromium")


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server that asks for a key."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as server:
        yield server


@pytest.fixture
async def run(letta: FakeLetta) -> FakeRun:
    """A run that goes on; another one is over, and the server has lost the beginning of a third."""
    gone = letta.new_run(letta.new_conversation())
    gone.say("hello")
    gone.say("and more")
    gone.cancel()
    gone.finish_cancel()
    talk(letta.new_run(letta.new_conversation()), "I have looked at your order, and the refund is on its way.")
    made = letta.new_run(letta.new_conversation())
    made.say("hello")
    return made


@pytest.fixture
async def shell(letta: FakeLetta, run: FakeRun, sqlite_url: str, tmp_path: Path) -> AsyncIterator[Shell]:
    """A worker process that follows them."""
    made, config = watching(letta, tmp_path, sqlite_url, "transcripts = true, ")
    life = made.start("run", config=config)
    try:
        await made.until_logged(life, "run.finished")
        yield made
        assert await made.stop(life) == 0
    finally:
        life.kill()


def cursor_is(run: FakeRun) -> str:
    """In JavaScript: the run is shown with its cursor."""
    texts = "[...document.querySelectorAll('#followed td')].map((cell) => cell.textContent)"
    return f"((cells) => cells[0] === '{run.id}' && cells[4] === '{len(run.expected_rows())}')({texts})"


async def test_live(shell: Shell, run: FakeRun) -> None:
    """What a run says and how it ends is seen without a reload, wide and light, with no complaint of the browser's."""
    async with browsing() as browser:
        await browser.show(f"http://{shell.listen}/", width=1100, height=960, dark=False)
        await browser.until(f"{cursor_is(run)} && document.getElementById('live').textContent === 'live'")
        assert await browser.value(FITS)
        assert await browser.value(BACKGROUND) == "rgb(251, 251, 250)"
        for word in ("and", "then", "more"):
            run.say(word)
        await browser.until(cursor_is(run))
        if TAKES_PICTURES:
            (DOCS / "status-page-desktop.png").write_bytes(await browser.picture())
        run.complete()
        await browser.until("document.getElementById('followed').children.length === 0")
        assert browser.complaints == []


async def test_trouble_on_a_phone(shell: Shell, run: FakeRun, letta: FakeLetta) -> None:
    """On a phone in the dark nothing is wider than the screen, and a server that goes away is seen as it does."""
    async with browsing() as browser:
        await browser.show(f"http://{shell.listen}/", width=390, height=1160, dark=True)
        await browser.until(f"{cursor_is(run)} && document.getElementById('live').textContent === 'live'")
        assert await browser.value("document.title") == "ready - letta-ingest"
        assert await browser.value(BACKGROUND) == "rgb(20, 23, 26)"
        assert await browser.value(FITS)
        if TAKES_PICTURES:
            (DOCS / "status-page-phone.png").write_bytes(await browser.picture())
        await letta.stop_listening()
        await letta.drop_connections()
        await browser.until("document.getElementById('logged').textContent.includes('discovery.failed')")
        assert await browser.value("document.title") == "degraded - letta-ingest"
        assert await browser.value("document.getElementById('reasons').textContent.startsWith('letta: ')")
        assert await browser.value(FITS)
        assert browser.complaints == []


async def test_tricks_stay_text(letta: FakeLetta, run: FakeRun, shell: Shell) -> None:
    """I6: what the page's script is sent of a hostile server is text to a real browser, too."""
    fault = StrangeRuns()
    for number, trick in enumerate(HTML_TRICKS):
        strange = letta.new_run(f"conv-{trick}", f"agent-{trick}")
        fault.add(letta, strange, f"run-{number}-{trick}")
    async with browsing() as browser:
        await browser.show(f"http://{shell.listen}/", width=1100, height=960, dark=False)
        await browser.until(f"{cursor_is(run)} && document.getElementById('live').textContent === 'live'")
        letta.faults.append(fault)
        letta.runs.update(fault.runs)
        await browser.until(f"document.getElementById('followed').children.length === {len(HTML_TRICKS) + 1}")
        assert (
            await browser.value(
                "document.querySelectorAll('#followed :not(tr, td, a), #newest :not(tr, td, a)').length"
            )
            == 0
        )
        assert (
            await browser.value("document.querySelectorAll('[onerror], [onmouseover], [href^=javascript]').length") == 0
        )
        for number, trick in enumerate(HTML_TRICKS):
            name = json.dumps(f"run-{number}-{trick}")
            assert await browser.value(
                f"[...document.querySelectorAll('#followed td')].some((td) => td.textContent === {name})"
            )
        assert await browser.value("document.title") == "ready - letta-ingest"
        assert browser.complaints == []


async def test_worker_dies(shell: Shell, run: FakeRun) -> None:
    """A page whose worker says nothing any more does not go on looking well."""
    async with browsing() as browser:
        await browser.show(f"http://{shell.listen}/", width=1100, height=960, dark=False)
        await browser.until("document.getElementById('live').textContent === 'live'")
        await browser.value("heardAt = Date.now() - STALE_AFTER; events.close()")
        await browser.until("document.getElementById('live').textContent.startsWith('the worker has said nothing')")


async def test_without_javascript(shell: Shell, run: FakeRun) -> None:
    """Without JavaScript the page is what was so when it was loaded, and says that; a transcript needs none at all."""
    async with browsing() as browser:
        await browser.show(f"http://{shell.listen}/", width=390, height=844, dark=False, script=False)
        await browser.until(cursor_is(run))
        assert "load it again" in await browser.value("document.getElementById('live').textContent")
        link = await browser.value("document.querySelectorAll('#newest a')[1].href")
        await browser.show(link, width=390, height=844, dark=False, script=False)
        await browser.until("document.querySelector('article.agent pre') !== null")
        assert "refund is on its way" in await browser.value("document.body.textContent")
        assert await browser.value("document.querySelector('.verdict').textContent") == "complete"
        assert await browser.value(FITS)
