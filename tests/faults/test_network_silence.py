"""Silence: a connection on which no bytes arrive is dead and is left; one on which only pings arrive is not.

The waits are the configured ones, and the proxy (proxy.py) goes half open: it swallows everything and closes nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.faults.proxy import HOST, Cut, Proxy, unanswering
from tests.support.rig import QUICK, hurry, until, working
from worker import app
from worker.config import Config
from worker.demo.fake_letta import FakeLetta
from worker.errors import TroubleError
from worker.letta import client as client_module
from worker.patience import Patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

READ_TIMEOUT = 0.5
HICCUP = 2.0
"""So much later than it should a busy machine may do something."""


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    hurry(monkeypatch)


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server that pings a tenth of the read timeout after everything it sends."""
    async with FakeLetta(keepalive_interval=READ_TIMEOUT / 10, seed=1) as server:
        yield server


@pytest.fixture
async def proxy(letta: FakeLetta) -> AsyncIterator[Proxy]:
    """What stands between."""
    async with Proxy(letta.url) as made:
        yield made


async def test_half_open_stream_is_left(letta: FakeLetta, proxy: Proxy, sqlite_url: str) -> None:
    """A live stream without a byte, pings included, is opened again after the read timeout: no look-up helps (I2)."""
    run = letta.new_run(letta.new_conversation())
    async with working(letta, sqlite_url, waits=Patience(), base_url=proxy.url, read_timeout=READ_TIMEOUT) as rig:
        async with rig.following(run):
            for number in range(2):
                await rig.until_stored(run, run.say(f"tok{number} "))
                (since,) = proxy.fall_silent("/stream ")
                in_the_void = run.say("into the void ")
                await until(lambda number=number: len(proxy.asked("/stream ")) == number + 2)
                noticed_after = proxy.asked("/stream ")[-1].at - since
                assert READ_TIMEOUT * 0.8 <= noticed_after <= READ_TIMEOUT + HICCUP
                await rig.until_stored(run, in_the_void)
            run.complete()
        await rig.assert_complete(run)

    assert rig.cursors(run) == [0, 2, 4]


async def test_pings_keep_a_silent_run_open(letta: FakeLetta, proxy: Proxy, sqlite_url: str) -> None:
    """A run that says nothing for many read timeouts, but is pinged, is looked up over REST, ever less often (I9)."""
    letta.keepalive_interval, timeout = 0.05, 1.0
    run = letta.new_run(letta.new_conversation())
    async with working(letta, sqlite_url, waits=QUICK, base_url=proxy.url, read_timeout=timeout) as rig:
        async with rig.following(run):
            await rig.until_stored(run, run.say("one "))
            await asyncio.sleep(3 * timeout)
            run.say("two ")
            run.complete()
        await rig.assert_complete(run)

    assert rig.cursors(run) == [0], "the stream was cut"
    (stream,) = rig.asked("stream")
    looks = [asked.opened_at for asked in rig.asked("run") if stream.closed_at and asked.opened_at < stream.closed_at]
    gaps = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert 3 <= len(looks) <= 3 * timeout / QUICK.silence
    assert gaps[-1] > 1.5 * QUICK.silence


@asynccontextmanager
async def mute() -> AsyncIterator[str]:
    """The URL of a port that accepts every connection and never says a word, TLS or other."""
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), HOST, 0)
    writers: list[asyncio.StreamWriter] = []
    try:
        yield f"https://{HOST}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


@pytest.mark.parametrize("server", [unanswering, mute])
async def test_connection_that_comes_to_nothing(server: type[object]) -> None:
    """A connection that is neither made nor refused, or whose TLS never begins, is left after the connect timeout."""
    async with server() as url:  # type: ignore[attr-defined]
        settings = {"base_url": url, "connect_timeout": READ_TIMEOUT, "read_timeout": 60.0}
        config = Config.model_validate({"letta": settings, "watch": {"all": True}})
        async with app.open_letta(config) as client:
            began = time.monotonic()
            with pytest.raises(TroubleError, match="timeout"):
                await client.server_version()
            assert READ_TIMEOUT * 0.8 <= time.monotonic() - began <= READ_TIMEOUT + HICCUP


async def test_half_open_without_pings(
    letta: FakeLetta, proxy: Proxy, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pings the end of a half open run is learnt over REST, and no REST request waits for ever (I2)."""
    monkeypatch.setattr(client_module, "ANSWER_SECONDS", READ_TIMEOUT)
    run = letta.new_run(letta.new_conversation(), pings=False)
    faults = [Cut(0, "silence", on=on) for on in (r"GET /v1/runs/\?", r"GET /v1/runs/run-[^/]+ ")]
    proxy.faults += faults
    async with working(
        letta, sqlite_url, waits=QUICK, base_url=proxy.url, include_pings=False, read_timeout=60.0
    ) as rig:
        with pytest.raises(TroubleError):
            await rig.sweep()
        async with rig.following(run):
            await rig.until_stored(run, run.say("one "))
            assert proxy.fall_silent("/stream ")
            run.say("two ")
            run.complete()
        await rig.assert_complete(run)

    assert [fault.fired for fault in faults] == [1, 1]
