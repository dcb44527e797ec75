"""Fixtures that more than one folder of tests uses, and nothing else; what they are made of is in tests/support."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import pytest

from tests.support.postgres import PostgresServer, running_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What a developer's shell, a proxy or systemd may set, and the worker or its libraries would obey.
FOREIGN_PREFIXES = ("LETTA_", "PG")
FOREIGN_NAMES = {
    "ALL_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "CREDENTIALS_DIRECTORY",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
}


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test depend on the environment it was started in."""
    for name in list(os.environ):
        if name.startswith(FOREIGN_PREFIXES) or name.upper() in FOREIGN_NAMES:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio, as the worker does."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The real PostgreSQL server of this session (under xdist: of this process). Never stop it."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path}/letta-ingest.db"


@pytest.fixture
def postgresql_url(postgres_server: PostgresServer) -> str:
    """The URL of a fresh empty PostgreSQL database."""
    return postgres_server.create_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh empty database: the test runs once on each kind."""
    return cast("str", request.getfixturevalue(f"{request.param}_url"))
