"""The independent count: what FakeLetta served, compared with the rows in the file, without any code of the worker.

Used by demo.py and by the crash campaign (tests/torture). ``stored_rows`` reads with the sqlite3 module alone.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from worker.demo.fake_run import FakeRun


@dataclass(frozen=True)
class Tally:
    """What became of the chunks. Exact: every (run, seq_id, payload) is there once, and nothing else is."""

    runs: int
    chunks: int
    stored: int
    lost: int
    doubled: int
    """Rows beyond those that were served: a number twice, or a chunk under a number it never had."""
    altered: int

    @property
    def is_exact(self) -> bool:
        """Nothing lost, doubled or altered."""
        return not (self.lost or self.doubled or self.altered)


@dataclass(frozen=True)
class StoredRun:
    """A run as the file holds it."""

    state: str
    cursor: int
    rows: int
    is_settled: bool


def compare(runs: Mapping[str, FakeRun], stored: Iterable[tuple[str, int, str]]) -> Tally:
    """Compare the server's logs with stored rows (run_id, seq_id, payload)."""
    served = {(run_id, seq_id): payload for run_id, run in runs.items() for seq_id, payload in run.expected_rows()}
    rows = list(stored)
    times = Counter((run_id, seq_id) for run_id, seq_id, _ in rows)
    return Tally(
        runs=len(runs),
        chunks=len(served),
        stored=len(rows),
        lost=sum(key not in times for key in served),
        doubled=sum(count - (key in served) for key, count in times.items()),
        altered=sum(served.get((run_id, seq_id), payload) != payload for run_id, seq_id, payload in rows),
    )


def stored_rows(database: Path) -> list[tuple[str, int, str]]:
    """Return all chunks in the file."""
    with closing(_open(database)) as connection:
        return connection.execute("SELECT run_id, seq_id, payload FROM chunks").fetchall()


def stored_runs(database: Path) -> dict[str, StoredRun]:
    """Return every run in the file with its cursor and the number of its rows; nothing while there is no file."""
    query = """
        SELECT run_id, state, last_seq_id, coalesce(rows, 0), settled_at IS NOT NULL FROM runs
        LEFT JOIN (SELECT run_id, count(*) AS rows FROM chunks GROUP BY run_id) USING (run_id)
    """
    if not database.exists():
        return {}
    with closing(_open(database)) as connection:
        try:
            found = connection.execute(query).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # the worker is just making the schema
                return {}
            raise
    return {run_id: StoredRun(state, cursor, rows, bool(settled)) for run_id, state, cursor, rows, settled in found}


def _open(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)
