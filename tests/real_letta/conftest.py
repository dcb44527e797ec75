"""Fixtures of the tests of the worker on a real Letta server: the worker, its database, the outages.

The lab itself is in tests/conftest.py: the behaviour suite asks the same server.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.real_letta.driver import Driver
from tests.real_letta.lab.lab import Lab
from tests.real_letta.outages import Outages, cause_outages
from tests.real_letta.server_log import ServerLog
from tests.real_letta.stored import Database
from tests.real_letta.worker_process import SECRET, Worker

Say = Callable[[str], None]


class MakeWorker(Protocol):
    """Makes a worker that watches the conversations, the agents, or (`watch_all`) everything."""

    def __call__(
        self, *, conversations: list[str] | None = None, agents: list[str] | None = None, watch_all: bool = False
    ) -> Worker:
        """Make it; it is not started."""
        ...


@pytest.fixture(scope="session")
def outages(
    lab: Lab, driver: Driver, log: ServerLog, say: Say, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outages]:
    """The worker that lives through the server's and Redis's deaths; it goes on while other tests run."""
    outages = cause_outages(lab, driver, log, tmp_path_factory.mktemp("outages"), say)
    yield outages
    outages.worker.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Database:
    """An empty database for the worker, of each kind in turn."""
    if request.param == "sqlite":
        return Database("sqlite", f"sqlite:///{tmp_path}/letta-ingest.db")
    return Database("postgresql", lab.postgres.create_database(tmp_path.name))


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Database:
    """An empty SQLite database, for tests that need not be repeated on the other kind."""
    return Database("sqlite", f"sqlite:///{tmp_path}/letta-ingest.db")


@pytest.fixture
def make_worker(lab: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MakeWorker]:
    """Make the worker of this test; at the end nothing of it is left, and its log must not hold the API key (I10)."""
    made: list[Worker] = []

    def make_worker(
        *, conversations: list[str] | None = None, agents: list[str] | None = None, watch_all: bool = False
    ) -> Worker:
        kind = "database" if "database" in request.fixturenames else "sqlite_database"
        wanted = {"all": watch_all, "conversations": conversations, "agents": agents}
        watch = {name: value for name, value in wanted.items() if value}
        worker = Worker(tmp_path, lab.letta.url, request.getfixturevalue(kind), watch)
        made.append(worker)
        return worker

    yield make_worker
    for worker in made:
        worker.close()
        assert SECRET not in worker.log.read_text(errors="replace")
