"""Databases in trouble that passes: the whole worker waits, stops reading, goes on by itself, and has lost nothing.

What does not pass is in test_database_refusals.py, what takes a server of its own in test_database_server.py.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from tests.faults.database_faults import (
    LOCK,
    SQLITE_TROUBLES,
    TROUBLES,
    frozen,
    postgres_database,
    troubled,
)
from tests.faults.database_proxy import DatabaseProxy
from tests.faults.database_trial import bear, hurry_database, trial
from tests.support.looks import looking
from tests.support.rig import hurry, until
from worker.demo.fake_letta import FakeLetta
from worker.storage import engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.faults.database_faults import Postgres
    from tests.faults.database_proxy import Cut
    from tests.faults.database_trial import Trial
    from tests.support.postgres import PostgresServer

SIMILAR = ("statement timeout", "lock timeout", "serialization failure at every commit")
"""To the worker these are what others of the troubles are; they are tried less often."""
STRIKES = 4
"""A fault that passes by itself strikes so often."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    hurry(monkeypatch)
    hurry_database(monkeypatch)


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A server with quick clocks."""
    async with FakeLetta(keepalive_interval=0.2, seed=1) as server:
        yield server


# Trouble that lasts until somebody ends it


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.campaign if name in SIMILAR else ()) for name in TROUBLES]
)
async def test_trouble_of_postgresql_is_waited_out(
    letta: FakeLetta, postgres_server: PostgresServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker says that it waits, stops reading, goes on by itself when it is over; nothing is lost (I1, I3, I8)."""
    if name == "locked longer than we wait":
        monkeypatch.setattr(engine, "STATEMENT_TIMEOUT_SECONDS", 1.0)
    async with troubled(postgres_server, TROUBLES[name]) as fault:
        await bear(letta, fault)


async def test_a_silent_way_to_postgresql_is_waited_out(
    letta: FakeLetta, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where no connection is closed and no answer comes, which only a clock can tell (I3, I8)."""
    monkeypatch.setattr(engine, "STATEMENT_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(engine, "CONNECT_TIMEOUT_SECONDS", 1.0)
    async with frozen(postgres_server) as fault:
        await bear(letta, fault)


async def test_a_server_that_accepts_and_says_nothing_is_waited_for(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that does not come about in time is an outage, whatever the driver says was its cause (I3)."""
    monkeypatch.setattr(engine, "CONNECT_TIMEOUT_SECONDS", 0.2)
    async with DatabaseProxy(postgres_server.port) as proxy:
        proxy.fall_silent()
        connections = engine.create_engine(proxy.through(postgres_server.url("postgres")))
        with pytest.raises(TimeoutError) as raised:
            await connections.connect()
        await connections.dispose()
        assert proxy.held
    assert engine.is_outage(raised.value)
    assert engine.describe(raised.value) == "TimeoutError"


@pytest.mark.parametrize("name", SQLITE_TROUBLES)
async def test_trouble_of_sqlite_is_waited_out(letta: FakeLetta, tmp_path: Path, name: str) -> None:
    """The same on SQLite (I1, I3, I8)."""
    async with SQLITE_TROUBLES[name](tmp_path) as fault:
        await bear(letta, fault)


# Trouble that passes by itself


@pytest.mark.parametrize("cut", ["before the commit", "before its answer"])
async def test_connections_cut_in_their_commits(letta: FakeLetta, postgres_server: PostgresServer, cut: Cut) -> None:
    """Whether a commit that was cut off was done does not matter: it is repeated, and stored once (I1, I3)."""
    async with (
        postgres_database(postgres_server) as database,
        DatabaseProxy(postgres_server.port) as proxy,
        trial(letta, proxy.through(database.worker_url), database.url) as it,
    ):
        await it.until_commits()
        proxy.cut = cut
        while proxy.lost + proxy.unheard < STRIKES:
            await it.until_commits(1)
        proxy.cut = None
        await it.until_ready()
    assert (proxy.lost > 0, proxy.unheard > 0) == (cut == "before the commit", cut == "before its answer")


async def terminate(database: Postgres, it: Trial) -> str:
    """An administrator ends every connection, again and again."""
    for _ in range(5 * STRIKES):
        await database.throw_out()
        await asyncio.sleep(0.02)
    await it.until_commits(1)
    return "terminating connection due to administrator command"


async def deadlock(database: Postgres, it: Trial) -> str:
    """Somebody locks what the worker wants, then wants what the worker has locked; the server ends the worker's."""
    await database.do("ALTER ROLE {role} SET deadlock_timeout = '250ms'", "SET deadlock_timeout = '20s'")
    await database.throw_out()
    for _ in range(STRIKES):
        await it.until_commits(1)
        await database.do("BEGIN", "LOCK TABLE chunks IN EXCLUSIVE MODE")
        await database.until_waited_for()
        await database.do("SELECT FROM runs FOR UPDATE", "COMMIT")
    return "deadlock detected"


async def collide(database: Postgres, it: Trial) -> str:
    """Somebody changes the rows that a serializable transaction of the worker waits for."""
    await database.do("ALTER ROLE {role} SET default_transaction_isolation = 'serializable'")
    await database.throw_out()
    for _ in range(STRIKES):
        await it.until_commits(1)
        await database.do("BEGIN", "UPDATE runs SET updated_at = updated_at")
        await database.until_waited_for()
        await database.do("COMMIT")
    return "could not serialize access due to concurrent update"


@pytest.mark.parametrize("strike", [terminate, deadlock, collide])
async def test_transactions_that_postgresql_ends(
    letta: FakeLetta, postgres_server: PostgresServer, strike: Any
) -> None:
    """A transaction the server ends, for whatever reason, is repeated, and nobody has to do anything (I1, I3)."""
    async with postgres_database(postgres_server) as database:
        async with trial(letta, database.worker_url, database.url) as it:
            await it.until_commits()
            said = await strike(database, it)
            await it.until_ready()
        assert database.said(said) >= STRIKES


# A slow database

COMMIT_SECONDS, SLOW_SECONDS = 0.1, 2.0


async def bear_slowness(it: Trial) -> None:
    """Watch a worker whose every commit takes a tenth of a second."""
    metric = it.rig.metrics.registry.get_sample_value
    began, commits, chunks = time.monotonic(), it.commits, metric("letta_ingest_chunks_stored_total") or 0
    await asyncio.sleep(SLOW_SECONDS)
    commits, chunks = it.commits - commits, (metric("letta_ingest_chunks_stored_total") or 0) - chunks
    assert 2 <= commits <= 1 + (time.monotonic() - began) / COMMIT_SECONDS
    assert chunks / commits >= 5, f"{chunks} chunks in {commits} commits"
    assert it.rig.committer.stalled_seconds() < 10 * COMMIT_SECONDS
    assert await it.health.troubles() == {}
    assert it.rig.log.of("database.unavailable") == []


async def test_slow_commits_of_postgresql(letta: FakeLetta, postgres_server: PostgresServer) -> None:
    """A slow commit carries the more: the worker keeps up, and is ready all the while (I3, I8)."""
    async with (
        postgres_database(postgres_server) as database,
        DatabaseProxy(postgres_server.port) as proxy,
        trial(letta, proxy.through(database.worker_url), database.url) as it,
    ):
        proxy.delay = COMMIT_SECONDS
        await bear_slowness(it)


async def test_slow_commits_of_sqlite(letta: FakeLetta, sqlite_url: str) -> None:
    """The same on SQLite (I3, I8)."""

    def linger(statement: str) -> None:
        if statement == "COMMIT":
            time.sleep(COMMIT_SECONDS)

    def slow_down(connection: Any, *_: object) -> None:
        connection.set_trace_callback(linger)

    async with trial(letta, sqlite_url, sqlite_url) as it:
        sa.event.listen(it.rig.transactions.engine, "checkout", slow_down)
        await bear_slowness(it)


ROW_SECONDS, PATIENCE_SECONDS = 0.003, 0.3
MANY_RUNS, MANY_CHUNKS = 20, 12
LINGER = f"BEGIN PERFORM pg_sleep({ROW_SECONDS}); RETURN NULL; END"
SLOW_ROWS = (
    f"CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS $$ {LINGER} $$",
    "CREATE TRIGGER slow AFTER INSERT ON chunks FOR EACH ROW EXECUTE FUNCTION linger()",
    f"ALTER ROLE {{role}} SET statement_timeout = '{PATIENCE_SECONDS}s'",
)


async def test_a_lot_that_takes_too_long_is_made_smaller(letta: FakeLetta, postgres_server: PostgresServer) -> None:
    """What heaped up in an outage is stored even where all of it at once takes longer than a statement may (I3)."""
    assert MANY_RUNS * MANY_CHUNKS * ROW_SECONDS > 2 * PATIENCE_SECONDS
    runs = [letta.new_run(letta.new_conversation()) for _ in range(MANY_RUNS)]
    async with postgres_database(postgres_server) as database:
        async with trial(letta, database.worker_url, database.url, max_streams=MANY_RUNS + 8) as it:
            await until(lambda: all(it.rig.asked("stream", run) for run in runs))
            await database.do(*SLOW_ROWS, *LOCK)
            await database.throw_out()
            for run in runs:
                for _ in range(MANY_CHUNKS):
                    run.say("all at once ")
            await it.until_unready()
            await database.do("COMMIT")
            await it.until_ready()
            async with looking(database.url) as look:
                while len(await look.chunks({run.id for run in runs})) < MANY_RUNS * MANY_CHUNKS:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            await database.do("DROP FUNCTION linger CASCADE")
            for run in runs:
                run.fail("so that there is no text to fetch")
        assert database.said("canceling statement due to statement timeout") >= 2
