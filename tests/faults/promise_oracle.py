"""What is stored, read by sqlite3 and asyncpg alone, and compared with the server's own log after every step.

Used by promise.py. It knows the tables and the invariants, and no code of the worker.
"""

from __future__ import annotations

import sqlite3
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.faults.promise_server import Talk

QUERIES = (
    "SELECT run_id, state, last_seq_id, chunk_count, settled_at IS NOT NULL FROM runs",
    "SELECT run_id, seq_id, payload, seq_source, received_at FROM chunks",
    "SELECT run_id, first_seq_id, last_seq_id, cause, resolved_at IS NULL FROM gaps",
    "SELECT run_id, after_seq_id, raw FROM rejects",
)
GARBAGE = b"data: \xff\xfe\n\ndata: 1e999\n\n:comment\n\nid: 7\n\n"
"""A whole response of what is no chunk."""
PIECES_OF_GARBAGE = {b"\xff\xfe", b"1e999"}
UNFINISHED = {"pending", "following"}


@dataclass(frozen=True)
class Gap:
    """A recorded gap; `last` None: to the unknown end."""

    first: int
    last: int | None
    cause: str
    is_open: bool

    def holds(self, seq_id: int) -> bool:
        """The number is in it."""
        return self.first <= seq_id and (self.last is None or seq_id <= self.last)


@dataclass
class Stored:
    """All that is stored of one run."""

    state: str
    cursor: int
    count: int
    is_settled: bool
    rows: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    rejects: set[tuple[int, bytes]] = field(default_factory=set)

    @property
    def open_gaps(self) -> list[Gap]:
        """What is still missing."""
        return [gap for gap in self.gaps if gap.is_open]

    def is_missing(self, seq_id: int) -> bool:
        """The number is recorded as missing."""
        return seq_id not in self.rows and any(gap.holds(seq_id) for gap in self.open_gaps)


Picture = dict[str, Stored]


def _picture(runs: list[Any], chunks: list[Any], gaps: list[Any], rejects: list[Any]) -> Picture:
    picture = {run_id: Stored(state, cursor, count, bool(done)) for run_id, state, cursor, count, done in runs}
    for run_id, seq_id, *row in chunks:
        assert seq_id not in picture[run_id].rows, "I1: a number twice"
        picture[run_id].rows[seq_id] = tuple(row)
    for run_id, first, last, cause, is_open in gaps:
        picture[run_id].gaps.append(Gap(first, last, cause, bool(is_open)))
    for run_id, after, raw in rejects:
        picture[run_id].rejects.add((after, bytes(raw)))
    return picture


@asynccontextmanager
async def looking(database_url: str) -> AsyncIterator[Callable[[], Awaitable[Picture]]]:
    """Look at everything that is stored, each time at one moment."""
    if database_url.startswith("sqlite"):
        path = Path(database_url.removeprefix("sqlite:///"))

        async def look() -> Picture:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
                connection.execute("BEGIN")
                return _picture(*(connection.execute(query).fetchall() for query in QUERIES))

        yield look
        return
    connection = await asyncpg.connect(database_url)
    try:

        async def look() -> Picture:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return _picture(*[await connection.fetch(query) for query in QUERIES])

        yield look
    finally:
        await connection.close()


class Oracle:
    """Compares each look with the one before it and with the server's logs."""

    def __init__(self, talks: dict[str, Talk]) -> None:
        self._talks = talks
        self._before: Picture = {}
        self._ever_gone: dict[str, set[int]] = {}
        """Numbers that could not be served at some look."""

    def check(self, now: Picture) -> None:
        """Everything that must hold at any time."""
        self._note_what_is_gone()
        assert now.keys() <= self._talks.keys()
        assert self._before.keys() <= now.keys(), "a run has vanished"
        for run_id, stored in now.items():
            talk, before = self._talks[run_id], self._before.get(run_id, Stored("pending", 0, 0, is_settled=False))
            said = f"{run_id}, {talk.run.status}: {stored.state}, cursor {stored.cursor}, rows {sorted(stored.rows)},"
            said += f" gaps {stored.gaps}"
            self._check_rows(talk, before, stored, said)
            self._check_cursor(before, stored, said)
            self._check_state(talk, before, stored, said)
            self._check_gaps(talk, before, stored, said)
            self._check_rejects(talk, before, stored, said)
        self._before = now

    def check_end(self, now: Picture) -> None:
        """What must hold when the workers have done all they could: rows are the server's log minus recorded gaps."""
        assert now.keys() == self._talks.keys(), "a run was not discovered"
        for run_id, stored in now.items():
            payloads = self._talks[run_id].payloads()
            unaccounted = [n for n in payloads if n not in stored.rows and not stored.is_missing(n)]
            assert unaccounted == [], f"{run_id}: {unaccounted} are neither stored nor a gap; {stored}"
            assert stored.is_settled
            assert stored.state not in UNFINISHED
            assert (stored.state == "complete") == (not stored.open_gaps), stored

    def owed(self, now: Picture) -> list[str]:
        """Runs of which something can be had now that is neither stored nor given up."""
        return [run_id for run_id, talk in self._talks.items() if self._is_owed(talk, now.get(run_id))]

    def _is_owed(self, talk: Talk, stored: Stored | None) -> bool:
        if stored is None:
            return True
        if stored.is_settled:
            return False
        servable = talk.servable()
        has_end = talk.has_end and bool(servable)
        return has_end or stored.cursor < max((n for n, is_numbered in servable.items() if is_numbered), default=0)

    def _note_what_is_gone(self) -> None:
        for run_id, talk in self._talks.items():
            self._ever_gone.setdefault(run_id, set()).update(talk.payloads().keys() - talk.servable().keys())

    # ---- the invariants ----

    def _check_rows(self, talk: Talk, before: Stored, now: Stored, said: str) -> None:
        changed = {n: (row, now.rows.get(n)) for n, row in before.rows.items() if now.rows.get(n) != row}
        assert not changed, f"I1: rows were altered: {changed}; {said}"
        payloads = talk.payloads()
        wrong = {n: row for n, row in now.rows.items() if payloads.get(n) != row[0] or n in talk.unreadable}
        assert not wrong, f"I1: rows are not what the server has under their numbers: {wrong}; {said}"
        assert now.count == len(now.rows), f"I3: the count is {now.count}; {said}"

    def _check_cursor(self, before: Stored, now: Stored, said: str) -> None:
        assert now.cursor >= before.cursor, f"I3: the cursor went back from {before.cursor}; {said}"
        assert max(now.rows, default=0) <= now.cursor, f"I2: rows behind the cursor; {said}"
        gaps = [range(gap.first, gap.last + 1) for gap in now.open_gaps if gap.last is not None]
        lead = set(range(1, now.cursor + 1)).difference(now.rows, *gaps)
        assert not lead, f"I2, I3: the cursor leads: {sorted(lead)} are neither stored nor a gap; {said}"

    def _check_state(self, talk: Talk, before: Stored, now: Stored, said: str) -> None:
        assert now.is_settled >= before.is_settled, said
        if before.state not in UNFINISHED:
            assert now.state in {before.state, "complete"}, f"a final state was undone: {before.state}; {said}"
        if now.state == "complete":
            assert talk.has_end, f"I5: no terminal marker was ever written; {said}"
            assert now.rows.keys() == talk.payloads().keys(), f"I5: complete with holes; {said}"
            assert now.open_gaps == [], f"I5: complete with gaps; {said}"

    def _check_gaps(self, talk: Talk, before: Stored, now: Stored, said: str) -> None:
        """A gap that is new is one: the server cannot, or once could not, serve those numbers (promise 3)."""
        gone, payloads = self._ever_gone[talk.run.id], talk.payloads()
        rejected = {raw for _, raw in now.rejects}
        recorded = {gap.first for gap in before.gaps}
        for gap in now.open_gaps:
            missing = [n for n in range(gap.first, (gap.last or gap.first) + 1) if n not in now.rows]
            assert missing, f"a gap whose numbers are stored: {gap}; {said}"
            if gap.first in recorded:
                continue
            for n, payload in payloads.items():
                if not gap.holds(n) or n in now.rows or n in gone or (gap.last is None and n in talk.late):
                    continue
                assert payload.encode() in rejected, f"{n} is called missing and could be read: {gap}; {said}"

    def _check_rejects(self, talk: Talk, before: Stored, now: Stored, said: str) -> None:
        assert before.rejects <= now.rejects, f"I6: a reject was lost or altered; {said}"
        # A server that ignores run_id sends other runs' entries, too; what names no run is kept rather than dropped.
        sent = [talk] if talk.letta.honours_run_id else self._talks.values()
        known = {payload.encode() for each in sent for payload in each.payloads().values()} | PIECES_OF_GARBAGE
        foreign = {raw for _, raw in now.rejects} - known
        assert not foreign, f"I6: rejects hold what was never sent: {foreign}; {said}"
