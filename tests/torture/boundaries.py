"""Strikes a worker from within, exactly at a durable boundary: a signal that its process sends to itself.

Runs in the worker's process, for the campaign (faults.py). It watches the edges: SQLAlchemy's events, the driver's
commit, the socket to PostgreSQL, and SQLite's own table of system calls; nothing that passes there is changed. Before
it strikes it leaves its testimony: the store as the transaction under way found it, and as it makes it.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import enum
import json
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect

from tests.support.looks import UNSETTLED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Boundary(enum.StrEnum):
    """A place that the data passes on its way into the database."""

    MIGRATION = "in a migration"
    DISCOVERY = "runs found, COMMIT not sent"
    ROWS = "rows written, cursor not moved"
    BEFORE = "all written, COMMIT not sent"
    AFTER = "COMMIT done, worker not told"
    # SQLite
    TORN = "in COMMIT: WAL half written"
    UNSYNCED = "in COMMIT: WAL written, not synced"
    CHECKPOINT = "in COMMIT: in the checkpoint"
    # PostgreSQL
    COPYING = "rows half sent"
    HALF_SENT = "in COMMIT: half of it sent"
    UNANSWERED = "in COMMIT: sent, not answered"


WITHOUT_CHUNKS = {Boundary.MIGRATION, Boundary.DISCOVERY}
IN_FILES = {Boundary.TORN, Boundary.UNSYNCED, Boundary.CHECKPOINT}
ON_WIRE = {Boundary.COPYING, Boundary.HALF_SENT, Boundary.UNANSWERED}
COMMIT_MESSAGE = b"Q\0\0\0\x0cCOMMIT;\0"
COPY_DATA = b"d"
"""Messages that begin so bring rows; another one ends them."""
FRAME_HEADER_BYTES = 24
"""In SQLite's WAL each page has such a header; its second word is not zero in the last one of a transaction."""
SMALLEST_PAGE_BYTES = 512


@dataclass(frozen=True)
class Strike:
    """What to wait for. Give it to a Life; `skip` is how often the boundary is passed unharmed before."""

    boundary: Boundary
    testimony: Path
    skip: int = 0
    signal: signal.Signals = signal.SIGKILL

    def __call__(self) -> None:
        """Watch from now on."""
        _Watcher(self).begin()


class _Watcher:
    def __init__(self, strike: Strike) -> None:
        self._strike = strike
        self._left = strike.skip
        self._found: list[list[Any]] = []
        self._made: list[list[Any]] = []
        self._brings_chunks = False
        self._is_committing = False
        self._transports: list[Any] = []
        self._wal = -1
        self._is_last_frame = False

    def begin(self) -> None:
        sa.event.listen(sa.Engine, "after_cursor_execute", self._after_statement)
        if self._strike.boundary not in WITHOUT_CHUNKS:
            sa.event.listen(sa.Engine, "begin", self._after_begin)
            sa.event.listen(sa.Engine, "commit", self._before_commit)
            commit = DefaultDialect.do_commit

            def observed(dialect: DefaultDialect, connection: Any) -> None:
                self._watch_socket(connection)
                self._is_committing = self._brings_chunks
                commit(dialect, connection)
                self._is_committing = False
                if self._brings_chunks:
                    self._reach(Boundary.AFTER)

            DefaultDialect.do_commit = observed  # type: ignore[method-assign]
        if self._strike.boundary in IN_FILES:
            self._hooks = observe_writes(self._wrote)

    def _reach(self, boundary: Boundary) -> None:
        if boundary is self._strike.boundary and self._is_due():
            self._hit()

    def _is_due(self) -> bool:
        self._left -= 1
        return self._left == -1

    def _hit(self) -> None:
        self._strike.testimony.write_text(json.dumps([self._found, self._made]))
        os.kill(os.getpid(), self._strike.signal)

    # What SQLAlchemy tells

    def _after_begin(self, connection: sa.Connection) -> None:
        if not connection.get_execution_options().get("reads_only"):
            self._found = stored(connection)

    def _after_statement(self, connection: sa.Connection, _: object, statement: str, *__: object) -> None:
        if statement.startswith("INSERT INTO chunks"):
            if self._strike.boundary is Boundary.ROWS:
                self._made = stored(connection)
            self._reach(Boundary.ROWS)
        elif statement.startswith("INSERT INTO runs"):
            self._reach(Boundary.DISCOVERY)
        elif statement.lstrip().startswith("CREATE"):
            self._reach(Boundary.MIGRATION)

    def _before_commit(self, connection: sa.Connection) -> None:
        self._made = stored(connection)
        self._brings_chunks = total(self._made) > total(self._found)
        if self._brings_chunks:
            self._reach(Boundary.BEFORE)

    # What goes to PostgreSQL

    def _watch_socket(self, connection: Any) -> None:
        if self._strike.boundary not in ON_WIRE:
            return
        transport = connection.driver_connection._transport
        if transport in self._transports:
            return
        self._transports.append(transport)
        write = transport.write

        def observed(data: bytes | memoryview) -> None:
            is_commit = self._is_committing and len(data) == len(COMMIT_MESSAGE) and bytes(data) == COMMIT_MESSAGE
            if is_commit and self._strike.boundary is Boundary.HALF_SENT and self._is_due():
                write(data[: len(data) // 2])
                self._hit()
            write(data)
            if is_commit:
                self._reach(Boundary.UNANSWERED)
            elif bytes(data[:1]) == COPY_DATA:
                self._reach(Boundary.COPYING)

        transport.write = observed

    # What SQLite writes

    def _wrote(self, file: int, size: int, head: bytes) -> None:
        if not self._is_committing:
            return
        if size == FRAME_HEADER_BYTES:
            self._wal, self._is_last_frame = file, head[4:8] != bytes(4)
            self._reach(Boundary.TORN)
        elif size >= SMALLEST_PAGE_BYTES and file != self._wal:
            self._reach(Boundary.CHECKPOINT)
        elif size >= SMALLEST_PAGE_BYTES and self._is_last_frame:
            self._reach(Boundary.UNSYNCED)


def stored(connection: sa.Connection) -> list[list[Any]]:
    """What Look.unsettled finds, seen from within a transaction."""
    return [list(row) for row in connection.exec_driver_sql(UNSETTLED)]


def total(runs: list[list[Any]]) -> int:
    """All rows of these runs."""
    return sum(rows for _, _, rows in runs)


class _Vfs(ctypes.Structure):
    """SQLite's layer above the operating system, version 3 (sqlite3.h). The last three calls are made for tests."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("iVersion", "szOsFile", "mxPathname")),
        *((name, ctypes.c_void_p) for name in ("pNext", "zName", "pAppData", "xOpen", "xDelete", "xAccess")),
        *((name, ctypes.c_void_p) for name in ("xFullPathname", "xDlOpen", "xDlError", "xDlSym", "xDlClose")),
        *((name, ctypes.c_void_p) for name in ("xRandomness", "xSleep", "xCurrentTime", "xGetLastError")),
        ("xCurrentTimeInt64", ctypes.c_void_p),
        ("xSetSystemCall", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)),
        ("xGetSystemCall", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)),
        ("xNextSystemCall", ctypes.c_void_p),
    )


_WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_PWRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)


def observe_writes(wrote: Callable[[int, int, bytes], None]) -> list[Any]:
    """Tell of every write of SQLite, once it is done: file, size, first bytes. What is returned must be kept alive."""
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    found = library.sqlite3_vfs_find(None)
    vfs = found.contents
    hooks = []
    for name, kind in ((b"write", _WRITE), (b"pwrite", _PWRITE), (b"pwrite64", _PWRITE)):
        address = vfs.xGetSystemCall(found, name)
        if address:
            original = kind(address)

            def observed(file: int, data: int, size: int, *place: int, original: Any = original) -> int:
                written: int = original(file, data, size, *place)
                wrote(file, size, ctypes.string_at(data, min(size, FRAME_HEADER_BYTES)))
                return written

            hooks.append(kind(observed))
            vfs.xSetSystemCall(found, name, ctypes.cast(hooks[-1], ctypes.c_void_p))
    return hooks
