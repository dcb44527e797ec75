"""Troubles that take a PostgreSQL server, or a disk, of their own: restarts, crashes, frozen processes, full disks.

A campaign: `make torture` runs it. The troubles that leave the server alone are in test_database.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import httpx
import pytest

from tests.faults.database_disk import TinyDisk
from tests.faults.database_faults import THROW_OUT, Fault, postgres_database
from tests.faults.database_trial import assert_exact, bear, hurry_database, talk, trial
from tests.faults.test_database_refusals import break_and_mend, granted
from tests.support.postgres import running_postgres
from tests.support.rig import hurry
from worker.demo.fake_letta import FakeLetta
from worker.storage import engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

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
    with contextlib.suppress(ProcessLookupError):
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

        try:
            yield Fault(database.worker_url, database.url, begin, end, count)
        finally:
            signal_all(server, signal.SIGCONT)


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
            disk.do("mkdir -m 0700 data")
            await database.do(f"CREATE TABLESPACE tiny LOCATION '{disk.path}/data'")

            async def begin(_: Rig) -> None:
                await database.do("ALTER TABLE chunks SET TABLESPACE tiny")
                disk.fill()

            async def end() -> None:
                disk.make_room()

            yield Fault(database.worker_url, database.url, begin, end, lambda: database.said("No space left on device"))
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


async def test_a_backend_that_is_killed(letta: FakeLetta, own_server: PostgresServer) -> None:
    """The kernel kills one process of the server, which then throws everybody out and recovers (I1, I3)."""
    async with postgres_database(own_server) as database:
        async with trial(letta, database.worker_url, database.url) as it:
            await it.until_commits()
            pids = await database.admin.fetch(f"SELECT pid FROM pg_stat_activity WHERE usename = '{database.role}'")
            os.kill(pids[0]["pid"], signal.SIGKILL)
            await it.until_unready()
            await it.until_ready()
        assert database.said("terminating any other active server processes") == 1
        assert database.said("automatic recovery in progress") == 1


async def test_no_room_for_the_log_of_the_server(letta: FakeLetta) -> None:
    """A full disk makes PostgreSQL panic; with room and started again, it has all that it said was stored (I3)."""
    with running_postgres() as server, disk_of(server, "wal", 80) as disk:
        server.stop()
        disk.do(
            f"cp -a {server._data}/pg_wal . && rm -r {server._data}/pg_wal && ln -s $1/pg_wal {server._data}/pg_wal"
        )
        server.start()
        async with postgres_database(server) as database, trial(letta, database.worker_url, database.url) as it:
            await it.until_commits()
            disk.fill()
            with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                for _ in range(8):  # what is left of the log
                    await database.do("SELECT pg_switch_wal()", "CREATE TABLE some AS SELECT 1", "DROP TABLE some")
            await it.until_unready()
            await asyncio.to_thread(crash, server)
            assert database.said("PANIC:") >= 1
            assert database.said("No space left on device") >= 1
            disk.make_room()
            await asyncio.to_thread(server.start)
            await it.until_ready()


async def test_no_room_for_a_sqlite_file(letta: FakeLetta, tmp_path: Path) -> None:
    """A worker whose disk is really full says so, and goes on by itself when there is room (I1, I3)."""
    folder, copy = tmp_path / "disk", tmp_path / "copy"
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(url=letta.url, folder=folder, listen=listen))
    is_over = asyncio.Event()
    with TinyDisk(folder, 32) as disk, (tmp_path / "log").open("wb") as log:
        command = [*disk.inside, sys.executable, "-P", "-m", "worker", "run", "--config", str(config)]
        worker = await asyncio.create_subprocess_exec(*command, stderr=log)
        talking = asyncio.create_task(talk(letta, is_over))
        try:
            async with httpx.AsyncClient(base_url=f"http://{listen}", trust_env=False) as client:
                await until_metric(client, "letta_ingest_chunks_stored_total", 50)
                disk.fill()
                await until_readyz(client, 503)
                loud = letta.runs[min(letta.runs)]
                for _ in range(8):
                    loud.say("x" * 500_000)
                disk.make_room()
                await until_readyz(client, 200)
                is_over.set()
                await talking
                await until_metric(client, "letta_ingest_runs_finished_total", len(letta.runs))
            worker.terminate()
            assert await worker.wait() == 0
        finally:
            talking.cancel()
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()
        await asyncio.to_thread(subprocess.run, [*disk.inside, "cp", "-r", str(folder), str(copy)], check=True)
    said = (tmp_path / "log").read_text()
    assert re.search(r"(disk is full|disk I/O error).*database\.unavailable", said)
    assert "database.recovered" in said
    assert "worker.task_failed" not in said
    await assert_exact(letta, f"sqlite:///{copy}/letta-ingest.db")


CONFIG = """\
letta = {{ base_url = "{url}" }}
watch = {{ all = true }}
storage = {{ url = "sqlite:///{folder}/letta-ingest.db" }}
discovery = {{ interval = 0.2 }}
service = {{ listen = "{listen}" }}
"""


async def until_metric(client: httpx.AsyncClient, name: str, least: float) -> None:
    """Wait until the sum of a metric is so large."""
    async with asyncio.timeout(40):
        while True:
            with contextlib.suppress(httpx.TransportError):
                page = (await client.get("/metrics")).text
                if sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name)) >= least:
                    return
            await asyncio.sleep(0.1)


async def until_readyz(client: httpx.AsyncClient, status: int) -> None:
    """Wait until the worker says that it is ready, or that its database is not."""
    async with asyncio.timeout(40):
        while (answer := await client.get("/readyz")).status_code != status:  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.1)
    assert ("database" in answer.text) == (status == 503)


PASSWORD_RULE = "host all {role} 127.0.0.1/32 scram-sha-256\n"


async def test_a_password_that_is_changed(own_server: PostgresServer, tmp_path: Path) -> None:
    """A worker whose password is not right any more ends with exit code 3 and says so without it (I7, I10)."""
    rules = own_server._data / "pg_hba.conf"
    before = rules.read_text()
    async with granted(own_server, tmp_path) as (database, shell):
        rules.write_text(PASSWORD_RULE.format(role=database.role) + before)
        try:
            await database.do("ALTER ROLE {role} PASSWORD 'the first'", "SELECT pg_reload_conf()")
            shell.database_url = database.worker_url.replace("@", ":the%20first@")

            async def change() -> None:
                await database.do("ALTER ROLE {role} PASSWORD 'the second'", THROW_OUT)

            async def configure() -> None:
                shell.database_url = database.worker_url.replace("@", ":the%20second@")

            said = "password authentication failed for user .*; check the user and the password"
            await break_and_mend(shell, change, said, configure)
        finally:
            rules.write_text(before)
            await database.do("SELECT pg_reload_conf()")
    assert "the first" not in (tmp_path / "2.err").read_text()
