"""Fixtures that more than one folder of tests uses, and nothing else; what they are made of is in tests/support."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import pytest

from tests.support.leaks import fail_on_leaks
from tests.support.postgres import PostgresServer, running_postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from tests.real_letta.driver import Driver
    from tests.real_letta.lab.lab import Lab
    from tests.real_letta.server_log import ServerLog

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail every test that shows a key (I10)."""
    report = yield
    fail_on_leaks(item, report)
    return report


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


# The lab of the real server. What it needs is imported only where it is used: that takes a second.


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line on the terminal at once: tests of the real server take minutes and must not look dead."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n[real letta] {text}", end="", flush=True)

    return say


@pytest.fixture(scope="session")
def lab(say: Callable[[str], None], request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The running real server. Its logs are kept if a test failed."""
    from tests.real_letta.lab.lab import Lab  # noqa: PLC0415

    with Lab(say) as lab:
        yield lab
        lab.keep_directory = request.session.testsfailed > 0


@pytest.fixture(scope="session")
def driver(lab: Lab) -> Iterator[Driver]:
    """The application that talks to the real server."""
    from tests.real_letta.driver import Driver  # noqa: PLC0415

    driver = Driver(lab.letta.url)
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def log(lab: Lab) -> Iterator[ServerLog]:
    """What the real server's Redis holds: the oracle."""
    from tests.real_letta.server_log import ServerLog  # noqa: PLC0415

    log = ServerLog(lab.redis.port)
    yield log
    log.close()
