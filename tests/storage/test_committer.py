"""The group committer: few transactions, in order, bounded, and no write that cannot be written holds up another."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
import sqlalchemy as sa

from tests.storage.store import AT, RecordingLog, Store, accepted, ending, known, later, lot, row
from worker.core.records import RunRecord
from worker.core.runlog import Reject
from worker.errors import InvariantError, RefusedError
from worker.metrics import Metrics
from worker.storage import committer as module
from worker.storage.committer import Commit, Committer
from worker.storage.writes import RunWrite, SweepWrite

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.storage.conftest import Database
    from worker.storage.writes import Write


class Running(msgspec.Struct):
    """A committer at work, with its figures and its task."""

    committer: Committer
    metrics: Metrics
    log: RecordingLog
    task: asyncio.Task[None]

    @property
    def commits(self) -> float:
        """Transactions so far."""
        return self.metrics.registry.get_sample_value("letta_ingest_commits_total") or 0.0


@contextlib.asynccontextmanager
async def committing(store: Store) -> AsyncIterator[Running]:
    """A committer that runs until the end of the block."""
    metrics, log = Metrics(), RecordingLog()
    committer = Committer(store.transactions, log, metrics)
    task = asyncio.create_task(committer.run())
    try:
        yield Running(committer, metrics, log, task)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition: object, seconds: float = 20.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never came so far"
        await asyncio.sleep(0.005)


def unwritable(run_id: str, seq_id: int) -> RunWrite:
    """A write both databases refuse for its value."""
    return RunWrite(run_id, AT, "following", accepted([row(seq_id, '{"\ud800"}')]))


# One transaction for many


async def test_many_submitters_share_few_transactions(store: Store) -> None:
    """I3: A hundred runs that submit at once need a few transactions, and every row is there."""
    runs = [f"run-{n:03}" for n in range(100)]
    async with committing(store) as at_work:
        await at_work.committer.commit(known(*runs))

        async def follow(run_id: str) -> None:
            last: Commit | None = None
            for n in range(1, 11):
                last = await at_work.committer.submit(lot(run_id, n, n), after=last)
                await asyncio.sleep(0)
            assert last is not None
            await last

        before = at_work.commits
        await asyncio.gather(*(follow(run_id) for run_id in runs))
        assert at_work.commits - before < 100
        assert at_work.metrics.registry.get_sample_value("letta_ingest_chunks_stored_total") == 1000
    assert {(await store.cursor(run_id), len(await store.chunks(run_id))) for run_id in runs} == {(10, 10)}


async def test_a_commit_means_durable(store: Store) -> None:
    """I3: Whoever awaited a commit finds it in the database over another connection."""
    async with committing(store) as at_work:
        await at_work.committer.commit(known("run-1"))
        for n in range(1, 6):
            await at_work.committer.commit(lot("run-1", n, n))
            assert await store.cursor("run-1") == n


async def test_a_submitters_order_is_kept(store: Store) -> None:
    """I2: At no commit is a run's cursor ahead of its rows, and no write overtakes an earlier one of its submitter."""
    done: list[int] = []
    async with committing(store) as at_work:
        await at_work.committer.commit(known("run-1", "run-2"))
        for n in range(1, 200):
            commit = await at_work.committer.submit(lot(f"run-{n % 2 + 1}", (n + 1) // 2, (n + 1) // 2))
            commit.durable.add_done_callback(lambda _, n=n: done.append(n))
            if n % 7 == 0:
                await asyncio.sleep(0)
        await at_work.committer.drain()
        await asyncio.sleep(0)
    assert done == sorted(done)
    assert len(done) == 199


async def test_a_large_heap_is_cut_into_transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: One transaction holds a bounded number of bytes, and at least one write however large."""
    monkeypatch.setattr(module, "MAX_TRANSACTION_BYTES", 10_000)
    async with committing(store) as at_work:
        await at_work.committer.commit(known("run-1"))
        before = at_work.commits
        for n in range(1, 11):
            large = RunWrite("run-1", AT, "following", accepted([row(n, '"' + "x" * 4_000 + '"')]))
            await at_work.committer.submit(large)
        giant = RunWrite("run-1", AT, "following", accepted([row(11, '"' + "x" * 50_000 + '"')]))
        await at_work.committer.commit(giant)
        assert at_work.commits - before >= 6
    assert len(await store.chunks("run-1")) == 11


async def test_giving_up_waiting_does_not_take_a_write_back(store: Store) -> None:
    """I2: A task that is cancelled while it waits leaves its write in the queue: the next one builds upon it."""
    async with committing(store) as at_work:
        await at_work.committer.commit(known("run-1"))
        commit = await at_work.committer.submit(lot("run-1", 1, 3))

        async def wait() -> None:
            await commit

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await (await at_work.committer.submit(lot("run-1", 4, 5), after=commit))
        await commit
    assert sorted(await store.chunks("run-1")) == [1, 2, 3, 4, 5]


# What the database cannot take


async def test_an_unwritable_write_holds_up_nobody(store: Store) -> None:
    """I2, I6: One write the database cannot take fails with all its run has queued behind it; the others are stored."""
    names = [f"run-{n}" for n in range(8)]
    async with committing(store) as at_work:
        await at_work.committer.commit(known(*names))
        commits: dict[str, list[Commit]] = {name: [] for name in names}
        for n in (1, 2, 3):
            for name in names:
                write = unwritable(name, n) if (name, n) == ("run-3", 2) else lot(name, n, n)
                commits[name].append(await at_work.committer.submit(write))
        await asyncio.wait([commit.durable for each in commits.values() for commit in each])
        failed = [name for name in names for commit in commits[name] if commit.durable.exception() is not None]
        assert failed == ["run-3", "run-3"]
        with pytest.raises(InvariantError, match="does not take this write") as raised:
            await commits["run-3"][1]
        assert "ud800" in str(raised.value) or "Unicode" in str(raised.value)
        with pytest.raises(InvariantError):
            await at_work.committer.submit(lot("run-3", 4, 4), after=commits["run-3"][-1])
        await at_work.committer.commit(lot("run-5", 4, 4))
    assert {name: await store.cursor(name) for name in names} == dict.fromkeys(names, 3) | {"run-3": 1, "run-5": 4}
    assert sorted(await store.chunks("run-3")) == [1]
    assert at_work.log.names == []


async def test_finding_an_unwritable_write_is_cheap(store: Store) -> None:
    """I8: Among a thousand writes of one transaction the bad one is found in a few transactions, not a thousand."""
    names = [f"run-{n:04}" for n in range(1000)]
    async with committing(store) as at_work:
        await at_work.committer.commit(known(*names))
        before = at_work.commits
        for name in names:
            await at_work.committer.submit(unwritable(name, 1) if name == "run-0777" else lot(name, 1, 1))
        await at_work.committer.drain()
        assert at_work.commits - before < 40
    whole = await store.all(sa.text("SELECT run_id FROM runs WHERE last_seq_id = 0"))  # type: ignore[arg-type]
    assert [r.run_id for r in whole] == ["run-0777"]


async def test_an_unwritable_sweep_fails_and_runs_go_on(store: Store) -> None:
    """I6: A listing the database cannot take is told to discovery; followers do not notice."""
    async with committing(store) as at_work:
        await at_work.committer.commit(known("run-1"))
        naive = RunRecord("run-2", dt.datetime(2026, 1, 1))  # noqa: DTZ001
        bad = await at_work.committer.submit(SweepWrite(AT, [naive]))
        good = await at_work.committer.submit(lot("run-1", 1, 1))
        await good
        with pytest.raises(InvariantError):
            await bad


# What the database refuses


async def test_a_refusal_ends_the_committer_and_is_told_to_all(store: Store) -> None:
    """I7: When the database refuses for good, the committer stops with a sentence and every submitter hears of it."""
    async with committing(store) as at_work:
        await at_work.committer.commit(known("run-1"))
        async with store.engine.begin() as connection:
            await connection.execute(sa.text("ALTER TABLE chunks RENAME TO elsewhere"))
        first = await at_work.committer.submit(lot("run-1", 1, 1))
        second = await at_work.committer.submit(lot("run-1", 2, 2))
        with pytest.raises(RefusedError, match=r"refuses to store.*chunks"):
            await at_work.task
        for commit in (first, second):
            with pytest.raises(RefusedError):
                await commit
        with pytest.raises(RefusedError):
            await at_work.committer.submit(lot("run-1", 3, 3))
    assert await store.cursor("run-1") == 0


# A database that is away


async def test_an_outage_is_waited_out(database: Database) -> None:
    """I3, I8: While the database is away submitters wait and memory is bounded; then everything is stored, in order."""
    async with Store(database.url) as store, committing(store) as at_work:
        committer = at_work.committer
        await committer.commit(known("run-1"))
        assert (committer.is_failing, committer.stalled_seconds()) == (False, 0.0)
        database.take_away()
        first = await committer.submit(lot("run-1", 1, 1))
        await until(lambda: committer.is_failing)
        assert at_work.log.events[0][0] == "database.unavailable"
        assert at_work.log.events[0][1]["error"]
        assert committer.stalled_seconds() > 0
        assert not first.durable.done()
        payload = '"' + "x" * 1_000_000 + '"'
        submitted = 0

        async def flood() -> None:
            nonlocal submitted
            for n in range(2, 102):
                await committer.submit(RunWrite("run-1", AT, "following", accepted([row(n, payload)])))
                submitted = n

        flooding = [asyncio.create_task(flood())]
        most = module.MAX_WAITING_BYTES // len(payload)
        await until(lambda: submitted >= most)
        await asyncio.sleep(0.1)
        assert submitted <= most + 4
        assert committer._waiting_bytes < module.MAX_WAITING_BYTES + 2_000_000
        database.give_back()
        await asyncio.wait(flooding)
        await committer.drain()
        assert (committer.is_failing, committer.stalled_seconds()) == (False, 0.0)
        assert at_work.log.names == ["database.unavailable", "database.recovered"]
        assert committer._waiting_bytes == 0
        assert await store.cursor("run-1") == 101
        count = await store.all(sa.text("SELECT count(*), max(length(payload)) FROM chunks"))  # type: ignore[arg-type]
        assert tuple(count[0]) == (101, len(payload))


async def test_many_waiting_submitters_do_not_flood_the_queue(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: However many wait for room, the queue is never longer than its bound and one write."""
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 50_000)
    highest = 0
    async with committing(sqlite_store) as at_work:
        names = [f"run-{n}" for n in range(60)]
        await at_work.committer.commit(known(*names))

        async def follow(name: str) -> None:
            nonlocal highest
            for n in range(1, 4):
                await at_work.committer.submit(
                    RunWrite(name, AT, "following", accepted([row(n, '"' + "x" * 10_000 + '"')]))
                )
                highest = max(highest, at_work.committer._waiting_bytes)

        await asyncio.gather(*(follow(name) for name in names))
        await at_work.committer.drain()
    assert 50_000 <= highest <= 62_000
    assert {await sqlite_store.cursor(name) for name in names} == {3}


def test_everything_a_write_keeps_counts_into_its_size() -> None:
    """I8: Rejected bytes are in the bound as rows and messages are."""
    rejected = accepted(rejects=[Reject(1, b"x" * 10_000_000, "too large")])
    assert RunWrite("run-1", AT, None, rejected).size > 10_000_000
    assert lot("run-1", 1, 1000).size > 1000 * 200
    listed: Write = known(*(f"run-{n}" for n in range(1000)))
    assert listed.size > 100_000


async def test_a_stop_in_an_outage_is_quick_and_loses_nothing_stored(database: Database) -> None:
    """I3: A committer cancelled while it waits for the database ends at once; the next one goes on from the cursor."""
    async with Store(database.url) as store:
        async with committing(store) as at_work:
            await at_work.committer.commit(known("run-1"))
            await at_work.committer.commit(lot("run-1", 1, 3))
            database.take_away()
            lost = await at_work.committer.submit(lot("run-1", 4, 4))
            await until(lambda: at_work.committer.is_failing)
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 2
        with pytest.raises(RefusedError):
            await lost
        database.give_back()
        async with committing(store) as at_work:
            await at_work.committer.commit(ending("run-1", 4, 5, at=later(1)))
        assert sorted(await store.chunks("run-1")) == [1, 2, 3, 4, 5]
