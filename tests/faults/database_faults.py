"""Databases that a test administers, and what befalls them; for tests/faults/test_database*.py.

A fault is really made, and is counted by somebody else than the worker: the server's own log, or what made it.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import sqlalchemy as sa

from tests.faults.database_proxy import DatabaseProxy

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.postgres import PostgresServer
    from tests.support.rig import Rig


@dataclass(frozen=True)
class Fault:
    """A database that can be brought into trouble, and out of it."""

    worker_url: str
    url: str
    """The same database, for the test: past the trouble."""
    begin: Callable[[Rig], Awaitable[None]]
    end: Callable[[], Awaitable[None]]
    count: Callable[[], int]
    """How often the fault has struck."""


# PostgreSQL

THROW_OUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'"


@dataclass
class Postgres:
    """A fresh database. The worker's role owns it, or has what it is granted; it is no superuser."""

    server: PostgresServer
    admin: asyncpg.Connection
    name: str
    log_start: int

    @property
    def role(self) -> str:
        """The worker's role."""
        return f"worker_of_{self.name}"

    @property
    def worker_url(self) -> str:
        """The database, for the worker."""
        return self.url.replace("postgres@", f"{self.role}@")

    @property
    def url(self) -> str:
        """The database, for the test."""
        return self.server.url(self.name)

    async def do(self, *statements: str) -> None:
        """Do one statement after the other as the administrator; {name} and {role} are filled in."""
        for statement in statements:
            await self.admin.execute(statement.replace("{name}", self.name).replace("{role}", self.role))

    async def throw_out(self) -> None:
        """End all connections of the worker's."""
        await self.do(THROW_OUT)

    async def until_waited_for(self) -> None:
        """Wait until the worker waits for a lock."""
        waiting = f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{self.role}' AND wait_event_type = 'Lock'"
        async with asyncio.timeout(20), asyncpg_connection(self.url) as other:  # ours may be in a transaction
            while not await other.fetchval(waiting):  # noqa: ASYNC110 - it happens in the database
                await asyncio.sleep(0.005)

    def said(self, words: str) -> int:
        """How often the server's log says this since the database was made."""
        with self.server._log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().count(words.encode())


@asynccontextmanager
async def asyncpg_connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the test's own."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def postgres_database(server: PostgresServer) -> AsyncIterator[Postgres]:
    """A fresh database, and the worker's role as its owner."""
    log_start = server._log.stat().st_size
    url = server.create_database()
    async with asyncpg_connection(url) as admin:
        made = Postgres(server, admin, url.rpartition("/")[2], log_start)
        await made.do("CREATE ROLE {role} LOGIN", "ALTER DATABASE {name} OWNER TO {role}")
        yield made


@dataclass(frozen=True)
class Trouble:
    """What an administrator does and undoes, and what the server's log says of it meanwhile."""

    begin: tuple[str, ...]
    end: tuple[str, ...]
    said: str


def raising(sqlstate: str) -> Trouble:
    """Every commit with chunks fails with this state at its very end."""
    function = (
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'it is {sqlstate}' USING ERRCODE = '{sqlstate}'; END $$"
    )
    trigger = (
        "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON chunks DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    return Trouble((function, trigger), ("DROP FUNCTION fail CASCADE",), f"it is {sqlstate}")


LOCK = ("BEGIN", "LOCK TABLE runs")


def locking(setting: str, said: str) -> Trouble:
    """Somebody locks a table, and the worker's role has a setting that ends the wait."""
    begin = (f"ALTER ROLE {{role}} SET {setting} = '60ms'", THROW_OUT, *LOCK)
    return Trouble(begin, (f"ALTER ROLE {{role}} RESET {setting}", THROW_OUT, "COMMIT"), said)


TROUBLES = {
    # Not thrown out in the end: the worker must leave a server that is a standby by itself.
    "read-only": Trouble(
        ("ALTER DATABASE {name} SET default_transaction_read_only = on", THROW_OUT),
        ("ALTER DATABASE {name} RESET default_transaction_read_only",),
        "in a read-only transaction",
    ),
    "out of connections": Trouble(
        ("ALTER ROLE {role} CONNECTION LIMIT 0", THROW_OUT),
        ("ALTER ROLE {role} CONNECTION LIMIT -1",),
        "too many connections for role",
    ),
    "statement timeout": locking("statement_timeout", "canceling statement due to statement timeout"),
    "lock timeout": locking("lock_timeout", "canceling statement due to lock timeout"),
    "locked longer than we wait": Trouble(LOCK, ("COMMIT",), "canceling statement due to user request"),
    "disk full (53100)": raising("53100"),
    "serialization failure at every commit": raising("40001"),
}


@asynccontextmanager
async def troubled(server: PostgresServer, trouble: Trouble) -> AsyncIterator[Fault]:
    """Trouble that an administrator makes."""
    async with postgres_database(server) as database:
        yield Fault(
            database.worker_url,
            database.url,
            lambda _: database.do(*trouble.begin),
            lambda: database.do(*trouble.end),
            lambda: database.said(trouble.said),
        )


@asynccontextmanager
async def frozen(server: PostgresServer) -> AsyncIterator[Fault]:
    """The way to the server swallows every byte; nothing is closed, and new connections are accepted."""
    async with postgres_database(server) as database, DatabaseProxy(server.port) as proxy:

        async def begin(_: Rig) -> None:
            proxy.fall_silent()

        async def end() -> None:
            proxy.flow()

        yield Fault(proxy.through(database.worker_url), database.url, begin, end, lambda: proxy.held)


# SQLite

HOLD_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@asynccontextmanager
async def locked(folder: Path) -> AsyncIterator[Fault]:
    """Another process holds the file's lock."""
    path = folder / "letta-ingest.db"
    holders: list[asyncio.subprocess.Process] = []
    pipe = asyncio.subprocess.PIPE

    async def begin(_: Rig) -> None:
        command = [sys.executable, "-I", "-S", "-c", HOLD_LOCK, str(path)]
        holders.append(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
        assert holders[-1].stdout is not None
        assert await holders[-1].stdout.readline() == b"locked\n"

    async def end() -> None:
        await holders[-1].communicate(b"")

    try:
        yield Fault(f"sqlite:///{path}", f"sqlite:///{path}", begin, end, lambda: len(holders))
    finally:
        for holder in holders:
            await holder.communicate(b"")


@asynccontextmanager
async def full(folder: Path) -> AsyncIterator[Fault]:
    """The file cannot grow, as SQLite itself has it; what a disk says is in test_database_server.py."""
    url = f"sqlite:///{folder}/letta-ingest.db"
    errors: list[str] = []
    is_full = True

    def take_up(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {1 if is_full else 1 << 30}").close()  # never below now

    def note(context: sa.ExceptionContext) -> None:
        errors.append(getattr(context.original_exception, "sqlite_errorname", ""))

    async def begin(rig: Rig) -> None:
        sa.event.listen(rig.transactions.engine, "checkout", take_up)
        sa.event.listen(rig.transactions.engine, "handle_error", note)

    async def end() -> None:
        nonlocal is_full
        is_full = False

    yield Fault(url, url, begin, end, lambda: errors.count("SQLITE_FULL"))


SQLITE_TROUBLES = {"locked by another process": locked, "disk full": full}
