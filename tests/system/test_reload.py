"""SIGHUP to a real worker process: what may change does, a wrong configuration changes nothing, and systemd is told."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.lives import Life, until
from tests.support.looks import looking
from tests.support.pages import heard, listening
from tests.support.shell import SECRET, Shell, free_address
from tests.support.systemd import Systemd
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NEW_SECRET = "sk-never-to-be-seen-either"

CONFIG = """\
letta = {{ base_url = "{url}", api_key_file = "{key_file}", max_streams = {max_streams} }}
watch = {watch}
storage = {{ url = "{database_url}" }}
discovery = {{ interval = 0.2 }}
service = {{ listen = "{listen}"{page_token} }}
log = {{ level = "{level}" }}
"""


class Service:
    """A worker under systemd, and its configuration."""

    def __init__(self, shell: Shell, systemd: Systemd, conversation: str) -> None:
        self.shell = shell
        self.conversation = conversation
        self.key_file = shell.folder / "key"
        self._systemd = systemd
        self._values: dict[str, Any] = {
            "url": shell.letta.url,
            "key_file": self.key_file,
            "database_url": shell.database_url,
            "watch": f'{{ conversations = ["{conversation}"] }}',
            "level": "info",
            "listen": free_address(),
            "page_token": "",
            "max_streams": 16,
        }
        self.key_file.write_text(SECRET)
        environ = {"NOTIFY_SOCKET": str(systemd.path)}
        self.life: Life = shell.start("run", config=CONFIG.format(**self._values), environ=environ)

    async def reload(self, **changes: Any) -> None:
        """Change the configuration, send SIGHUP, and wait until systemd hears that it is done."""
        self._values |= changes
        await self.send_again(CONFIG.format(**self._values))

    async def send_again(self, text: str) -> None:
        """The same with this as the configuration file."""
        (self.shell.folder / "config.toml").write_text(text)
        before = len(self._systemd.said("READY"))
        os.kill(self.life.pid, signal.SIGHUP)
        await until(lambda: len(self._systemd.said("READY")) > before, 10)

    def browser(self, token: str) -> httpx.AsyncClient:
        """The browser of somebody who holds this token."""
        address = f"http://{self._values['listen']}"
        return httpx.AsyncClient(base_url=address, auth=("anybody", token), trust_env=False)

    async def page(self, token: str) -> int:
        """The status code with which the status page answers somebody who holds this token."""
        async with self.browser(token) as browser:
            return (await browser.get("/")).status_code

    async def stored(self) -> set[str]:
        """The runs that are in the store."""
        async with looking(self.shell.database_url) as look:
            return set(await look.runs())

    async def until_stored(self, run_id: str) -> None:
        """Wait until a run is in the store."""
        async with asyncio.timeout(10):
            while run_id not in await self.stored():  # noqa: ASYNC110 - it happens in another process
                await asyncio.sleep(0.05)

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of this event."""
        return [line for line in self.shell.logged(self.life) if line["event"] == event]


@pytest.fixture
async def service(letta: FakeLetta, sqlite_url: str, tmp_path: Path, systemd: Systemd) -> AsyncIterator[Service]:
    """A worker that is ready and watches one conversation."""
    made = Service(Shell(letta, tmp_path, sqlite_url), systemd, letta.new_conversation())
    try:
        await until(lambda: systemd.said("READY") == ["1"], 10)
        yield made
        assert await made.shell.stop(made.life) == 0
    finally:
        made.life.kill()
    log = (tmp_path / "1.err").read_text()
    assert SECRET not in log
    assert NEW_SECRET not in log


async def test_what_may_change_does(letta: FakeLetta, service: Service, systemd: Systemd) -> None:
    """SIGHUP changes the watch scope, the log level and the key of the running worker, and loses nothing (I2, I10)."""
    watched = letta.new_run(service.conversation)
    other = letta.new_run(letta.new_conversation())
    watched.say("one ")
    other.say("one ")
    await service.until_stored(watched.id)
    await asyncio.sleep(0.5)
    assert other.id not in await service.stored(), "found, and not wanted"

    service.key_file.write_text(NEW_SECRET + "\n")
    await service.reload(watch="{ all = true }", level="debug")
    letta.password = NEW_SECRET
    await letta.drop_connections()
    await service.until_stored(other.id)
    for run in (watched, other):
        run.say("two")
        run.complete()
    await until(lambda: len(service.logged("run.finished")) == 2, 15)

    tally = await service.shell.tally()
    assert tally.is_exact, tally
    assert [line["changed"] for line in service.logged("config.reloaded")] == [
        ["letta.api_key", "log.level", "watch.all", "watch.conversations"]
    ]
    # A follower's log was bound before the level changed.
    assert watched.id in {line["run_id"] for line in service.logged("run.reconnecting") if line["level"] == "debug"}
    assert systemd.said("RELOADING") == ["1"]
    assert int(systemd.said("MONOTONIC_USEC")[0]) > 0


async def test_the_page_asks_for_the_new_token(service: Service) -> None:
    """SIGHUP changes the status page's token; to ask for none takes a start, and until then it asks (I10)."""
    assert await service.page("") == 200
    async with service.browser("") as browser, listening(browser) as events:
        await heard(events, lambda event: event["state"] == "ready")
        await service.reload(page_token=f', page_token = "{NEW_SECRET}"')
        async with asyncio.timeout(10):
            assert [event async for event in events if event["state"] != "ready"] == [], "and the stream has ended"
    for token, other in ((SECRET, NEW_SECRET), (NEW_SECRET, SECRET)):
        await service.reload(page_token=f', page_token = "{token}"')
        assert [await service.page(token), await service.page(other)] == [200, 401]
    await service.reload(page_token="")
    assert [await service.page(NEW_SECRET), await service.page("")] == [200, 401]
    changed = [line["changed"] for line in service.logged("config.reloaded")]
    assert changed == [["service.page_token"]] * 3 + [[]]


async def test_wrong_configuration_changes_nothing(letta: FakeLetta, service: Service) -> None:
    """A wrong configuration is one event with every fault; the worker goes on with what it had (I6's sense for us)."""
    await service.send_again('letta = { base_url = "localhost" }\nlog = { level = "loud" }\n')
    (rejected,) = service.logged("config.rejected")
    assert rejected["level"] == "error"
    for key in ("letta.base_url", "log.level", "watch"):
        assert any(fault.strip().startswith(f"{key}: ") for fault in rejected["faults"]), rejected
    service.key_file.unlink()
    await service.reload()
    assert "letta.api_key_file: cannot use" in service.logged("config.rejected")[1]["faults"][0]
    run = letta.new_run(service.conversation)
    run.say("still watched")
    run.complete()
    await until(lambda: len(service.logged("run.finished")) == 1, 10)
    assert service.logged("config.reloaded") == []


async def test_what_cannot_change_is_said(service: Service) -> None:
    """Settings that take effect only at a start are named, each time, until the worker is started again."""
    await service.reload(max_streams=3, database_url="sqlite:///another.db")
    await service.reload()
    await service.reload(max_streams=16, level="warning")
    said = [line["settings"] for line in service.logged("config.needs_restart")]
    assert said == [["letta.max_streams", "storage.url"], ["letta.max_streams", "storage.url"], ["storage.url"]]
    assert [line["changed"] for line in service.logged("config.reloaded")] == [[], []], "warning hides the third"
