"""Rows, gaps, cursor and state move together or not at all, wherever a transaction fails."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

import pytest
import sqlalchemy as sa

from tests.storage.store import AT, Store, accepted, known, later, lot, row, rows
from worker.core.records import MessageRecord, RunRecord
from worker.core.runlog import Gap, Reject
from worker.metrics import Metrics
from worker.storage.committer import Committer
from worker.storage.writes import RunWrite, SweepWrite, Write

if TYPE_CHECKING:
    from tests.storage.store import RecordingLog

ENDED = RunRecord("run-1", AT, "completed", stop_reason="end_turn", completed_at=later(1))
EVERYTHING: list[Write] = [
    known("run-2", "run-3"),
    SweepWrite(AT, (), later(2), new_scopes={"all": None}),
    RunWrite("run-1", AT, "following", accepted(rows(4, 6), count=6)),
    RunWrite("run-1", AT, "incomplete", accepted([row(9)], gaps=[Gap(7, 8, "not served")], count=7, finished=True)),
    RunWrite("run-1", AT, None, accepted(rejects=[Reject(6, b"{", "not JSON")], cursor=9, count=7)),
    RunWrite("run-1", AT, record=ENDED, messages=[MessageRecord("message-1", "{}")], is_settled=True),
    lot("run-2", 1, 50),
]
"""All that one transaction may hold."""


class _FaultError(ConnectionResetError):
    """The fault of a test: an outage to the worker."""


async def _prepared(store: Store) -> dict[str, Any]:
    await store.write(known("run-1"), lot("run-1", 1, 3))
    return await store.snapshot()


async def _expected(store: Store) -> dict[str, Any]:
    """What the database holds once EVERYTHING was written without a fault: a repetition changes nothing."""
    await store.write(*EVERYTHING)
    return await store.snapshot()


async def test_a_failure_at_any_statement_leaves_nothing(store: Store) -> None:
    """I3: Whichever statement of a transaction fails, nothing of it is stored; the next attempt stores it all."""
    before = await _prepared(store)
    seen = 0
    fails_at = 1
    fired = False

    def fail(*_: object) -> None:
        nonlocal seen, fired
        seen += 1
        if seen == fails_at:
            fired = True
            raise _FaultError

    sa.event.listen(store.transactions.engine, "before_cursor_execute", fail)
    while True:
        seen, fired = 0, False
        try:
            await store.write(*EVERYTHING)
        except _FaultError:
            assert fired
            sa.event.remove(store.transactions.engine, "before_cursor_execute", fail)
            assert await store.snapshot() == before
            sa.event.listen(store.transactions.engine, "before_cursor_execute", fail)
            fails_at += 1
        else:
            break
    sa.event.remove(store.transactions.engine, "before_cursor_execute", fail)
    assert fails_at > 10
    assert await store.cursor("run-1") == 9
    once = await store.snapshot()
    await store.write(*EVERYTHING)
    assert await store.snapshot() == once


class _BrokenCommit:
    """Commits fail so many times, before or after the database has done its part."""

    def __init__(self, store: Store, *, is_done: bool, times: int = 1) -> None:
        self.fired = 0
        dialect = store.transactions.engine.dialect
        commit = dialect.do_commit

        def broken(connection: Any) -> None:
            if self.fired < times:
                if is_done:
                    commit(connection)
                self.fired += 1
                raise _FaultError
            commit(connection)

        dialect.do_commit = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("is_done", [False, True])
async def test_a_commit_of_unknown_outcome_is_repeated(store: Store, log: RecordingLog, *, is_done: bool) -> None:
    """I3: A commit that fails before or after it became durable is repeated: nothing is lost, nothing doubled."""
    before = await _prepared(store)
    broken = _BrokenCommit(store, is_done=is_done)
    with pytest.raises(_FaultError):
        await store.write(*EVERYTHING)
    assert broken.fired == 1
    found = await store.snapshot()
    assert (found != before) if is_done else (found == before)
    await _submit_all(store, log)
    after = await store.snapshot()
    assert sorted(await store.chunks("run-1")) == [1, 2, 3, 4, 5, 6, 9]
    assert (await store.cursor("run-1"), len(await store.chunks("run-2"))) == (9, 50)
    assert len(after["rejects"]) == len(after["messages"]) == len(after["gaps"]) == 1
    if is_done:
        assert after == found


async def _submit_all(store: Store, log: RecordingLog) -> Metrics:
    metrics = Metrics()
    committer = Committer(store.transactions, log, metrics)
    running = asyncio.create_task(committer.run())
    for write in EVERYTHING:
        await committer.submit(write)
    await committer.drain()
    running.cancel()
    await asyncio.wait([running])
    return metrics


@pytest.mark.parametrize("is_done", [False, True])
async def test_the_committer_repeats_by_itself(store: Store, log: RecordingLog, *, is_done: bool) -> None:
    """I3: Whoever submitted a write never hears of a commit that failed twice and then worked."""
    await _prepared(store)
    broken = _BrokenCommit(store, is_done=is_done, times=2)
    await _submit_all(store, log)
    assert broken.fired == 2
    assert log.names == ["database.unavailable", "database.recovered"]
    assert await store.snapshot() == await _expected(store)


async def test_a_backend_that_dies_in_its_commit(postgresql_store: Store, log: RecordingLog) -> None:
    """I3: PostgreSQL killing the connection inside COMMIT costs an attempt, nothing else."""
    await _prepared(postgresql_store)
    async with postgresql_store.engine.begin() as connection:
        for statement in DIE_IN_COMMIT:
            await connection.exec_driver_sql(statement)
    await _submit_all(postgresql_store, log)
    died = await postgresql_store.all(sa.select(sa.text("last_value FROM deaths")))
    assert died[0][0] >= 2
    assert log.names == ["database.unavailable", "database.recovered"]
    assert await postgresql_store.snapshot() == await _expected(postgresql_store)


# A sequence counts what is rolled back, too.
DIE_IN_COMMIT = (
    "CREATE SEQUENCE deaths",
    (
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('deaths') < 2 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NULL; END $$"
    ),
    (
        "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON chunks DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION die()"
    ),
)


class _CuttingProxy:
    """A network between worker and PostgreSQL that is cut once: after the server has committed, before it says so."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.cuts = 0
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        downward = asyncio.create_task(self._copy(up_reader, writer))
        while data := await reader.read(65536):
            if b"COMMIT;" in data and not self.cuts:
                downward.cancel()
                await asyncio.wait([downward])
                up_writer.write(data)
                self.cuts += (await up_reader.read(65536)).count(b"COMMIT\x00")  # the server says that it is done
                break
            up_writer.write(data)
            await up_writer.drain()
        downward.cancel()
        for end in (writer, up_writer):
            end.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


async def test_an_answer_to_a_commit_that_is_lost(postgresql_store: Store, log: RecordingLog) -> None:
    """I3: A commit whose answer is lost on the way is repeated; what it stored is stored once."""
    await _prepared(postgresql_store)
    port = postgresql_store.engine.url.port
    assert port is not None
    async with _CuttingProxy(port) as proxy:
        far = Store(postgresql_store.url.replace(f":{port}/", f":{proxy.port}/"))
        async with far.transactions:
            await _submit_all(far, log)
        assert proxy.cuts == 1
    assert log.names == ["database.unavailable", "database.recovered"]
    assert await postgresql_store.snapshot() == await _expected(postgresql_store)
