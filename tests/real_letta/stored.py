"""Reads what the worker stored, with plain SQL and without any of the worker's code."""

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

Record = tuple[Any, ...]


@dataclass(frozen=True)
class Database:
    """The worker's database; `url` as the worker's configuration has it."""

    kind: str
    url: str

    def fetch(self, query: str) -> list[Record]:
        """The rows of one query; none as long as the database or its tables do not exist."""
        if self.kind == "sqlite":
            return self._fetch_sqlite(query)
        return asyncio.run(self._fetch_postgresql(query))

    def chunk_counts(self) -> dict[str, int]:
        """How many chunks are stored of each run."""
        return dict(self.fetch("SELECT run_id, COUNT(*) FROM chunks GROUP BY run_id"))

    def state(self, run_id: str) -> str | None:
        """The worker's word for a run; None if it does not know it."""
        states = self.fetch(f"SELECT state FROM runs WHERE run_id = '{run_id}'")
        return str(states[0][0]) if states else None

    def is_complete(self, run_id: str) -> bool:
        """Whether a run is complete and what REST says of it is stored, too: that comes after its last chunk."""
        settled = self.fetch(
            f"SELECT 1 FROM runs WHERE run_id = '{run_id}' AND state = 'complete' AND status = 'completed'"
            f" AND EXISTS (SELECT 1 FROM messages WHERE run_id = '{run_id}')"
        )
        return bool(settled)

    def gaps(self, run_id: str) -> list[tuple[int, int | None]]:
        """The open gaps of a run; one without a last number reaches to an end that nobody knows."""
        query = "SELECT first_seq_id, last_seq_id FROM gaps WHERE run_id = '{}' AND resolved_at IS NULL ORDER BY 1"
        return [(first, last) for first, last in self.fetch(query.format(run_id))]

    def closed_gap_count(self) -> int:
        """How many gaps were recorded and closed again."""
        return int(self.fetch("SELECT COUNT(*) FROM gaps WHERE resolved_at IS NOT NULL")[0][0])

    def cursors_ahead_of_rows(self) -> list[Record]:
        """The runs without a recorded gap whose cursor names more rows than there are (invariant I2): must be none."""
        return self.fetch(
            "SELECT r.run_id, r.last_seq_id, COUNT(c.seq_id)"
            " FROM runs r LEFT JOIN chunks c ON c.run_id = r.run_id AND c.seq_id <= r.last_seq_id"
            " WHERE NOT EXISTS (SELECT 1 FROM gaps g WHERE g.run_id = r.run_id)"
            " GROUP BY r.run_id, r.last_seq_id HAVING COUNT(c.seq_id) <> r.last_seq_id"
        )

    def _fetch_sqlite(self, query: str) -> list[Record]:
        path = Path(self.url.removeprefix("sqlite:///"))
        try:
            # Read-only, so that this reader cannot tidy up the log a killed worker left behind.
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30)) as connection:
                return connection.execute(query).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error) or not path.exists():
                return []
            raise

    async def _fetch_postgresql(self, query: str) -> list[Record]:
        connection = await asyncpg.connect(self.url, timeout=60)
        try:
            return [tuple(record) for record in await connection.fetch(query)]
        except asyncpg.UndefinedTableError:
            return []
        finally:
            await connection.close()
