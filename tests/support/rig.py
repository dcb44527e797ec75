"""A whole worker in the test's own process, on FakeLetta: real client, real follower, real SQL; nothing is replaced.

Only the waits are shorter. Before every commit the rig looks at what is about to become durable, on the committing
connection itself, and remembers every invariant that would be broken; `working` fails the test if there was one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from worker import app, patience
from worker.config import Config
from worker.discovery import Discovery, Watch
from worker.follower import Equipment, Follower
from worker.metrics import Metrics
from worker.monitor import Health
from worker.patience import Patience
from worker.places import Places
from worker.service import Service
from worker.storage import schema
from worker.storage.committer import Committer
from worker.storage.reads import Reads, StoredRun
from worker.storage.transactions import Transactions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    import pytest
    from sqlalchemy.ext.asyncio import AsyncEngine

    from worker.demo.fake_faults import Request
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun
    from worker.letta.client import LettaClient
    from worker.logs import LogEvent

SECRET = "sk-never-to-be-seen"
# Long enough that a busy machine's hiccup is not taken for a silent server.
QUICK = Patience(turn=0.05, silence=0.08, most_silence=0.3, ended=0.4, cancelled=0.6, record=0.2, streamless=600.0)
EVERYTHING = Watch(is_all=True)
EMPTY_FILE: list[bytes] = []
UNHURRIED = patience._WaitForServer


class Lines:
    """A log that keeps its lines."""

    def __init__(self, lines: list[tuple[str, dict[str, Any]]] | None = None, **bound: Any) -> None:
        self.lines = [] if lines is None else lines
        self._bound = bound

    def debug(self, event: LogEvent, **fields: Any) -> None:
        """Keep a line; the levels do not matter here."""
        self.lines.append((event, {**self._bound, **fields}))

    info = warning = error = debug

    def bind(self, **fields: Any) -> Self:
        """A log whose lines carry these fields."""
        return type(self)(self.lines, **self._bound, **fields)

    def of(self, event: LogEvent) -> list[dict[str, Any]]:
        """The fields of every line of this event."""
        return [fields for name, fields in self.lines if name == event]


def hurry(monkeypatch: pytest.MonkeyPatch, times: float = 20.0) -> None:
    """Divide the waits between attempts; what the server asks for is waited as ever."""

    class Hurried(UNHURRIED):  # type: ignore[misc,valid-type]
        def __init__(self, most_seconds: float) -> None:
            super().__init__(most_seconds)
            growing = self._growing
            self._growing = lambda state: growing(state) / times  # type: ignore[assignment]

    monkeypatch.setattr(patience, "_WaitForServer", Hurried)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for what the other side does in its own time, but not for ever."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - there is no event for everything a test may wait for
            await asyncio.sleep(0.002)


@dataclass
class Rig:
    """One life of a worker. A second `working` on the same database is the worker started again."""

    letta: FakeLetta
    client: LettaClient
    engine: AsyncEngine
    transactions: Transactions
    committer: Committer
    reads: Reads
    metrics: Metrics
    log: Lines
    patience: Patience
    violations: list[str] = field(default_factory=list)
    commit_count: int = 0

    @property
    def equipment(self) -> Equipment:
        """What all followers share."""
        return Equipment(self.client, self.committer, self.reads, self.patience, self.metrics, self.log)

    async def discovery(self, watch: Watch = EVERYTHING, start: Any = "earliest") -> Discovery:
        """A discovery that has taken up the stored position."""
        made = Discovery(self.client, self.committer, self.reads, self.log)
        await made.load(watch, start)
        return made

    async def sweep(self, watch: Watch = EVERYTHING, start: Any = "earliest") -> list[str]:
        """Start discovery, sweep once; return the ids of the runs that were reported, in their order."""
        return await swept(await self.discovery(watch, start))

    async def stored(self, run: FakeRun) -> StoredRun:
        """The run as the store knows it; discovered first if need be."""
        found = await self.reads.run(run.id)
        if found is None:
            await self.sweep()
            found = await self.reads.run(run.id)
        assert found is not None, f"{run} was not discovered"
        return found

    async def follow(self, run: FakeRun, places: Places | None = None, seconds: float = 20.0) -> None:
        """Follow one run until there is nothing more to do for it."""
        follower = Follower(await self.stored(run), self.equipment, places or Places(100))
        async with asyncio.timeout(seconds):
            await follower.follow()

    @contextlib.asynccontextmanager
    async def following(self, run: FakeRun, places: Places | None = None) -> AsyncIterator[asyncio.Task[None]]:
        """Follow the run while the body goes on with it; at the end wait until the follower is done."""
        await self.stored(run)
        task = asyncio.create_task(self.follow(run, places))
        try:
            yield task
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def until_stored(self, run: FakeRun, count: int, seconds: float = 10.0) -> None:
        """Wait until so many chunks of the run are durable."""
        async with asyncio.timeout(seconds):
            while len(await self.rows(run)) < count:  # noqa: ASYNC110 - it happens in the database
                await asyncio.sleep(0.005)

    async def service(self, *, interval: float = 0.05, max_streams: int = 16, watch: Watch = EVERYTHING) -> Service:
        """The whole service. The rig's own committer task must not run beside it: enter `working(commits=False)`."""
        discovery, health = await self.discovery(watch), Health(self.committer, self.reads, interval)
        return Service(discovery, self.equipment, health, interval=interval, max_streams=max_streams)

    # ---- what is stored, read without the worker's own queries ----

    async def query(self, sql: str, **values: Any) -> list[Any]:
        """Rows of a query."""
        async with self.engine.execution_options(reads_only=True).connect() as connection:
            return [tuple(row) for row in await connection.execute(sa.text(sql), values)]

    async def rows(self, run: FakeRun) -> list[tuple[int, str]]:
        """(seq_id, payload) of every stored chunk."""
        return await self.query("SELECT seq_id, payload FROM chunks WHERE run_id = :run ORDER BY seq_id", run=run.id)

    async def gaps(self, run: FakeRun) -> list[tuple[int, int | None, str, str | None]]:
        """(first, last, cause, resolution) of every gap."""
        columns = "first_seq_id, last_seq_id, cause, resolution"
        return await self.query(f"SELECT {columns} FROM gaps WHERE run_id = :run ORDER BY first_seq_id", run=run.id)

    async def row(self, run: FakeRun) -> dict[str, Any]:
        """The run's row."""
        columns = "state, status, stop_reason, last_seq_id, chunk_count, error, settled_at"
        found = await self.query(f"SELECT {columns} FROM runs WHERE run_id = :run", run=run.id)
        return dict(zip(columns.split(", "), found[0], strict=True)) if found else {}

    async def messages(self, run: FakeRun) -> list[str]:
        """The types of the run's stored messages, in their order."""
        found = await self.query("SELECT message_type FROM messages WHERE run_id = :run ORDER BY position", run=run.id)
        return [kind for (kind,) in found]

    async def assert_complete(self, run: FakeRun) -> None:
        """The run is complete: the rows are the server's log, and its row in `runs` says so."""
        await self.assert_stored(run, "complete")

    async def assert_stored(
        self,
        run: FakeRun,
        state: str,
        *gaps: tuple[int, int | None, str, str | None],
        rows: list[tuple[int, str]] | None = None,
    ) -> None:
        """What is stored is what the server can serve (or these rows), numbered as it does, with exactly these gaps."""
        expected = run.expected_rows() if rows is None else rows
        assert await self.rows(run) == expected
        assert await self.gaps(run) == list(gaps)
        row = await self.row(run)
        cursor = expected[-1][0] if expected else 0
        stop = {"completed": "end_turn", "failed": "llm_api_error", "cancelled": "cancelled"}.get(run.status)
        assert (row["state"], row["last_seq_id"], row["chunk_count"]) == (state, cursor, len(expected))
        assert (row["status"], row["stop_reason"]) == (run.status, stop)
        assert row["settled_at"] is not None

    # ---- what was asked of the server ----

    def asked(self, kind: str, run: FakeRun | None = None) -> list[Request]:
        """The requests of this kind, for this run."""
        return [r for r in self.letta.requests if r.kind == kind and (run is None or r.run_id == run.id)]

    def cursors(self, run: FakeRun) -> list[int]:
        """The cursors its stream was asked for with."""
        return [request.body["starting_after"] for request in self.asked("stream", run)]


async def swept(discovery: Discovery) -> list[str]:
    """Sweep once; return the ids of the runs that were reported."""
    return [run.record.run_id for page in [p async for p in discovery.sweep()] for run in page]


@contextlib.asynccontextmanager
async def working(
    letta: FakeLetta,
    database_url: str,
    *,
    commits: bool = True,
    waits: Patience = QUICK,
    api_key: str | None = SECRET,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """A worker on this server and this database; what is not committed when it is left is lost, as by a kill."""
    config = Config.model_validate(
        {
            "letta": {"base_url": letta.url, "api_key": api_key, **settings},
            "watch": {"all": True},
            "storage": {"url": database_url},
        }
    )
    log, metrics = Lines(), Metrics()
    transactions = Transactions(database_url)
    async with app.open_database(config) as engine, transactions, app.open_letta(config, metrics) as client:
        await give_schema(engine)
        committer = Committer(transactions, log, metrics)
        reads = Reads(engine, is_patient=True)
        rig = Rig(letta, client, engine, transactions, committer, reads, metrics, log, waits)
        with checked_commits(rig):
            committing = asyncio.create_task(committer.run()) if commits else None
            try:
                yield rig
            finally:
                if committing is not None:
                    committing.cancel()
                    await asyncio.wait([committing])
        assert rig.violations == []
        assert SECRET not in repr(log.lines)


async def give_schema(engine: AsyncEngine) -> None:
    """Bring a database to the current schema; all SQLite files of a session begin as copies of the first."""
    path = Path(engine.url.database or "")
    if engine.dialect.name == "sqlite" and EMPTY_FILE:
        copy_empty_file(path)
    await schema.upgrade(engine)
    if engine.dialect.name == "sqlite" and not EMPTY_FILE:
        await engine.dispose()  # the last connection brings everything into the one file
        keep_empty_file(path)


def copy_empty_file(path: Path) -> None:
    """Begin with the schema, unless there is a file already."""
    if not path.exists():
        path.write_bytes(EMPTY_FILE[0])


def keep_empty_file(path: Path) -> None:
    """Remember a file that has the schema and nothing else."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        is_empty = connection.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    if is_empty:
        EMPTY_FILE.append(path.read_bytes())


@contextlib.contextmanager
def checked_commits(rig: Rig) -> Iterator[None]:
    """Look at every transaction with its own eyes just before it becomes durable (I2, I3, I5)."""
    cursors: dict[str, int] = {}

    def look(connection: sa.Connection) -> None:
        if connection.get_execution_options().get("reads_only"):
            return
        rig.commit_count += 1
        rig.violations += list(broken_invariants(connection, cursors))

    engines = {rig.engine.sync_engine, rig.transactions.engine}
    for engine in engines:
        sa.event.listen(engine, "commit", look)
    try:
        yield
    finally:
        for engine in engines:
            sa.event.remove(engine, "commit", look)


COUNTED = """
    SELECT runs.run_id, state, last_seq_id, chunk_count,
           (SELECT count(*) FROM chunks c WHERE c.run_id = runs.run_id),
           (SELECT coalesce(max(seq_id), 0) FROM chunks c WHERE c.run_id = runs.run_id),
           (SELECT coalesce(sum(last_seq_id - first_seq_id + 1), 0) FROM gaps g
             WHERE g.run_id = runs.run_id AND resolved_at IS NULL),
           (SELECT count(*) FROM gaps g JOIN chunks c ON c.run_id = g.run_id
              AND c.seq_id BETWEEN g.first_seq_id AND g.last_seq_id
             WHERE g.run_id = runs.run_id AND g.resolved_at IS NULL),
           (SELECT count(*) FROM gaps g WHERE g.run_id = runs.run_id AND g.resolved_at IS NULL)
      FROM runs
"""


def broken_invariants(connection: sa.Connection, cursors: dict[str, int]) -> Iterator[str]:
    """Say which invariants the open transaction would break; `cursors` is what it moves from."""
    for run_id, state, cursor, count, stored, last, missing, filled, gaps in connection.exec_driver_sql(COUNTED):
        if stored + missing - filled != cursor or last > cursor:
            yield f"I2: {run_id} has cursor {cursor}, {stored} rows up to {last} and gaps of {missing} - {filled}"
        if cursor < cursors.get(run_id, 0):
            yield f"I3: the cursor of {run_id} goes back from {cursors[run_id]} to {cursor}"
        if count != stored:
            yield f"I3: {run_id} counts {count} chunks and has {stored}"
        if state == "complete" and gaps:
            yield f"I5: {run_id} is complete with {gaps} gaps"
        cursors[run_id] = cursor
