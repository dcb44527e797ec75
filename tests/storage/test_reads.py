"""What is read of the store, on both databases."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tests.storage.store import AT, Store, accepted, ending, known, later, lot, row, rows
from worker.core.records import RunRecord
from worker.core.runlog import Gap, Reject
from worker.errors import RefusedError
from worker.storage.reads import Reads, StoredRun
from worker.storage.writes import RunWrite, SweepWrite

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer


def ids(runs: list[StoredRun]) -> list[str]:
    """The runs' names."""
    return [run.record.run_id for run in runs]


async def test_what_is_unsettled(store: Store) -> None:
    """I2: Every run that is not settled is found with its cursor: live ones oldest first, old ones newest first."""
    reads = Reads(store.engine, is_patient=False)
    for n in (3, 1, 5, 2, 4):
        await store.write(known(f"run-{n}", created_at=later(n)))
    await store.write(lot("run-4", 1, 7), ending("run-2", 1, 2), RunWrite("run-2", AT, is_settled=True))
    since = await reads.unsettled_since(later(3))
    assert ids(since) == ["run-3", "run-4", "run-5"]
    assert [(run.state, run.cursor, run.chunk_count) for run in since][:2] == [("pending", 0, 0), ("following", 7, 7)]
    assert ids(await reads.unsettled_before(later(5), 2)) == ["run-4", "run-3"]
    assert ids(await reads.unsettled_before(later(3), 9)) == ["run-1"]
    assert ids(await reads.unsettled_among(["run-5", "run-2", "run-1", "run-9"])) == ["run-1", "run-5"]
    assert await reads.unsettled_among([]) == []


async def test_a_run_comes_back_as_it_was_listed(store: Store) -> None:
    """I3: The record of a run is what the server said; a run that is not stored is None."""
    record = RunRecord("run-1", AT, "running", "conv-1", "agent-1", False, None, None, "x")  # noqa: FBT003
    await store.write(SweepWrite(later(1), [record]))
    reads = Reads(store.engine, is_patient=False)
    assert await reads.run("run-1") == StoredRun(record, "pending", 0, 0, later(1))
    assert await reads.run("run-2") is None


async def test_open_gaps(store: Store) -> None:
    """I2: Gaps that are not resolved come back as they were found, open ends too."""
    gaps = [Gap(2, 3, "not served"), Gap(5, 5, "rejected"), Gap(8, None, "expired")]
    found = accepted([row(1), row(4), *rows(6, 7)], gaps=gaps, count=4)
    await store.write(known("run-1", "run-2"), RunWrite("run-1", AT, "following", found))
    await store.write(RunWrite("run-1", AT, None, accepted(rows(2, 3), cursor=7, count=6, late=True)))
    reads = Reads(store.engine, is_patient=False)
    assert await reads.open_gaps("run-1") == gaps[1:]
    assert await reads.open_gaps("run-2") == []


async def test_figures(store: Store) -> None:
    """I5: Totals count what is stored, the gaps that are open and the rejects; states and last times are per run."""
    reads = Reads(store.engine, is_patient=False)
    assert (await reads.totals(), await reads.runs_by_state()) == ({"chunks": 0, "open_gaps": 0, "rejects": 0}, {})
    found = accepted([row(1), row(3)], gaps=[Gap(2, 2, "x")], rejects=[Reject(3, b"?", "x")], count=2)
    await store.write(known("run-1", "run-2", "run-3"), RunWrite("run-1", later(5), "following", found))
    await store.write(lot("run-2", 1, 4, at=later(1)), lot("run-2", 5, 9, at=later(7)))
    assert await reads.totals() == {"chunks": 11, "open_gaps": 1, "rejects": 1}
    assert await reads.runs_by_state() == {"pending": 1, "following": 2}
    assert await reads.last_received(["run-1", "run-2", "run-3"]) == {"run-1": later(5), "run-2": later(7)}
    assert await reads.last_received([]) == {}


async def test_reading_and_writing_do_not_wait_for_each_other(store: Store) -> None:
    """I3: A reader in the middle of a long look never blocks a commit, nor a commit a reader."""
    await store.write(known("run-1"), lot("run-1", 1, 3))
    reads = Reads(store.engine, is_patient=False)
    async with asyncio.timeout(15), store.engine.execution_options(reads_only=True).connect() as reader:
        await reader.execute(sa.text("SELECT * FROM chunks"))
        await store.write(lot("run-1", 4, 6))
        async with store.engine.begin() as writer:
            await writer.run_sync(store.dialect.lock_runs, ["run-1"])
            await writer.run_sync(store.dialect.move_cursors, [(9, 9, "complete", None, AT, "run-1")])
            run = await reads.run("run-1")
            assert run is not None
            assert (run.cursor, run.state) == (6, "following")


async def test_an_outage_is_told_or_waited_out(own_postgres: PostgresServer) -> None:
    """I7: A command that finds the database away says so; the service waits until it is there again."""
    async with Store(own_postgres.create_database()) as store:
        await store.write(known("run-1"))
        own_postgres.stop()
        with pytest.raises(RefusedError, match="cannot be read"):
            await Reads(store.engine, is_patient=False).run("run-1")
        waiting = asyncio.create_task(Reads(store.engine, is_patient=True).run("run-1"))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        own_postgres.start()
        assert (await waiting) is not None


async def test_a_missing_table_is_told(store: Store) -> None:
    """I7: Even a patient reader does not wait for a table to appear."""
    async with store.engine.begin() as connection:
        await connection.execute(sa.text("DROP TABLE discovery"))
    with pytest.raises(RefusedError, match=r"cannot be read.*discovery"):
        await Reads(store.engine, is_patient=True).discovery_state()
