"""Reading the whole store run by run, each in one snapshot, for `verify`. Never disturbs a writer."""

import datetime as dt
from collections.abc import AsyncIterator, Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.records import MessageRecord
from worker.storage.reads import StoredRun, stored_run
from worker.storage.tables import chunks, gaps, messages, runs

RUNS_A_PAGE = 200


class StoredChunk(msgspec.Struct, frozen=True, gc=False):
    """One row of `chunks`, as far as it is checked."""

    seq_id: int
    payload: str
    seq_source: str


class StoredGap(msgspec.Struct, frozen=True):
    """One row of `gaps`. `last_seq_id` None: up to the run's unknown end."""

    first_seq_id: int
    last_seq_id: int | None
    cause: str
    is_open: bool


class Dossier(msgspec.Struct, frozen=True):
    """All that is stored of one run, from one snapshot."""

    run: StoredRun
    chunks: Sequence[StoredChunk]
    gaps: Sequence[StoredGap]
    messages: Sequence[MessageRecord]
    is_settled: bool


class Audit:
    """Gives a dossier of every stored run, oldest first."""

    def __init__(self, engine: AsyncEngine) -> None:
        # PostgreSQL's default isolation would show a run's row and its chunks from two different moments.
        options = {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        self._engine = engine.execution_options(reads_only=True, **options)

    async def run_count(self) -> int:
        """How many dossiers there will be."""
        async with self._engine.connect() as connection:
            return int((await connection.execute(sa.select(sa.func.count()).select_from(runs))).scalar_one())

    async def dossiers(self) -> AsyncIterator[Dossier]:
        """Every run with all its rows; one run's rows are in memory at a time."""
        after: tuple[dt.datetime, str] | None = None
        while True:
            page = await self._page(after)
            for created_at, run_id in page:
                async with self._engine.connect() as connection:
                    dossier = await _dossier(connection, run_id)
                yield dossier  # not within: a check that takes long would be silent in its transaction
                after = created_at, run_id
            if len(page) < RUNS_A_PAGE:
                return

    async def known_runs(self, run_ids: Sequence[str]) -> set[str]:
        """Those of these runs that are stored."""
        async with self._engine.connect() as connection:
            return set((await connection.execute(sa.select(runs.c.run_id).where(runs.c.run_id.in_(run_ids)))).scalars())

    async def _page(self, after: tuple[dt.datetime, str] | None) -> list[tuple[dt.datetime, str]]:
        query = (
            sa.select(runs.c.created_at, runs.c.run_id).order_by(runs.c.created_at, runs.c.run_id).limit(RUNS_A_PAGE)
        )
        if after is not None:
            is_later = sa.or_(
                runs.c.created_at > after[0], sa.and_(runs.c.created_at == after[0], runs.c.run_id > after[1])
            )
            query = query.where(is_later)
        async with self._engine.connect() as connection:
            return [(row.created_at, row.run_id) for row in await connection.execute(query)]


async def _dossier(connection: AsyncConnection, run_id: str) -> Dossier:
    run = (await connection.execute(sa.select(runs).where(runs.c.run_id == run_id))).one()
    rows = sa.select(chunks.c.seq_id, chunks.c.payload, chunks.c.seq_source).where(chunks.c.run_id == run_id)
    missing = sa.select(gaps).where(gaps.c.run_id == run_id).order_by(gaps.c.first_seq_id)
    listed = sa.select(messages).where(messages.c.run_id == run_id).order_by(messages.c.position)
    return Dossier(
        run=stored_run(run),
        chunks=[StoredChunk(*row) for row in await connection.execute(rows.order_by(chunks.c.seq_id))],
        gaps=[
            StoredGap(row.first_seq_id, row.last_seq_id, row.cause, row.resolved_at is None)
            for row in await connection.execute(missing)
        ],
        messages=[
            MessageRecord(row.message_id, row.payload, row.message_type, row.otid, row.step_id, row.date, row.text)
            for row in await connection.execute(listed)
        ],
        is_settled=run.settled_at is not None,
    )
