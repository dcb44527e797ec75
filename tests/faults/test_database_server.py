"""Troubles that take a PostgreSQL server, or a disk, of their own: restarts, crashes, frozen processes, full disks.

A campaign: `make torture` runs it. The troubles that leave the server alone are in test_database.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.faults.database_disk import TinyDisk
from tests.faults.database_faults import Fault, asyncpg_connection, postgres_database
from tests.faults.database_trial import assert_exact, bear, hurry_database, talk, trial, until_settled
from tests.support.postgres import running_postgres
from tests.support.rig import hurry, until
from worker.demo.fake_letta import FakeLetta
from worker.storage import engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from tests.faults.database_faults import Postgres
    from tests.support.postgres import PostgresServer
    from tests.support.rig import Rig

pytestmark = pytest.mark.campaign


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    hurry(monkeypatch)
    hurry_database(monkeypatch)
    monkeypatch.setattr(engine, "STATEMENT_TIMEOUT_SECONDS", 2.0)


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A server with quick clocks."""
    async with FakeLetta(keepalive_interval=0.2, seed=1) as server:
        yield server


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server that these tests may stop, crash and freeze."""
    with running_postgres() as server:
        yield server


def processes(server: PostgresServer) -> list[int]:
    """The server's process and those that serve its connections."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return [server.pid, *map(int, children)]


def signal_all(server: PostgresServer, number: signal.Signals) -> None:
    """Send a signal to the whole server, the one that makes new processes first."""
    for pid in processes(server):
        os.kill(pid, number)


def crash(server: PostgresServer) -> None:
    """End the server without giving it time for anything ("immediate shutdown")."""
    os.kill(server.pid, signal.SIGQUIT)
    server.stop()


@asynccontextmanager
async def stopped(server: PostgresServer) -> AsyncIterator[Fault]:
    """An administrator stops the server, and starts it later."""
    async with restarting(server, server.stop, "received fast shutdown request") as fault:
        yield fault


@asynccontextmanager
async def crashed(server: PostgresServer) -> AsyncIterator[Fault]:
    """The server crashes, and is started later: it recovers from its log."""
    async with restarting(server, lambda: crash(server), "automatic recovery in progress") as fault:
        yield fault


@asynccontextmanager
async def restarting(server: PostgresServer, stop: Callable[[], None], said: str) -> AsyncIterator[Fault]:
    """What both have in common."""
    async with postgres_database(server) as database:
        is_ended = False

        async def begin(_: Rig) -> None:
            await asyncio.to_thread(stop)

        async def end() -> None:
            nonlocal is_ended
            await asyncio.to_thread(server.start)
            is_ended = True

        def count() -> int:
            # That it recovers, it says when it starts.
            return database.said(said) if is_ended or "shutdown" in said else 1

        yield Fault(database.worker_url, database.url, begin, end, count)
        assert count() >= 1


@asynccontextmanager
async def frozen_server(server: PostgresServer) -> AsyncIterator[Fault]:
    """Its machine stands still: nothing answers, nothing is closed."""
    async with postgres_database(server) as database:
        frozen: list[int] = []

        async def begin(_: Rig) -> None:
            frozen.extend(processes(server))
            signal_all(server, signal.SIGSTOP)

        async def end() -> None:
            signal_all(server, signal.SIGCONT)

        def count() -> int:
            return sum(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T" for pid in frozen)

        yield Fault(database.worker_url, database.url, begin, end, count)


@asynccontextmanager
async def without_standby(server: PostgresServer) -> AsyncIterator[Fault]:
    """Each commit waits for a standby that is not there; it is done all the same, and only the answer does not come."""
    async with postgres_database(server) as database:

        async def begin(_: Rig) -> None:
            await database.do("ALTER SYSTEM SET synchronous_standby_names = 'nowhere'", "SELECT pg_reload_conf()")

        async def end() -> None:
            await database.do("ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")

        said = "canceling wait for synchronous replication"
        yield Fault(database.worker_url, database.url, begin, end, lambda: database.said(said))


@asynccontextmanager
async def full_tablespace(server: PostgresServer) -> AsyncIterator[Fault]:
    """The disk that holds the chunks is full."""
    with disk_of(server, "tablespace", 64) as disk:
        async with postgres_database(server) as database:
            (disk.path / "data").mkdir(mode=0o700)
            if server._owner is not None:
                os.chown(disk.path / "data", server._owner, -1)
            await database.do(f"CREATE TABLESPACE tiny LOCATION '{disk.path}/data'")

            async def begin(_: Rig) -> None:
                await database.do("ALTER TABLE chunks SET TABLESPACE tiny")
                disk.fill()

            async def end() -> None:
                disk.make_room()

            yield Fault(
                database.worker_url, database.url, begin, end, lambda: database.said("No space left on device")
            )
            await database.do("ALTER TABLE chunks SET TABLESPACE pg_default", "DROP TABLESPACE tiny")


def disk_of(server: PostgresServer, name: str, megabytes: int) -> TinyDisk:
    """A disk for the server's own processes."""
    folder = server._root / name
    folder.mkdir()
    if server._owner is not None:
        os.chown(folder, server._owner, -1)
    return TinyDisk(folder, megabytes, server._owner)


TROUBLES: dict[str, Callable[[PostgresServer], AbstractAsyncContextManager[Fault]]] = {
    "stopped": stopped,
    "crashed": crashed,
    "frozen": frozen_server,
    "no standby for synchronous commits": without_standby,
    "disk full": full_tablespace,
}


@pytest.mark.parametrize("name", TROUBLES)
async def test_trouble_of_a_server_is_waited_out(letta: FakeLetta, own_server: PostgresServer, name: str) -> None:
    """The worker says that it waits, stops reading, goes on by itself when it is over; nothing is lost (I1, I3, I8)."""
    async with TROUBLES[name](own_server) as fault:
        await bear(letta, fault)
