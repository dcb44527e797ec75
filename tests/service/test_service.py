"""The whole service: few streams, shared fairly; nothing dies unseen; it drains, ends, and bears outages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support.rig import QUICK, SECRET, Lines, until, working
from worker import app, service
from worker.config import Config
from worker.demo.fake_faults import Answer, Hang
from worker.errors import InvariantError, RefusedError
from worker.follower import Follower
from worker.storage import committer, engine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun


@pytest.fixture
async def idle_rig(letta: FakeLetta, sqlite_url: str) -> AsyncIterator[Rig]:
    """A worker whose service brings its own committer task."""
    async with working(letta, sqlite_url, commits=False) as made:
        yield made


@contextlib.asynccontextmanager
async def serving(rig: Rig, *, max_streams: int = 16, once: bool = False) -> AsyncIterator[asyncio.Task[None]]:
    """Run the service; at the end drain it."""
    made = await rig.service(max_streams=max_streams)
    task = asyncio.create_task(made.run(once=once))
    try:
        yield task
    finally:
        made.stop()
        async with asyncio.timeout(15):
            await asyncio.wait([task])
    task.result()


def live_runs(letta: FakeLetta, count: int, *, age: timedelta = timedelta()) -> list[FakeRun]:
    """Runs that go on, each in a conversation of its own."""
    return [letta.new_run(letta.new_conversation(), created_at=datetime.now(UTC) - age) for _ in range(count)]


async def all_in_state(rig: Rig, state: str, count: int, seconds: float = 20.0) -> None:
    """Wait until so many runs are in this state."""
    async with asyncio.timeout(seconds):
        while (await rig.reads.runs_by_state()).get(state, 0) < count:  # noqa: ASYNC110 - it happens in the database
            await asyncio.sleep(0.01)


async def test_places_are_shared(idle_rig: Rig, letta: FakeLetta) -> None:
    """Of more live runs than places all make progress, and never more streams are open than allowed (I2)."""
    rig, runs = idle_rig, live_runs(letta, 12)
    async with serving(rig, max_streams=4):
        for number in range(3):
            for run in runs:
                run.say(f"tok{number} ")
            for run in runs:
                await rig.until_stored(run, 2 + number)
        for run in runs:
            run.complete()
        await all_in_state(rig, "complete", len(runs))

    for run in runs:
        assert await rig.rows(run) == run.expected_rows()
    assert letta.most_open_streams <= 4


async def test_endangered_run_goes_first(idle_rig: Rig, letta: FakeLetta) -> None:
    """A run near its expiry has its place before those that were there first, and before it is too late (I5)."""
    rig = idle_rig
    first = live_runs(letta, 8)
    old = live_runs(letta, 1, age=timedelta(hours=2, minutes=50))[0]
    old.complete()
    for run in first:
        run.complete()
    slow = Hang(on="stream", times=2)
    letta.faults.append(slow)  # the two places are taken by whoever comes first
    async with serving(rig, max_streams=3):
        await until(lambda: slow.fired == 2)
        slow.release()
        await all_in_state(rig, "complete", 9)

    asked = [request.run_id for request in rig.asked("stream")]
    assert asked.index(old.id) <= 2


async def test_past_and_present(idle_rig: Rig, letta: FakeLetta) -> None:
    """Many runs of the past go through a lane of their own, and the living are followed meanwhile."""
    rig = idle_rig
    past = live_runs(letta, 45, age=timedelta(days=2))
    for run in past:
        run.complete()
    live = live_runs(letta, 3)
    async with serving(rig, max_streams=3):
        for run in live:
            await rig.until_stored(run, run.say("now "))
        await all_in_state(rig, "backfilled", len(past))
        for run in live:
            run.complete()
        await all_in_state(rig, "complete", len(live))

    assert letta.most_open_streams <= 3


async def test_a_run_of_the_past_that_is_refused(idle_rig: Rig, letta: FakeLetta) -> None:
    """A run of the past that the server refuses for ever is backfilled in the end, and holds up no other (I5)."""
    rig = idle_rig
    past = live_runs(letta, 30, age=timedelta(hours=5))
    for run in past:
        run.complete()
    refused, broken = past[-1], past[-2]
    faults = [
        Answer(400, b'{"detail":"no"}', on="stream", run_id=refused.id, times=None),
        Answer(500, on="stream", run_id=broken.id, times=None),
    ]
    letta.faults += faults
    async with serving(rig, max_streams=3):
        await all_in_state(rig, "backfilled", len(past) - 1)
        letta.faults.remove(faults[1])
        await all_in_state(rig, "backfilled", len(past))
    assert all(fault.fired for fault in faults)


async def test_failing_follower(idle_rig: Rig, letta: FakeLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that fails by a bug stops no other, is logged, and is started again from what is stored (I2)."""
    monkeypatch.setattr(service, "FAILED_TASK_DELAY", 0.01)
    rig, runs = idle_rig, live_runs(letta, 3)
    follow, failures = Follower.follow, []

    async def fail_twice(self: Follower) -> None:
        if self._record.run_id == runs[1].id and len(failures) < 2:
            failures.append(self)
            raise ZeroDivisionError
        await follow(self)

    monkeypatch.setattr(Follower, "follow", fail_twice)
    for run in runs:
        run.say("one ")
        run.complete()
    async with serving(rig):
        await all_in_state(rig, "complete", 3)

    assert len(failures) == 2
    assert [line["task"] for line in rig.log.of("worker.task_failed")] == [f"follow:{runs[1].id}"] * 2
    for run in runs:
        assert await rig.rows(run) == run.expected_rows()


async def test_failing_discovery_task(idle_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the service's own tasks stops it loudly, with the task's name (I7)."""

    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    made = await idle_rig.service()
    monkeypatch.setattr(made, "_follow_everything", lambda *, once: fail(once))

    with pytest.raises(InvariantError, match="`discover` failed in a way nobody foresaw"):
        await made.run()


async def test_refused_key_stops_the_service(idle_rig: Rig, letta: FakeLetta) -> None:
    """A key that is refused stops the service with one sentence for the operator, while it sweeps or streams (I10)."""
    run = live_runs(letta, 1)[0]
    run.complete()
    for kind in ("stream", "runs"):
        fault = Answer(401, b'{"detail":"Unauthorized"}', on=kind)  # type: ignore[arg-type]
        letta.faults.append(fault)
        with pytest.raises(RefusedError, match="refuses the API key"):
            async with asyncio.timeout(10):
                await (await idle_rig.service()).run()
        assert fault.fired == 1


async def test_once(idle_rig: Rig, letta: FakeLetta) -> None:
    """`once` follows everything there is, the living to their end and the past too, and then ends by itself."""
    rig = idle_rig
    live = live_runs(letta, 1)[0]
    over = live_runs(letta, 3)
    for run in over:
        run.complete()
    past = live_runs(letta, 25, age=timedelta(days=1))
    for run in past:
        run.complete()
    async with serving(rig, once=True) as task:
        await all_in_state(rig, "backfilled", 25)
        await all_in_state(rig, "complete", 3)
        assert not task.done()
        live.say("last ")
        live.complete()
        async with asyncio.timeout(10):
            await task

    assert await rig.reads.runs_by_state() == {"complete": 4, "backfilled": 25}
    assert await rig.query("SELECT count(*) FROM runs WHERE settled_at IS NULL") == [(0,)]


async def test_once_without_runs(idle_rig: Rig) -> None:
    """Where there is nothing to follow, `once` ends at once."""
    async with asyncio.timeout(5):
        await (await idle_rig.service()).run(once=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_drains(letta: FakeLetta, sqlite_url: str, number: signal.Signals) -> None:
    """After SIGTERM or SIGINT reading stops, what was read is committed, and the next start goes on from there (I3)."""
    runs = live_runs(letta, 5)
    values = {
        "letta": {"base_url": letta.url, "api_key": SECRET},
        "watch": {"all": True},
        "storage": {"url": sqlite_url},
        "discovery": {"interval": 0.05},
        "service": {"listen": "127.0.0.1:0"},
    }
    log = Lines()
    before = signal.signal(number, signal.SIG_IGN)  # should the worker not handle it, the tests survive
    try:
        task = asyncio.create_task(app.run(Config.model_validate(values), log, once=False, patience=QUICK))
        await until(lambda: len({request.run_id for request in letta.requests if request.kind == "stream"}) == 5)
        for run in runs:
            run.say("as the signal comes ")
        os.kill(os.getpid(), number)
        async with asyncio.timeout(5):
            await task
    finally:
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, before)
    assert [name for name, _ in log.lines if name.startswith("worker.")] == [
        "worker.started",
        "worker.stopping",
        "worker.stopped",
    ]
    assert SECRET not in repr(log.lines)
    await until(lambda: letta.open_streams == 0)

    for run in runs:
        run.complete()
    async with working(letta, sqlite_url, commits=False) as rig:
        await (await rig.service()).run(once=True)
        for run in runs:
            await rig.assert_complete(run)


class Outage:
    """Takes a database away from its users, and gives it back."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock: sqlite3.Connection | None = None

    async def begin(self) -> None:
        """SQLite: somebody holds the lock. PostgreSQL: nobody may connect, and those who are, are thrown out."""
        if self._url.startswith("sqlite"):
            self._lock = sqlite3.connect(self._url.removeprefix("sqlite:///"), isolation_level=None)
            self._lock.execute("BEGIN EXCLUSIVE")
        else:
            await self._administer(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS false")
            await self._administer(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._name}'"
            )

    async def end(self) -> None:
        """It is back."""
        if self._lock is not None:
            self._lock.execute("ROLLBACK")
            self._lock.close()
        else:
            await self._administer(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS true")

    @property
    def _name(self) -> str:
        return self._url.rpartition("/")[2]

    async def _administer(self, statement: str) -> None:
        server = self._url.rpartition("/")[0].replace("postgresql://", "postgresql+asyncpg://")
        other = create_async_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
        async with other.connect() as connection:
            await connection.execute(sa.text(statement))
        await other.dispose()


async def test_outage_of_the_database(letta: FakeLetta, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database is away reading stops, bounded; when it is back, nothing is missing (I3, I8)."""
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(committer, "MAX_WAITING_BYTES", 200_000)
    run = live_runs(letta, 1)[0]
    outage = Outage(database_url)
    async with working(letta, database_url, commits=False) as rig, serving(rig):
        await rig.until_stored(run, run.say("before "))
        await outage.begin()
        for _ in range(25):
            run.say("x" * 1_000_000)
        (stream,) = rig.asked("stream")
        await until(lambda: rig.log.of("database.unavailable"))
        await until(lambda: not rig.committer._has_room.is_set())
        sent = -1
        while sent != stream.bytes_sent:  # until the sockets in between are full
            sent = stream.bytes_sent
            await asyncio.sleep(0.2)
        assert sent < 20_000_000
        assert rig.committer._waiting_bytes < 5_000_000
        await outage.end()
        run.complete()
        await all_in_state(rig, "complete", 1)
        assert len(rig.log.of("database.recovered")) == 1
        await until_settled(rig)
        await rig.assert_complete(run)


async def until_settled(rig: Rig) -> None:
    """Wait until there is nothing more to do for any run."""
    async with asyncio.timeout(20):
        while await rig.query("SELECT run_id FROM runs WHERE settled_at IS NULL"):  # noqa: ASYNC110 - it happens in the database
            await asyncio.sleep(0.01)


async def test_outage_of_the_server(idle_rig: Rig, letta: FakeLetta) -> None:
    """A server that cannot be listed is said once per attempt, and found again; nothing else stops."""
    rig, runs = idle_rig, live_runs(letta, 2)
    async with serving(rig):
        for run in runs:
            await rig.until_stored(run, run.say("before "))
        await letta.stop_listening()
        await letta.drop_connections()
        await until(lambda: len(rig.log.of("discovery.failed")) >= 3)
        late = live_runs(letta, 1)[0]
        await letta.start_listening()
        for run in (*runs, late):
            run.complete()
        await all_in_state(rig, "complete", 3)

    assert len(rig.log.of("discovery.recovered")) == 1
