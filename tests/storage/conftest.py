"""Fixtures: a migrated store on each database, and databases that can be taken away."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Protocol, cast

import pytest

from tests.storage.store import RecordingLog, Store
from tests.support.postgres import PostgresServer, running_postgres
from worker.storage import engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """An empty migrated store; the test runs on both databases."""
    async with Store(database_url) as made:
        yield made


@pytest.fixture
async def sqlite_store(sqlite_url: str) -> AsyncIterator[Store]:
    """The same on SQLite only."""
    async with Store(sqlite_url) as made:
        yield made


@pytest.fixture
async def postgresql_store(postgresql_url: str) -> AsyncIterator[Store]:
    """The same on PostgreSQL only."""
    async with Store(postgresql_url) as made:
        yield made


@pytest.fixture
def log() -> RecordingLog:
    """A log that keeps its events."""
    return RecordingLog()


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that these tests may stop and start."""
    with running_postgres() as server:
        yield server


class Database(Protocol):
    """A database that can be taken away from its users and given back."""

    url: str

    def take_away(self) -> None:
        """No commit succeeds from now on."""

    def give_back(self) -> None:
        """Commits succeed again."""


class _StoppedPostgres:
    """Taken away by stopping its server."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self.url = server.create_database()

    def take_away(self) -> None:
        self._server.stop()

    def give_back(self) -> None:
        self._server.start()


class _LockedSqlite:
    """Taken away by another connection that holds the write lock."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._path = url.removeprefix("sqlite:///")
        self._lock: sqlite3.Connection | None = None

    def take_away(self) -> None:
        self._lock = sqlite3.connect(self._path, isolation_level=None)
        self._lock.execute("BEGIN IMMEDIATE")

    def give_back(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A fresh empty database that can be taken away; the test runs on both kinds."""
    made: Database
    if request.param == "sqlite":
        monkeypatch.setattr(engine, "BUSY_TIMEOUT_SECONDS", 0.05)
        made = _LockedSqlite(cast("str", request.getfixturevalue("sqlite_url")))
        yield made
        made.give_back()
    else:
        server = cast("PostgresServer", request.getfixturevalue("own_postgres"))
        yield _StoppedPostgres(server)
        if server._process is None:
            server.start()
