"""The SQLite file: private, durable, and kind to other connections."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.storage.store import AT, Store, accepted, known, lot, row
from worker.errors import RefusedError
from worker.storage import schema
from worker.storage.engine import create_engine
from worker.storage.writes import RunWrite, _move_rows


def _path(store: Store) -> str:
    return store.url.removeprefix("sqlite:///")


def modes(path: str) -> dict[str, int]:
    """The permissions of the files a database consists of."""
    return {end: stat.S_IMODE(Path(path + end).stat().st_mode) for end in ("", "-wal", "-shm")}


async def test_nobody_else_may_read_the_files(sqlite_url: str) -> None:
    """I10: Database, write-ahead log and index are 0600, whatever the umask."""
    before = os.umask(0)
    try:
        async with Store(sqlite_url) as store:
            await store.write(known("run-1"), lot("run-1", 1, 3))
            found = modes(_path(store))
    finally:
        os.umask(before)
    assert found == {"": 0o600, "-wal": 0o600, "-shm": 0o600}


async def test_a_commit_is_on_disk(sqlite_store: Store) -> None:
    """I3: Every connection works in WAL mode and waits for the disk at each commit."""
    seen = set()
    connections = [await sqlite_store.engine.connect() for _ in range(2)]
    for connection in connections:
        options = await connection.execution_options(reads_only=True)
        answers = [
            (await options.execute(sa.text(f"PRAGMA {name}"))).scalar() for name in ("journal_mode", "synchronous")
        ]
        seen.add(tuple(answers))
        await connection.close()
    assert seen == {("wal", 2)}


async def test_a_sqlite_that_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I7: An old system's library is named together with what is needed, before anything is written."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 1))
    engine = create_engine(f"sqlite:///{tmp_path}/letta-ingest.db")
    with pytest.raises(RefusedError, match=r"SQLite 3\.\d+\.\d+, and 3\.33 is needed"):
        await engine.connect()
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240


async def test_a_cursor_is_moved_by_its_key(sqlite_store: Store) -> None:
    """However many runs are stored, moving the cursors of a few costs the same: nothing but the few is looked at."""
    explain = f"EXPLAIN QUERY PLAN {_move_rows(16)}"
    async with sqlite_store.engine.connect() as connection:
        steps = [row.detail for row in await connection.exec_driver_sql(explain, (None,) * 16 * 6)]
    assert any(step.startswith("SEARCH runs USING INDEX") and "run_id=?" in step for step in steps), steps
    assert not any(step.startswith("SCAN runs") for step in steps), steps


async def test_a_writer_takes_its_lock_at_once(sqlite_store: Store) -> None:
    """I4: A write transaction begins with the lock, so it never fails half way for want of it."""
    async with sqlite_store.engine.begin():
        other = sqlite3.connect(_path(sqlite_store), timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


async def test_a_writer_waits_for_another(sqlite_store: Store) -> None:
    """I4: A writer waits for one that is a little slower instead of failing."""
    await sqlite_store.write(known("run-1"))
    other = sqlite3.connect(_path(sqlite_store), isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.rollback)
    release.start()
    await sqlite_store.write(lot("run-1", 1, 1))
    release.join()
    other.close()
    assert await sqlite_store.cursor("run-1") == 1


async def test_a_reader_sees_one_moment_and_stops_no_writer(sqlite_store: Store) -> None:
    """I4: While somebody reads, commits go on, and the reader's picture does not move."""
    await sqlite_store.write(known("run-1"), lot("run-1", 1, 2))
    count = sa.text("SELECT count(*) FROM chunks")
    async with sqlite_store.engine.execution_options(reads_only=True).connect() as reader:
        assert (await reader.execute(count)).scalar() == 2
        await sqlite_store.write(lot("run-1", 3, 5))
        assert (await reader.execute(count)).scalar() == 2
    assert len(await sqlite_store.chunks("run-1")) == 5


@pytest.mark.parametrize("place", ["missing/x.db", "file/x.db", "folder"])
async def test_a_file_that_cannot_be_had_is_refused(tmp_path: Path, place: str) -> None:
    """I7: A path that can never work is refused in one sentence that names it, not waited for."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    engine = create_engine(f"sqlite:///{tmp_path}/{place}")
    with pytest.raises(RefusedError, match=f"cannot (create|use) the database .*{place}"):
        await schema.upgrade(engine)
    await engine.dispose()


async def test_a_full_disk_costs_nothing_that_was_stored(sqlite_store: Store) -> None:
    """I3: A write that does not fit on the disk leaves no trace, and works once there is room."""
    await sqlite_store.write(known("run-1"), lot("run-1", 1, 3))
    before = await sqlite_store.snapshot()
    large = RunWrite("run-1", AT, "following", accepted([row(4, '"' + "x" * 2_000_000 + '"')]))
    limit = _Limit(sqlite_store, pages=100)
    with pytest.raises(sa.exc.OperationalError, match="full"):
        await sqlite_store.write(large)
    assert await sqlite_store.snapshot() == before
    limit.lift()
    await sqlite_store.write(large)
    assert (await sqlite_store.cursor("run-1"), len(await sqlite_store.chunks("run-1"))) == (4, 4)


class _Limit:
    """A disk with room for so many pages, as SQLite itself pretends it: the error is the real one."""

    def __init__(self, store: Store, pages: int) -> None:
        self._engine = store.transactions.engine
        self._pages = pages
        sa.event.listen(self._engine, "begin", self._set)

    def _set(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {self._pages}")

    def lift(self) -> None:
        """The disk has room again."""
        self._pages = 1_000_000
