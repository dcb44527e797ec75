"""What the outside sees: idle and healthy, degraded and by what, and stuck, told apart (promise 4)."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
import sqlite3
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.lives import Life, until
from tests.support.postgres import running_postgres
from tests.support.rig import SECRET as KEY
from tests.support.rig import working
from tests.support.shell import Shell, free_address
from tests.support.systemd import Systemd
from worker import monitor, service
from worker.census import Census
from worker.demo.fake_letta import FakeLetta
from worker.monitor import Health, Monitor
from worker.storage.writes import SweepWrite

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


async def asked(address: str, path: str) -> tuple[int, dict[str, Any]]:
    """What an endpoint answers."""
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=5.0) as client:
        answer = await client.get(path)
        return answer.status_code, answer.json()


async def until_asked(address: str, path: str, status: int) -> dict[str, Any]:
    """Wait until an endpoint answers with this status."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                found, body = await asked(address, path)
                if found == status:
                    return body
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def idle_worker(letta: FakeLetta, url: str, folder: Path, systemd: Systemd) -> AsyncIterator[tuple[Shell, int]]:
    """A worker process under this systemd, with nothing to do; gives its shell and its process id."""
    shell = Shell(letta, folder, url, listen=free_address())
    environ = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "400000"}
    assert (await shell.do("migrate")).code == 0
    life = shell.start("run", environ=environ)
    try:
        await until_asked(shell.listen, "/readyz", 200)
        yield shell, life.pid
        assert await shell.stop(life) == 0
        assert "STOPPING=1" in systemd.listen()
    finally:
        life.kill()


def hurry_status() -> None:
    """In the worker's process: its line may change soon."""
    service.STATUS_SECONDS = 0.1


@contextlib.asynccontextmanager
async def unready_worker(shell: Shell, systemd: Systemd) -> AsyncIterator[Life]:
    """A worker process that has something to wait for; it ends well in the end, and was ready once."""
    life = shell.start("run", environ={"NOTIFY_SOCKET": str(systemd.path)}, prepare=hurry_status)
    try:
        yield life
        assert await shell.stop(life) == 0
        assert (systemd.said("READY"), systemd.said("STOPPING")) == (["1"], ["1"])
    finally:
        life.kill()


async def test_ready_comes_with_the_first_listing(
    letta: FakeLetta, sqlite_url: str, tmp_path: Path, systemd: Systemd
) -> None:
    """Promise 4: READY=1 waits until the runs have been listed once; until then STATUS says what it waits for."""

    def status_is(line: str) -> Callable[[], bool]:
        return lambda: systemd.said("STATUS")[-1:] == [line]

    shell = Shell(letta, tmp_path, sqlite_url)
    await letta.stop_listening()
    async with unready_worker(shell, systemd) as life:
        await shell.until_logged(life, "discovery.failed")
        error = next(line["error"] for line in shell.logged(life) if line["event"] == "discovery.failed")
        await until(status_is(f"0 streams open; 0 chunks stored; 0 runs unfinished; letta: {error}"), 5)
        assert systemd.said("READY") == []
        await letta.start_listening()
        await until(lambda: systemd.said("READY") == ["1"], 15)
        run = letta.new_run()
        rows = run.say("hello")
        await until(status_is(f"1 streams open; {rows} chunks stored; 1 runs unfinished"), 10)
        run.complete()
        await until(status_is(f"0 streams open; {len(run.expected_rows())} chunks stored; 0 runs unfinished"), 10)
        told = len(systemd.said("STATUS"))
        await asyncio.sleep(0.5)
        assert len(systemd.said("STATUS")) == told, "told again although nothing has changed"


async def test_ready_waits_for_the_database(letta: FakeLetta, tmp_path: Path, systemd: Systemd) -> None:
    """Promise 4: a worker whose database is down since its start is not ready, and STATUS says why."""
    with running_postgres() as server:
        shell = Shell(letta, tmp_path, server.create_database())
        assert (await shell.do("migrate")).code == 0
        server.stop()
        async with unready_worker(shell, systemd) as life:
            await shell.until_logged(life, "database.unavailable")
            await until(lambda: bool(systemd.said("STATUS")), 5)
            assert systemd.said("STATUS")[-1].startswith("waits for the database: ")
            assert systemd.said("READY") == []
            server.start()
            await until(lambda: systemd.said("READY") == ["1"], 20)


async def test_idle_is_not_stopped(letta: FakeLetta, sqlite_url: str, tmp_path: Path, systemd: Systemd) -> None:
    """Promise 4: an idle worker is ready and feeds the watchdog; one whose loop stands still does neither."""
    async with idle_worker(letta, sqlite_url, tmp_path, systemd) as (shell, pid):
        assert "READY=1" in systemd.listen()
        await systemd.hears("WATCHDOG=1", times=3)
        assert await asked(shell.listen, "/healthz") == (200, {"status": "ok"})
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(0.3)
            before = len(systemd.listen())
            async with httpx.AsyncClient(trust_env=False, timeout=1.0) as client:
                with pytest.raises(httpx.ReadTimeout):
                    await client.get(f"http://{shell.listen}/healthz")
            assert len(systemd.listen()) == before
        finally:
            os.kill(pid, signal.SIGCONT)
        await systemd.hears("WATCHDOG=1", times=3)
        assert await asked(shell.listen, "/healthz") == (200, {"status": "ok"})


async def test_server_away(letta: FakeLetta, sqlite_url: str, tmp_path: Path, systemd: Systemd) -> None:
    """Promise 4: without its server the worker says `letta`, is degraded, and systemd leaves it alone."""
    async with idle_worker(letta, sqlite_url, tmp_path, systemd) as (shell, _):
        await letta.stop_listening()
        await letta.drop_connections()
        body = await until_asked(shell.listen, "/readyz", 503)
        assert (body["status"], list(body["troubles"])) == ("degraded", ["letta"])
        assert (await asked(shell.listen, "/healthz"))[0] == 200
        await systemd.hears("WATCHDOG=1", times=3)
        await letta.start_listening()
        await until_asked(shell.listen, "/readyz", 200)


async def test_deaf_systemd(letta: FakeLetta, sqlite_url: str, tmp_path: Path, systemd: Systemd) -> None:
    """Promise 4: a systemd that does not read what it is told holds nothing up, and hears again when it reads again."""
    async with idle_worker(letta, sqlite_url, tmp_path, systemd) as (shell, _):
        assert systemd.fill() > 0
        await asyncio.sleep(0.5)
        assert await asked(shell.listen, "/healthz") == (200, {"status": "ok"})
        await systemd.hears("WATCHDOG=1", times=3)


async def test_ready_is_said_again(letta: FakeLetta, sqlite_url: str, tmp_path: Path, systemd: Systemd) -> None:
    """Promise 4: READY=1 for which systemd's queue had no room is said again, once, when it has room."""
    shell = Shell(letta, tmp_path, sqlite_url, listen=free_address())
    await letta.stop_listening()
    async with unready_worker(shell, systemd) as life:
        await shell.until_logged(life, "discovery.failed")
        assert systemd.said("READY") == []
        systemd.fill()
        await letta.start_listening()
        await until_asked(shell.listen, "/readyz", 200)
        assert systemd.fill() == 0, "somebody has read"
        await until(lambda: systemd.said("READY") == ["1"], 10)
        await asyncio.sleep(0.5)
        assert systemd.said("READY") == ["1"], "said again although it was heard"


async def test_database_away_from_an_idle_worker(letta: FakeLetta, tmp_path: Path, systemd: Systemd) -> None:
    """Promise 4: even with nothing to write the worker finds out that its database is gone, says so, and recovers."""
    with running_postgres() as server:
        async with idle_worker(letta, server.create_database(), tmp_path, systemd) as (shell, _):
            server.stop()
            body = await until_asked(shell.listen, "/readyz", 503)
            assert (body["status"], list(body["troubles"])) == ("degraded", ["database"])
            assert (await asked(shell.listen, "/healthz"))[0] == 200
            await systemd.hears("WATCHDOG=1", times=3)
            server.start()
            await until_asked(shell.listen, "/readyz", 200)


async def test_what_is_stuck_is_named(letta: FakeLetta, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 4: a committer that gets nothing done, or a discovery that never returns, is called stuck by name."""
    monkeypatch.setattr(monitor, "STUCK_SECONDS", 0.3)
    letta.password = KEY
    async with working(letta, sqlite_url) as rig:
        health = Health(rig.committer, rig.reads, 0.1)
        address = free_address()
        async with Monitor(address, health, rig.metrics, Census(rig.reads, rig.metrics)):
            health.discovery_succeeded()
            assert await asked(address, "/healthz") == (200, {"status": "ok"})
            with contextlib.closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as other:
                other.execute("BEGIN IMMEDIATE")  # so that the commit waits inside SQLite, and no error says so
                commit = await rig.committer.submit(SweepWrite(dt.datetime.now(dt.UTC), []))
                health.discovery_succeeded()
                await asyncio.sleep(0.35)
                health.discovery_moved()
                assert await asked(address, "/healthz") == (503, {"status": "stuck", "stuck": ["committer"]})
                other.rollback()
            await commit
            health.discovery_succeeded()
            assert await asked(address, "/healthz") == (200, {"status": "ok"})
            await asyncio.sleep(0.5)
            assert await asked(address, "/healthz") == (503, {"status": "stuck", "stuck": ["discovery"]})
            health.discovery_failed("away")
            assert (await asked(address, "/healthz"))[0] == 200
