"""What the tests of the storage share: writes made short, and a store that shows what it holds."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from worker.core.chunks import Chunk
from worker.core.records import RunRecord
from worker.core.runlog import Accepted, Gap, Reject, Row
from worker.storage import schema, tables
from worker.storage.engine import create_engine, is_sqlite
from worker.storage.transactions import Transactions
from worker.storage.writes import Dialect, PostgresDialect, RunWrite, SqliteDialect, SweepWrite, Write, write

if TYPE_CHECKING:
    from collections.abc import Sequence

AT = dt.datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=dt.UTC)


def later(seconds: float) -> dt.datetime:
    """A time after AT."""
    return AT + dt.timedelta(seconds=seconds)


def row(seq_id: int, payload: str | None = None, *, is_derived: bool = False, **columns: Any) -> Row:
    """A row; its payload names its number unless another is given."""
    text = f'{{"seq_id":{seq_id}}}' if payload is None else payload
    return Row(seq_id, Chunk(text, seq_id, **{"message_type": "assistant_message", **columns}), is_derived)


def rows(first: int, last: int) -> list[Row]:
    """Rows with these numbers."""
    return [row(seq_id) for seq_id in range(first, last + 1)]


def accepted(
    new: Sequence[Row] = (),
    *,
    gaps: Sequence[Gap] = (),
    rejects: Sequence[Reject] = (),
    cursor: int | None = None,
    count: int | None = None,
    late: bool = False,
    finished: bool = False,
    complete: bool = False,
) -> Accepted:
    """What a RunLog hands over; the cursor is the last row and everything below is stored unless said otherwise."""
    at = cursor if cursor is not None else max((r.seq_id for r in new), default=0)
    return Accepted(new, gaps, rejects, at, at if count is None else count, late, finished, complete)


def lot(run_id: str, first: int, last: int, state: str | None = "following", at: dt.datetime = AT) -> RunWrite:
    """Rows first..last of a run without gaps."""
    return RunWrite(run_id, at, state, accepted(rows(first, last)))


def ending(run_id: str, first: int, last: int, at: dt.datetime = AT) -> RunWrite:
    """The same with the terminal marker behind them."""
    return RunWrite(run_id, at, "complete", accepted(rows(first, last), cursor=last, finished=True, complete=True))


def known(*run_ids: str, created_at: dt.datetime = AT, status: str | None = "running") -> SweepWrite:
    """Discovery has found these runs."""
    return SweepWrite(AT, [RunRecord(run_id, created_at, status) for run_id in run_ids])


class Store:
    """A migrated database, its writer, and a look into its tables."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = create_engine(url)
        self.transactions = Transactions(url)
        self.dialect: Dialect = SqliteDialect() if is_sqlite(self.engine) else PostgresDialect()

    async def __aenter__(self) -> Self:
        await schema.upgrade(self.engine)
        await self.transactions.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.transactions.__aexit__()
        await self.engine.dispose()

    async def write(self, *writes: Write) -> None:
        """Write all of this in one transaction."""
        await self.transactions.run(lambda connection: write(connection, self.dialect, writes))

    async def all(self, query: sa.Select[Any]) -> list[Any]:
        """The rows of a query."""
        async with self.engine.connect() as connection:
            return list(await connection.execute(query))

    async def run(self, run_id: str) -> Any:
        """The run's row."""
        (found,) = await self.all(sa.select(tables.runs).where(tables.runs.c.run_id == run_id))
        return found

    async def cursor(self, run_id: str) -> int:
        """The run's cursor."""
        return int((await self.run(run_id)).last_seq_id)

    async def chunks(self, run_id: str) -> dict[int, str]:
        """Number -> payload, in the order of the numbers."""
        of_run = sa.select(tables.chunks).where(tables.chunks.c.run_id == run_id).order_by(tables.chunks.c.seq_id)
        found = await self.all(of_run)
        assert len(found) == len({r.seq_id for r in found})
        return {r.seq_id: r.payload for r in found}

    async def gaps(self, run_id: str) -> list[tuple[int, int | None, str, bool]]:
        """(first, last, cause, whether it is open) of each gap."""
        of_run = sa.select(tables.gaps).where(tables.gaps.c.run_id == run_id).order_by(tables.gaps.c.first_seq_id)
        return [(r.first_seq_id, r.last_seq_id, r.cause, r.resolved_at is None) for r in await self.all(of_run)]

    async def count(self, table: sa.Table) -> int:
        """How many rows a table has."""
        return int((await self.all(sa.select(sa.func.count()).select_from(table)))[0][0])

    async def snapshot(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that is stored."""
        order = {table: list(table.primary_key.columns) for table in tables.metadata.sorted_tables}
        return {
            table.name: [tuple(r) for r in await self.all(sa.select(table).order_by(*keys))]
            for table, keys in order.items()
        }


class RecordingLog:
    """A log that keeps its events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def _record(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    debug = info = warning = error = _record

    def bind(self, **_: Any) -> RecordingLog:
        """The same log."""
        return self

    @property
    def names(self) -> list[str]:
        """The events' names."""
        return [name for name, _ in self.events]
