"""What a test reads from the worker's database, by sqlite3 and asyncpg alone: an oracle uses no code of the worker."""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import asyncpg

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Query(Protocol):
    """Runs a query and returns its rows."""

    async def __call__(self, sql: str) -> list[tuple[Any, ...]]: ...  # noqa: D102


@dataclass(frozen=True)
class RunLook:
    """One run as stored; `rows` is what `chunk_count` says, or, where asked for, counted."""

    state: str
    cursor: int
    rows: int
    is_settled: bool


class Look:
    """Reads one database."""

    def __init__(self, query: Query) -> None:
        self._query = query

    async def runs(self) -> dict[str, RunLook]:
        """All runs, with the worker's own count of their rows. Cheap."""
        found = await self._query("SELECT run_id, state, last_seq_id, chunk_count, settled_at IS NOT NULL FROM runs")
        return {run_id: RunLook(state, cursor, rows, bool(done)) for run_id, state, cursor, rows, done in found}

    async def counted(self, *, only_unsettled: bool = False) -> dict[str, RunLook]:
        """All runs, with their rows counted."""
        found = await self._query(f"""
            SELECT run_id, state, last_seq_id, (SELECT count(*) FROM chunks WHERE chunks.run_id = runs.run_id),
            settled_at IS NOT NULL FROM runs {"WHERE settled_at IS NULL" if only_unsettled else ""}
        """)
        return {run_id: RunLook(state, cursor, rows, bool(done)) for run_id, state, cursor, rows, done in found}

    async def chunks(self) -> list[tuple[str, int, str]]:
        """Every row."""
        rows = await self._query("SELECT run_id, seq_id, payload FROM chunks ORDER BY run_id, seq_id")
        return cast("list[tuple[str, int, str]]", rows)

    async def count(self, table: str) -> int:
        """Rows in a table."""
        return int((await self._query(f"SELECT count(*) FROM {table}"))[0][0])


@asynccontextmanager
async def looking(url: str) -> AsyncIterator[Look]:
    """Look into the database at a URL as it stands in the configuration."""
    if url.startswith("sqlite"):
        yield Look(_sqlite(Path(url.removeprefix("sqlite:///"))))
        return
    connection = await asyncpg.connect(url)
    try:

        async def query(sql: str) -> list[tuple[Any, ...]]:
            return [tuple(row) for row in await connection.fetch(sql)]

        yield Look(query)
    finally:
        await connection.close()


def _sqlite(path: Path) -> Query:
    async def query(sql: str) -> list[tuple[Any, ...]]:
        # A connection of its own each time: one kept open would keep the file's WAL alive over the worker's death.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(sql).fetchall()

    return query
