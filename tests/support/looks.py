"""What a test reads from the worker's database, by sqlite3 and asyncpg alone: an oracle uses no code of the worker."""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import asyncpg

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection


UNSETTLED = """
    SELECT run_id, last_seq_id, (SELECT count(*) FROM chunks WHERE chunks.run_id = runs.run_id)
    FROM runs WHERE settled_at IS NULL ORDER BY run_id
"""


class Query(Protocol):
    """Runs a query and returns its rows."""

    async def __call__(self, sql: str) -> list[tuple[Any, ...]]: ...  # noqa: D102


@dataclass(frozen=True)
class RunLook:
    """One run as stored, with its rows counted: all of them, and those up to the cursor."""

    state: str
    cursor: int
    rows: int
    rows_to_cursor: int
    is_settled: bool


class Look:
    """Reads one database."""

    def __init__(self, query: Query, *, is_server: bool) -> None:
        self._query = query
        self.is_server = is_server
        """PostgreSQL; else a SQLite file."""

    async def runs(self, *, only_unsettled: bool = False) -> dict[str, RunLook]:
        """All runs, or those that are not settled."""
        rows = "SELECT count(*) FROM chunks WHERE chunks.run_id = runs.run_id"
        found = await self._query(f"""
            SELECT run_id, state, last_seq_id, ({rows}), ({rows} AND seq_id <= last_seq_id), settled_at IS NOT NULL
            FROM runs {"WHERE settled_at IS NULL" if only_unsettled else ""}
        """)
        return {run_id: RunLook(*values, is_settled=bool(settled)) for run_id, *values, settled in found}

    async def settled(self) -> set[str]:
        """The runs there is nothing more to do for."""
        return {run_id for (run_id,) in await self._query("SELECT run_id FROM runs WHERE settled_at IS NOT NULL")}

    async def chunks(self, run_ids: Collection[str] | None = None) -> list[tuple[str, int, str]]:
        """Every row, or those of these runs."""
        chosen = "" if run_ids is None else f"WHERE run_id IN {_listed(run_ids)}"
        rows = await self._query(f"SELECT run_id, seq_id, payload FROM chunks {chosen} ORDER BY run_id, seq_id")
        return cast("list[tuple[str, int, str]]", rows)

    async def unsettled(self) -> list[tuple[str, int, int]]:
        """(run_id, cursor, rows) of every run that is not settled."""
        return cast("list[tuple[str, int, int]]", await self._query(UNSETTLED))

    async def stored(self) -> int:
        """How many chunks are stored up to their runs' cursors, by the worker's own count. Cheap."""
        return int((await self._query("SELECT coalesce(sum(chunk_count), 0) FROM runs"))[0][0])

    async def count(self, table: str) -> int:
        """Rows in a table."""
        return int((await self._query(f"SELECT count(*) FROM {table}"))[0][0])

    async def tables(self) -> set[str]:
        """The names of all tables."""
        where = "information_schema.tables WHERE table_schema = 'public' AND table_type = 'BASE TABLE'"
        where = where if self.is_server else "sqlite_master WHERE type = 'table'"
        return {
            name for (name,) in await self._query(f"SELECT {'table_name' if self.is_server else 'name'} FROM {where}")
        }

    async def sessions(self) -> int:
        """How many connections of workers the server still has: it may outlive its client by a statement."""
        mine = "datname = current_database() AND application_name = 'letta-ingest'"
        return (
            int((await self._query(f"SELECT count(*) FROM pg_stat_activity WHERE {mine}"))[0][0])
            if self.is_server
            else 0
        )


@asynccontextmanager
async def looking(url: str) -> AsyncIterator[Look]:
    """Look into the database at a URL as it stands in the configuration."""
    if url.startswith("sqlite"):
        yield Look(_sqlite(Path(url.removeprefix("sqlite:///"))), is_server=False)
        return
    connection = await asyncpg.connect(url)
    try:

        async def query(sql: str) -> list[tuple[Any, ...]]:
            return [tuple(row) for row in await connection.fetch(sql)]

        yield Look(query, is_server=True)
    finally:
        await connection.close()


def _sqlite(path: Path) -> Query:
    async def query(sql: str) -> list[tuple[Any, ...]]:
        # A connection of its own each time: one kept open would keep the file's WAL alive over the worker's death.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(sql).fetchall()

    return query


def _listed(values: Collection[str]) -> str:
    return "({})".format(", ".join(f"'{value}'" for value in values))
