"""A whole worker on a database that will be in trouble, while agents talk; for tests/faults/test_database*.py.

The worker is tests/support/rig.py's. What is stored is read by sqlite3 and asyncpg alone, past every fault.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
import tenacity

from tests.support.looks import looking
from tests.support.rig import until, working
from worker.demo.proof import compare
from worker.monitor import Health
from worker.service import Service
from worker.storage import committer, engine, reads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

    from tests.faults.database_faults import Fault
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun

MOST_WAITING = 200_000
"""What committer.MAX_WAITING_BYTES is in these tests, so that little has to be said until reading stops."""
LOUD_BYTES, LOUD_LEAD = 250_000, 1_000_000
"""What the loud run says at a time, and how much more than the server can get rid of."""
MOST_SENT = 40_000_000
"""More than fits into the queue and the sockets on the way to it."""
TURN_SECONDS, RUN_TURNS = 0.025, 25
"""So often somebody says something, and after so many times a run is over."""
SWEEP_SECONDS = 0.1
HEALED_COMMITS = 5
"""So many commits in a row say that a database is well again."""


def hurry_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a database in trouble again soon, and let little wait for it."""

    def soon(*arguments: Any, **settings: Any) -> tenacity.AsyncRetrying:
        return engine.outage_retries(*arguments, **settings).copy(wait=tenacity.wait_fixed(0.1))

    for module in (committer, reads):
        monkeypatch.setattr(module, "outage_retries", soon)
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(committer, "MAX_WAITING_BYTES", MOST_WAITING)


@dataclass
class Trial:
    """A worker at work, and a run that is about to be loud."""

    letta: FakeLetta
    rig: Rig
    health: Health
    loud: FakeRun

    @property
    def commits(self) -> float:
        """Transactions so far."""
        return self.rig.metrics.registry.get_sample_value("letta_ingest_commits_total") or 0.0

    async def until_commits(self, count: int = HEALED_COMMITS) -> None:
        """Wait until so many more transactions have gone through."""
        enough = self.commits + count
        await until(lambda: self.commits >= enough, 20)

    async def until_unready(self) -> None:
        """Wait until the worker says that its database takes no commits, and is not stuck for it."""
        await until(lambda: self.rig.committer.is_failing, 20)
        assert "database" in await self.health.troubles()
        assert self.health.stuck() == []

    async def until_reading_stops(self) -> None:
        """Let the loud run speak until the server gets rid of nothing more; what waits here is bounded meanwhile."""
        queue, said, sent, before = self.rig.committer, 0, 0, -1
        async with asyncio.timeout(60):
            while sent != before or queue._waiting_bytes < MOST_WAITING:
                while said < sent + LOUD_LEAD:
                    self.loud.say("x" * LOUD_BYTES)
                    said += LOUD_BYTES
                await asyncio.sleep(0.05)
                before, sent = sent, self.loud_bytes_sent()
                assert queue._waiting_bytes < MOST_WAITING + 2 * LOUD_BYTES
                assert sent < MOST_SENT, "the worker reads what it cannot store"

    def loud_bytes_sent(self) -> int:
        """What the server got rid of."""
        return sum(request.bytes_sent for request in self.rig.asked("stream", self.loud))

    async def until_ready(self) -> None:
        """Wait until commits go through again, without anybody's help."""
        await until(lambda: not self.rig.committer.is_failing, 30)
        await self.until_commits()
        assert "database" not in await self.health.troubles()


async def talk(letta: FakeLetta, is_over: asyncio.Event) -> None:
    """Three conversations that go on; every now and then a run of one of them ends and the next one begins."""
    live = deque(letta.new_run(letta.new_conversation()) for _ in range(3))
    for turn in itertools.count(1):
        for run in live:
            run.say("and so on ")
        if is_over.is_set():
            break
        if turn % RUN_TURNS == 0:
            live[0].complete()
            live.append(letta.new_run(live.popleft().conversation_id))
        await asyncio.sleep(TURN_SECONDS)
    for run in live:
        run.complete()


@asynccontextmanager
async def without_leftovers() -> AsyncIterator[None]:
    """Take no notice of futures that asyncpg forgets when the server ends a connection just before a COPY."""
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), asyncpg.ConnectionDoesNotExistError):
            return
        if before is None:
            loop.default_exception_handler(context)
        else:
            before(loop, context)

    loop.set_exception_handler(handle)
    try:
        yield
        gc.collect()  # it is now or never that they are missed
    finally:
        loop.set_exception_handler(before)


@asynccontextmanager
async def trial(letta: FakeLetta, worker_url: str, url: str, *, max_streams: int = 8) -> AsyncIterator[Trial]:
    """Let agents talk and a worker store it; after the block everybody ends, and all that was said must be stored."""
    async with without_leftovers(), working(letta, worker_url, commits=False, max_streams=max_streams) as rig:
        health = Health(rig.committer, rig.reads, SWEEP_SECONDS)
        service = Service(await rig.discovery(), rig.equipment, health, interval=SWEEP_SECONDS, max_streams=max_streams)
        serving, is_over = asyncio.create_task(service.run()), asyncio.Event()
        talking = asyncio.create_task(talk(letta, is_over))
        loud = letta.new_run(letta.new_conversation())
        try:
            await rig.until_stored(loud, loud.say("a whisper "))
            yield Trial(letta, rig, health, loud)
            loud.fail("it was loud")
            is_over.set()
            await talking
            await until_settled(letta, url)
        finally:
            talking.cancel()
            service.stop()
            async with asyncio.timeout(15):
                await asyncio.wait([serving, talking])
        serving.result()
    await assert_exact(letta, url)


async def bear(letta: FakeLetta, fault: Fault) -> None:
    """Bring a worker's database into trouble and out of it."""
    async with trial(letta, fault.worker_url, fault.url) as it:
        await it.until_commits()
        await fault.begin(it.rig)
        await it.until_unready()
        await it.until_reading_stops()
        assert fault.count() >= 1
        await fault.end()
        await it.until_ready()


async def until_settled(letta: FakeLetta, url: str) -> None:
    """Wait until there is nothing more to do for any run."""
    async with asyncio.timeout(30), looking(url) as look:
        while len(await look.settled()) < len(letta.runs):  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.03)


async def assert_exact(letta: FakeLetta, url: str) -> None:
    """Every chunk is stored once, under its number; every run is complete, without a gap or a reject."""
    async with looking(url) as look:
        tally = compare(letta.runs, await look.chunks())
        stored = await look.runs()
        leftovers = [await look.count(table) for table in ("gaps", "rejects")]
    assert tally.is_exact, tally
    assert tally.chunks > 0
    assert {run_id: (run.state, run.cursor, run.rows) for run_id, run in stored.items()} == {
        run_id: ("complete", len(rows), len(rows)) for run_id, rows in expected(letta).items()
    }
    assert leftovers == [0, 0]


def expected(letta: FakeLetta) -> dict[str, list[tuple[int, str]]]:
    """The server's own logs."""
    return {run.id: run.expected_rows() for run in letta.runs.values()}
