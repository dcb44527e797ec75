"""What one transaction writes. Used by committer.py, which decides how much goes into one.

Every statement may be repeated and may race with a second worker's (I1, I4): rows are inserted if absent, cursors
only move forward, a final state stays.
"""

import datetime as dt
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from worker.core.messages import Comparison, Message, storable
from worker.core.records import ENDED_STATUSES, MessageRecord, RunRecord
from worker.core.runlog import Accepted
from worker.storage import tables
from worker.storage.tables import UNFINISHED_STATES


class RunWrite(msgspec.Struct, frozen=True):
    """What is new of one run. `state` None leaves the state as it is."""

    run_id: str
    at: dt.datetime
    state: str | None = None
    accepted: Accepted | None = None
    error: str | None = None
    record: RunRecord | None = None
    messages: Sequence[MessageRecord] = ()
    streamed: Sequence[Message] = ()
    comparison: Comparison | None = None
    is_settled: bool = False

    @property
    def size(self) -> int:
        """Roughly the bytes it keeps in memory until it is committed."""
        size = 200 + sum(200 + 2 * len(message.payload) for message in self.messages)
        size += sum(200 + len(message.as_said) for message in self.streamed)
        if self.accepted is not None:
            size += sum(200 + len(row.chunk.payload) for row in self.accepted.rows)
            # These go the slow way, and there is a gap for each: few enough of them fit into a transaction.
            size += sum(1000 + len(reject.raw) for reject in self.accepted.rejects)
        return size


class SweepWrite(msgspec.Struct, frozen=True):
    """What one sweep of discovery found: runs that are new or have changed, and how far it has got."""

    at: dt.datetime
    runs: Sequence[RunRecord]
    position_at: dt.datetime | None = None
    new_scopes: dict[str, dt.datetime | None] = {}
    """Scope -> the time from which its runs are wanted; None: from the earliest."""
    dropped_scopes: Sequence[str] = ()

    @property
    def size(self) -> int:
        """Roughly the bytes it keeps in memory until it is committed."""
        return 200 + 500 * len(self.runs)


Write = RunWrite | SweepWrite

CHUNK_COLUMNS = tuple(column.name for column in tables.chunks.columns)

POSITION_SCOPE = "*"
"""The row of `discovery` that holds the position all scopes share."""


class Dialect(Protocol):
    """The statements on the hot path, and what else differs between the two databases."""

    def lock_runs(self, connection: sa.Connection, run_ids: list[str]) -> None:
        """Take the runs' rows in one fixed order, so that two workers never deadlock."""

    def time(self, at: dt.datetime) -> Any:
        """A time as the statements below take it."""

    def load_chunks(self, connection: sa.Connection, rows: list[tuple[Any, ...]]) -> None:
        """Bring rows to the server before any lock is taken: who falls silent meanwhile must hold up nobody."""

    def insert_chunks(self, connection: sa.Connection, rows: list[tuple[Any, ...]]) -> None:
        """Insert if absent what was loaded; a row has the values of CHUNK_COLUMNS."""

    def move_cursors(self, connection: sa.Connection, moves: list[tuple[Any, ...]]) -> set[str]:
        """Move forward; a move is (cursor, count, state or None, error or None, time, run_id).

        Returns those of the runs that ever had a gap, recorded by whichever worker.
        """

    def insert(self, table: sa.Table) -> Any:
        """An insert that knows ON CONFLICT."""


def write(connection: sa.Connection, dialect: Dialect, writes: Sequence[Write]) -> None:
    """Write everything inside the caller's transaction: rows, gaps, cursors and states move together (I3)."""
    sweeps = [w for w in writes if isinstance(w, SweepWrite)]
    run_writes = sorted((w for w in writes if isinstance(w, RunWrite)), key=lambda w: w.run_id)
    listed = {run.run_id for sweep in sweeps for run in sweep.runs}
    rows = [row for w in run_writes if w.accepted for row in _chunk_rows(w, w.accepted, dialect.time(w.at))]
    if rows:
        dialect.load_chunks(connection, rows)
    if run_ids := listed.union(w.run_id for w in run_writes):
        dialect.lock_runs(connection, sorted(run_ids))
    for sweep in sweeps:
        _write_sweep(connection, dialect, sweep)
    if not run_writes:
        return
    if rows:
        dialect.insert_chunks(connection, rows)
    gapped = dialect.move_cursors(connection, _moves(run_writes, dialect))
    if gapped:
        _move_open_ends(connection, gapped)
    _write_gaps(connection, dialect, run_writes)
    _write_rejects(connection, dialect, run_writes)
    gapped.update(w.run_id for w in run_writes if w.accepted and (w.accepted.gaps or w.accepted.has_late_rows))
    for w in run_writes:
        if w.accepted is not None and w.run_id in gapped:
            _reconcile(connection, w)
        if w.record is not None or w.messages or w.is_settled:
            _write_record(connection, dialect, w)


def _chunk_rows(w: RunWrite, accepted: Accepted, received_at: Any) -> Iterator[tuple[Any, ...]]:
    for row in accepted.rows:
        chunk = row.chunk
        source = "derived" if row.is_derived else "wire"
        yield (
            w.run_id,
            row.seq_id,
            chunk.message_type,
            chunk.message_id,
            chunk.otid,
            chunk.step_id,
            chunk.payload,
            received_at,
            source,
        )


def _moves(writes: list[RunWrite], dialect: Dialect) -> list[tuple[Any, ...]]:
    """One move a run, although a run may have several writes in one transaction: what they come to one by one."""
    moves: dict[str, tuple[Any, ...]] = {}
    for w in writes:
        cursor, count, state, error, *_ = moves.get(w.run_id, (0, 0, None, None))
        if w.accepted is not None:
            cursor, count = max(cursor, w.accepted.cursor), max(count, w.accepted.stored_count)
        if w.state is not None and (state is None or state in UNFINISHED_STATES or w.state == "complete"):
            state = w.state
        said = w.error or (w.record.error if w.record else None)
        moves[w.run_id] = (cursor, count, state, said or error, dialect.time(w.at), w.run_id)
    return list(moves.values())


def _move_open_ends(connection: sa.Connection, run_ids: set[str]) -> None:
    """A gap to the unknown end begins behind the last stored number: a second worker may go on where one gave up."""
    gaps, runs = tables.gaps, tables.runs
    of_run = sa.and_(runs.c.run_id == gaps.c.run_id, runs.c.state != "complete")
    behind = sa.select(runs.c.last_seq_id + 1).where(of_run).scalar_subquery()
    open_ends = sa.and_(gaps.c.run_id.in_(sorted(run_ids)), gaps.c.last_seq_id.is_(None), gaps.c.resolved_at.is_(None))
    connection.execute(sa.update(gaps).where(open_ends, gaps.c.first_seq_id < behind).values(first_seq_id=behind))


def _write_gaps(connection: sa.Connection, dialect: Dialect, writes: list[RunWrite]) -> None:
    gaps, runs = tables.gaps, tables.runs
    found = [
        {
            "run_id": w.run_id,
            "first_seq_id": gap.first_seq_id,
            "last_seq_id": gap.last_seq_id,
            "cause": gap.cause,
            "detected_at": w.at,
        }
        for w in writes
        if w.accepted
        for gap in w.accepted.gaps
    ]
    if closed := [gap for gap in found if gap["last_seq_id"] is not None]:
        connection.execute(dialect.insert(gaps).on_conflict_do_nothing(), closed)
    for gap in found:
        if gap["last_seq_id"] is None:
            # Behind what is stored by now, and only if nobody has seen the end meanwhile (I5).
            values = [sa.literal(value, gaps.c[name].type) for name, value in gap.items() if name != "first_seq_id"]
            names = ["first_seq_id", *(name for name in gap if name != "first_seq_id")]
            of_run = sa.and_(runs.c.run_id == gap["run_id"], runs.c.state != "complete")
            behind = sa.select(runs.c.last_seq_id + 1, *values).where(of_run)
            connection.execute(dialect.insert(gaps).from_select(names, behind).on_conflict_do_nothing())


def _reconcile(connection: sa.Connection, w: RunWrite) -> None:
    """Close the gaps whose numbers have turned up after all, read by us or by a second worker; count anew.

    A run is `incomplete` for its gaps only (its end is known, else one of them is open-ended): without, it is complete.
    """
    gaps, chunks, runs = tables.gaps, tables.chunks, tables.runs
    present = (
        sa.select(sa.func.count())
        .where(chunks.c.run_id == w.run_id, chunks.c.seq_id.between(gaps.c.first_seq_id, gaps.c.last_seq_id))
        .scalar_subquery()
    )
    is_open = sa.and_(gaps.c.run_id == w.run_id, gaps.c.resolved_at.is_(None))
    is_filled = sa.or_(present == gaps.c.last_seq_id - gaps.c.first_seq_id + 1, sa.literal(w.state == "complete"))
    connection.execute(sa.update(gaps).where(is_open, is_filled).values(resolution="filled", resolved_at=w.at))
    count = sa.select(sa.func.count()).where(chunks.c.run_id == w.run_id).scalar_subquery()
    is_whole = sa.and_(runs.c.state == "incomplete", ~sa.exists().where(is_open))
    connection.execute(
        sa.update(runs)
        .where(runs.c.run_id == w.run_id)
        .values(chunk_count=count, state=sa.case((is_whole, "complete"), else_=runs.c.state))
    )


def _write_rejects(connection: sa.Connection, dialect: Dialect, writes: list[RunWrite]) -> None:
    found = [
        {
            "run_id": w.run_id,
            "after_seq_id": reject.after_seq_id,
            "digest": hashlib.sha256(reject.raw).hexdigest(),
            "raw": reject.raw,
            "reason": reject.reason,
            "received_at": w.at,
        }
        for w in writes
        if w.accepted
        for reject in w.accepted.rejects
    ]
    if found:
        connection.execute(dialect.insert(tables.rejects).on_conflict_do_nothing(), found)


def _write_record(connection: sa.Connection, dialect: Dialect, w: RunWrite) -> None:
    """What the server's record says of the run, its messages in the order REST lists them, and the verdict."""
    run = sa.update(tables.runs).where(tables.runs.c.run_id == w.run_id)
    found: dict[str, Any] = {}
    if w.record is not None:
        read = {name: getattr(w.record, name) for name in ("status", "stop_reason", "completed_at")}
        if w.record.is_ended:
            found |= read
        else:
            connection.execute(run.where(_is_open()).values(read))
    if w.comparison is not None:
        found["verdict"] = w.comparison.verdict
        found["verdict_detail"] = storable("\n".join(w.comparison.differences)) or None  # ids of any kind stand in it
    if w.is_settled:
        found["settled_at"] = w.at
    if found:
        connection.execute(run.values(found))
    listed = [
        {
            "run_id": w.run_id,
            "message_id": message.message_id,
            "part": message.otid or message.message_type or "",
            "position": position,
            "message_type": message.message_type,
            "otid": message.otid,
            "step_id": message.step_id,
            "date": message.date,
            "text": message.text,
            "payload": message.payload,
            "stored_at": w.at,
        }
        for position, message in enumerate(w.messages)
    ]
    if listed:
        connection.execute(dialect.insert(tables.messages).on_conflict_do_nothing(), listed)
    streamed = [
        {
            "run_id": w.run_id,
            "first_seq_id": message.first_seq_id,
            "message_id": storable(message.message_id),
            "message_type": message.message_type,
            "otid": storable(message.otid) if message.otid else None,
            "text": message.as_said,
        }
        for message in w.streamed
    ]
    if streamed:
        connection.execute(dialect.insert(tables.streamed_messages).on_conflict_do_nothing(), streamed)


def _write_sweep(connection: sa.Connection, dialect: Dialect, sweep: SweepWrite) -> None:
    if sweep.runs:
        insert = dialect.insert(tables.runs)
        changed = {name: insert.excluded[name] for name in ("status", "stop_reason", "completed_at", "updated_at")}
        found = [
            {name: getattr(run, name) for name in run.__struct_fields__}
            | {"state": "pending", "discovered_at": sweep.at, "updated_at": sweep.at}
            for run in sorted(sweep.runs, key=lambda run: run.run_id)
        ]
        connection.execute(
            insert.on_conflict_do_update(index_elements=["run_id"], set_=changed, where=_is_open()), found
        )
    discovery = tables.discovery
    if sweep.dropped_scopes:
        connection.execute(sa.delete(discovery).where(discovery.c.scope.in_(sweep.dropped_scopes)))
    scopes: list[dict[str, Any]] = [
        {"scope": scope, "start_at": start_at, "position_at": None, "updated_at": sweep.at}
        for scope, start_at in sweep.new_scopes.items()
    ]
    if scopes:
        connection.execute(dialect.insert(discovery).on_conflict_do_nothing(), scopes)
    if sweep.position_at is not None:
        insert = dialect.insert(discovery)
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=["scope"],
                set_={"position_at": insert.excluded.position_at, "updated_at": sweep.at},
                where=sa.or_(discovery.c.position_at.is_(None), discovery.c.position_at < insert.excluded.position_at),
            ),
            [{"scope": POSITION_SCOPE, "position_at": sweep.position_at, "updated_at": sweep.at}],
        )


def _is_open() -> sa.ColumnElement[bool]:
    """The store does not know yet that the run ended. A record read before that is old, and must not undo it."""
    status = tables.runs.c.status
    # No NOT IN: its list is written out at execution, which SQLAlchemy refuses to do for many rows at once.
    return sa.or_(status.is_(None), sa.and_(*(status != ended for ended in sorted(ENDED_STATUSES))))


_STATE = (
    f"CASE WHEN runs.state IN {UNFINISHED_STATES} THEN COALESCE(v.state, runs.state)"
    " WHEN v.state = 'complete' THEN 'complete' ELSE runs.state END"
)
"""A final state stays: a second worker that is behind cannot undo it; one that has seen more can say `complete`."""


class SqliteDialect:
    """SQLite: many rows a statement, because after each statement its thread has to wait for Python's lock."""

    _GAPPED = "SELECT DISTINCT run_id FROM gaps WHERE run_id IN (SELECT value FROM json_each(?))"

    def lock_runs(self, connection: sa.Connection, run_ids: list[str]) -> None:
        """BEGIN IMMEDIATE has locked everything."""

    def time(self, at: dt.datetime) -> str:
        """As SQLAlchemy writes it: naive ISO text in UTC with microseconds, so that text order is time order."""
        return at.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")

    def load_chunks(self, connection: sa.Connection, rows: list[tuple[Any, ...]]) -> None:
        """There is no server."""

    def insert_chunks(self, connection: sa.Connection, rows: list[tuple[Any, ...]]) -> None:
        """See Dialect."""
        _execute(connection, _insert_rows, rows)

    def move_cursors(self, connection: sa.Connection, moves: list[tuple[Any, ...]]) -> set[str]:
        """See Dialect."""
        _execute(connection, _move_rows, moves)
        run_ids = json.dumps([move[-1] for move in moves])
        return {run_id for (run_id,) in connection.exec_driver_sql(self._GAPPED, (run_ids,))}

    def insert(self, table: sa.Table) -> sqlite.Insert:
        """See Dialect."""
        return sqlite.insert(table)


class PostgresDialect:
    """PostgreSQL: COPY into a table of the connection's own, and from there insert-if-absent in one statement."""

    _MAKE_LOT = "CREATE TEMPORARY TABLE IF NOT EXISTS chunk_lot (LIKE chunks) ON COMMIT DELETE ROWS"
    _COLUMNS = ", ".join(CHUNK_COLUMNS)
    _INSERT = f"INSERT INTO chunks ({_COLUMNS}) SELECT {_COLUMNS} FROM pg_temp.chunk_lot ON CONFLICT DO NOTHING"
    _TIME = sa.DateTime(timezone=True)
    _MOVE_TYPES: tuple[Any, ...] = (sa.BigInteger, sa.BigInteger, sa.Text, sa.Text, _TIME, sa.Text)
    _MOVE = sa.text(
        "UPDATE runs SET last_seq_id = GREATEST(runs.last_seq_id, v.cursor),"
        f" chunk_count = GREATEST(runs.chunk_count, v.count), state = {_STATE},"
        " error = COALESCE(v.error, runs.error), updated_at = v.at"
        " FROM unnest(:c0, :c1, :c2, :c3, :c4, :c5) AS v(cursor, count, state, error, at, run_id)"
        " WHERE runs.run_id = v.run_id"
        " RETURNING runs.run_id, EXISTS (SELECT 1 FROM gaps WHERE gaps.run_id = runs.run_id)"
    ).bindparams(*(sa.bindparam(f"c{i}", type_=postgresql.ARRAY(t)) for i, t in enumerate(_MOVE_TYPES)))
    _LOCK = sa.text("SELECT 1 FROM runs WHERE run_id = ANY(:ids) ORDER BY run_id FOR UPDATE").bindparams(
        sa.bindparam("ids", type_=postgresql.ARRAY(sa.Text))
    )

    def lock_runs(self, connection: sa.Connection, run_ids: list[str]) -> None:
        """See Dialect."""
        connection.execute(self._LOCK, {"ids": run_ids})

    def time(self, at: dt.datetime) -> dt.datetime:
        """See Dialect."""
        return at

    def load_chunks(self, connection: sa.Connection, rows: list[tuple[Any, ...]]) -> None:
        """See Dialect."""
        connection.exec_driver_sql(self._MAKE_LOT)
        adapted: Any = connection.connection.dbapi_connection
        adapted.run_async(
            lambda driver: driver.copy_records_to_table(
                "chunk_lot", schema_name="pg_temp", columns=CHUNK_COLUMNS, records=rows
            )
        )

    def insert_chunks(self, connection: sa.Connection, rows: list[tuple[Any, ...]]) -> None:  # noqa: ARG002 - loaded
        """See Dialect."""
        connection.exec_driver_sql(self._INSERT)

    def move_cursors(self, connection: sa.Connection, moves: list[tuple[Any, ...]]) -> set[str]:
        """See Dialect."""
        moved = connection.execute(self._MOVE, _columns(moves))
        return {run_id for run_id, is_gapped in moved if is_gapped}

    def insert(self, table: sa.Table) -> postgresql.Insert:
        """See Dialect."""
        return postgresql.insert(table)


def _columns(rows: list[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {f"c{i}": list(column) for i, column in enumerate(zip(*rows, strict=True))}


MOST_ROWS = 1024
"""In one statement of SQLite's, which takes 32,766 values."""


def _execute(connection: sa.Connection, statement: Callable[[int], str], rows: list[tuple[Any, ...]]) -> None:
    """Execute the statement for so many rows, in powers of two: for these few sizes SQLite has compiled it already."""
    start = 0
    while left := len(rows) - start:
        count = min(MOST_ROWS, 1 << (left.bit_length() - 1))
        values = itertools.chain.from_iterable(rows[start : start + count])
        connection.exec_driver_sql(statement(count), tuple(values))
        start += count


def _values(columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"VALUES {', '.join([row] * rows)}"


@functools.cache
def _insert_rows(count: int) -> str:
    # Not INSERT OR IGNORE, which would also skip a row that breaks a rule, and the cursor would pass it (I2).
    values = _values(len(CHUNK_COLUMNS), count)
    return f"INSERT INTO chunks ({', '.join(CHUNK_COLUMNS)}) {values} ON CONFLICT DO NOTHING"


@functools.cache
def _move_rows(count: int) -> str:
    return (
        f"WITH v(cursor, count, state, error, at, run_id) AS ({_values(6, count)})"
        " UPDATE runs SET last_seq_id = max(runs.last_seq_id, v.cursor),"
        f" chunk_count = max(runs.chunk_count, v.count), state = {_STATE},"
        " error = COALESCE(v.error, runs.error), updated_at = v.at FROM v WHERE runs.run_id = v.run_id"
    )
