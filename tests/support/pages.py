"""The status page as a test sees it: its tags and texts, and its events; for tests/page."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import httpx

from tests.support.shell import CONFIG, Shell, free_address
from worker.census import Census
from worker.logs import Troubles
from worker.monitor import Health, Monitor
from worker.page.access import Access
from worker.page.routes import Page
from worker.page.snapshot import Snapshots
from worker.storage.reads import Reads
from worker.storage.transcripts import Transcripts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun

OPEN = Access(transcripts=True, is_loopback=True, token=None)


class Seen(HTMLParser):
    """What a browser makes of a page: its tags with their attributes, its texts, and where it leads."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in {"href", "src", "action"}]

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self.texts.append(data.strip(" "))

    @property
    def text(self) -> str:
        """All of its text."""
        return "\n".join(self.texts)


@asynccontextmanager
async def page_of(rig: Rig, access: Access = OPEN) -> AsyncIterator[tuple[httpx.AsyncClient, Health]]:
    """The page of a worker in this process, as a browser asks for it, and the health that it shows."""
    address = free_address()
    health = Health(rig.committer, rig.reads, 60.0)
    reads = Reads(rig.engine, is_patient=False)
    page = Page(Snapshots(health, rig.metrics, reads, Troubles()), Transcripts(reads), access)
    async with (
        Monitor(address, health, rig.metrics, Census(reads, rig.metrics), page.install),
        httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=5.0) as client,
    ):
        yield client, health


def watching(letta: FakeLetta, folder: Path, url: str, service: str = "") -> tuple[Shell, str]:
    """A shell whose worker listens, and its configuration with more in the section `service`."""
    shell = Shell(letta, folder, url, listen=free_address())
    settings = {"url": letta.url, "key": shell.key, "database_url": url, "listen": shell.listen}
    return shell, CONFIG.format(**settings).replace("service = { ", f"service = {{ {service}")


@asynccontextmanager
async def listening(client: httpx.AsyncClient) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The page's events, as they come."""
    async with client.stream("GET", "/events") as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"] == "text/event-stream"
        yield (json.loads(line.removeprefix("data: ")) async for line in answer.aiter_lines() if line)


async def heard(events: AsyncIterator[dict[str, Any]], is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first event of which it is so."""
    async for event in events:
        if is_so(event):
            return event
    raise AssertionError("the events ended")


def talk(run: FakeRun, words: str = "hello") -> None:
    """What the agent of a finished run said."""
    run.say(words)
    run.complete()
