"""What the store knows: what is unfinished, where discovery stands, figures for `status`. Never disturbs a writer."""

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
import tenacity
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.core.records import RunRecord
from worker.core.runlog import Gap
from worker.errors import RefusedError
from worker.storage.engine import describe, is_outage, is_refusal, outage_retries
from worker.storage.tables import chunks, discovery, gaps, rejects, runs
from worker.storage.writes import POSITION_SCOPE

PAYLOADS_A_PAGE = 1000


class StoredRun(msgspec.Struct, frozen=True):
    """A run as the store knows it."""

    record: RunRecord
    state: str
    cursor: int
    chunk_count: int
    updated_at: dt.datetime
    verdict: str | None = None


class DiscoveryState(msgspec.Struct, frozen=True):
    """How far discovery has got."""

    position_at: dt.datetime | None
    scopes: dict[str, dt.datetime | None]
    """Scope -> the time from which its runs are wanted; None: from the earliest."""


class Reads:
    """Queries; each opens its own short read transaction. With `is_patient`, an outage is waited out."""

    def __init__(self, engine: AsyncEngine, *, is_patient: bool) -> None:
        self._engine = engine.execution_options(reads_only=True)
        self._stop = tenacity.stop_never if is_patient else tenacity.stop_after_attempt(1)

    async def unsettled_since(self, since: dt.datetime) -> list[StoredRun]:
        """Runs created since then that there is still something to do for, oldest first: it expires first."""
        unsettled = sa.select(runs).where(runs.c.settled_at.is_(None), runs.c.created_at >= since)
        return [stored_run(row) for row in await self.rows(unsettled.order_by(runs.c.created_at))]

    async def unsettled_before(self, before: dt.datetime, limit: int) -> list[StoredRun]:
        """At most `limit` runs created before then that there is still something to do for, newest first."""
        unsettled = sa.select(runs).where(runs.c.settled_at.is_(None), runs.c.created_at < before)
        rows = await self.rows(unsettled.order_by(runs.c.created_at.desc()).limit(limit))
        return [stored_run(row) for row in rows]

    async def unsettled_among(self, run_ids: Sequence[str]) -> list[StoredRun]:
        """Those of these runs that there is still something to do for, oldest first."""
        unsettled = sa.select(runs).where(runs.c.settled_at.is_(None), runs.c.run_id.in_(run_ids))
        return [stored_run(row) for row in await self.rows(unsettled.order_by(runs.c.created_at))]

    async def run(self, run_id: str) -> StoredRun | None:
        """One run, or None."""
        rows = await self.rows(sa.select(runs).where(runs.c.run_id == run_id))
        return stored_run(rows[0]) if rows else None

    async def payloads(self, run_id: str) -> AsyncIterator[Sequence[tuple[int, str]]]:
        """The (seq_id, payload) of all stored chunks of a run in the order of their numbers, a page at a time."""
        after = 0
        while True:
            query = sa.select(chunks.c.seq_id, chunks.c.payload).where(chunks.c.run_id == run_id)
            page = query.where(chunks.c.seq_id > after).order_by(chunks.c.seq_id).limit(PAYLOADS_A_PAGE)
            rows = await self.rows(page)
            yield rows
            if len(rows) < PAYLOADS_A_PAGE:
                return
            after = rows[-1].seq_id

    async def open_gaps(self, run_id: str) -> list[Gap]:
        """The gaps of a run that are not resolved."""
        query = sa.select(gaps).where(gaps.c.run_id == run_id, gaps.c.resolved_at.is_(None))
        return [Gap(row.first_seq_id, row.last_seq_id, row.cause) for row in await self.rows(query)]

    async def discovery_state(self) -> DiscoveryState:
        """How far discovery has got."""
        rows = await self.rows(sa.select(discovery))
        return DiscoveryState(
            position_at=next((row.position_at for row in rows if row.scope == POSITION_SCOPE), None),
            scopes={row.scope: row.start_at for row in rows if row.scope != POSITION_SCOPE},
        )

    async def runs_by_state(self) -> dict[str, int]:
        """State -> number of runs."""
        rows = await self.rows(sa.select(runs.c.state, sa.func.count()).group_by(runs.c.state))
        return dict(tuple(row) for row in rows)

    async def totals(self) -> dict[str, int]:
        """Chunks stored up to their runs' cursors, open gaps and rejects."""
        stored = await self.rows(sa.select(sa.func.coalesce(sa.func.sum(runs.c.chunk_count), 0)))
        open_gaps = await self.rows(sa.select(sa.func.count()).select_from(gaps).where(gaps.c.resolved_at.is_(None)))
        rejected = await self.rows(sa.select(sa.func.count()).select_from(rejects))
        return {"chunks": int(stored[0][0]), "open_gaps": open_gaps[0][0], "rejects": rejected[0][0]}

    async def last_received(self, run_ids: Sequence[str]) -> dict[str, dt.datetime]:
        """Run -> when its newest chunk was received, for runs that have one."""
        last = sa.and_(chunks.c.run_id == runs.c.run_id, chunks.c.seq_id == runs.c.last_seq_id)
        query = sa.select(runs.c.run_id, chunks.c.received_at).join(chunks, last).where(runs.c.run_id.in_(run_ids))
        return {row.run_id: row.received_at for row in await self.rows(query)}

    async def trouble(self, seconds: float) -> str | None:
        """Why the database does not answer now, or None. Asks once and waits no longer than this."""
        try:
            async with asyncio.timeout(seconds), self._engine.connect() as connection:
                await connection.execute(sa.select(1))
        except TimeoutError:
            return f"does not answer within {seconds:g} s"
        except Exception as error:
            if is_refusal(error) or is_outage(error):
                return describe(error)
            raise
        return None

    async def rows(self, query: sa.Select[*tuple[Any, ...]]) -> Sequence[Any]:
        """The rows of a query. Raises RefusedError; what else it does about an outage is the reader's patience."""
        rows: Sequence[Any] = ()
        try:
            async for attempt in outage_retries(stop=self._stop):
                with attempt:
                    async with self._engine.connect() as connection:
                        rows = (await connection.execute(query)).all()
        except RefusedError:
            raise
        except Exception as error:
            if is_refusal(error) or is_outage(error):
                raise RefusedError(f"the database cannot be read: {describe(error)}") from error
            raise
        return rows


def stored_run(row: Any) -> StoredRun:
    """A row of `runs` as a value."""
    record = RunRecord(**{name: getattr(row, name) for name in RunRecord.__struct_fields__})
    return StoredRun(record, row.state, row.last_seq_id, row.chunk_count, row.updated_at, row.verdict)
