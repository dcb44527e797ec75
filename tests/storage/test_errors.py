"""What real errors of both databases are taken for: waited out, or told to an operator; and what is said of them."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import sqlalchemy as sa

from tests.storage.store import AT, Store, accepted, known, lot, row
from worker.storage.engine import create_engine, describe, is_outage, is_refusal
from worker.storage.writes import RunWrite

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.postgres import PostgresServer

SECRET = "what the agent said"


async def failure(url: str, *statements: str, **values: object) -> BaseException:
    """The error these statements end with, in one transaction of an engine of their own."""
    engine = create_engine(url)
    try:
        async with engine.begin() as connection:
            for statement in statements or ("SELECT 1",):
                found = sa.text(statement)
                await connection.execute(found, values if f":{next(iter(values), None)}" in statement else {})
    except Exception as error:  # noqa: BLE001 - this is what we came for
        return error
    finally:
        await engine.dispose()
    raise AssertionError("nothing failed")


def assert_outage(error: BaseException) -> None:
    """It is waited out, and only that."""
    assert (is_outage(error), is_refusal(error)) == (True, False), repr(error)
    assert describe(error)


def assert_refusal(error: BaseException) -> None:
    """It is told to an operator, and only that."""
    assert (is_outage(error), is_refusal(error)) == (False, True), repr(error)
    assert describe(error)


REFUSED_STATEMENTS = {
    "no such table": ["SELECT * FROM nowhere"],
    "no such column": ["CREATE TABLE t (a int)", "SELECT missing FROM t"],
}


@pytest.mark.parametrize("name", REFUSED_STATEMENTS)
async def test_a_schema_that_is_not_ours_is_refused(database_url: str, name: str) -> None:
    """I7: Missing tables and columns do not come by waiting."""
    assert_refusal(await failure(database_url, *REFUSED_STATEMENTS[name]))


# PostgreSQL


async def test_postgresql_does_not_let_us_in(postgresql_url: str) -> None:
    """I7: A wrong role and a wrong database are refused, in the server's words."""
    role = await failure(postgresql_url.replace("postgres@", "stranger@"))
    assert_refusal(role)
    said, remedy = describe(role).split("; ")
    assert said == 'InvalidAuthorizationSpecificationError: role "stranger" does not exist'
    assert "storage.url" in remedy
    assert_refusal(await failure(postgresql_url.rsplit("/", 1)[0] + "/nowhere"))


async def test_a_wrong_password_is_refused(own_postgres: PostgresServer) -> None:
    """I7, I10: A wrong password is refused, and not repeated."""
    url = own_postgres.create_database()
    admin = await asyncpg.connect(url)
    await admin.execute("CREATE ROLE reader LOGIN PASSWORD 'right'")
    rules = own_postgres._data / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text("host all reader 127.0.0.1/32 scram-sha-256\n" + before)
    await admin.execute("SELECT pg_reload_conf()")
    try:
        error = await _until_refused(url.replace("postgres@", "reader:wrong-hunter2@"))
        assert "password authentication failed" in describe(error)
        assert "hunter2" not in describe(error)
    finally:
        rules.write_text(before)
        await admin.execute("DROP ROLE reader")
        await admin.close()


async def _until_refused(url: str) -> BaseException:
    """The server reads its new rules a moment after it was told to."""
    for _ in range(100):
        engine = create_engine(url)
        try:
            async with engine.connect():
                await asyncio.sleep(0.02)
        except (asyncpg.PostgresError, sa.exc.DBAPIError) as error:  # SQLAlchemy 2.0 does not wrap it
            assert_refusal(error)
            return error
        finally:
            await engine.dispose()
    raise AssertionError("every password is right")


async def test_encryption_that_cannot_be_had_is_refused(postgresql_url: str, tmp_path: Path) -> None:
    """I7, I10: With sslmode=require a server without TLS is refused, never spoken to in the clear."""
    assert_refusal(await failure(f"{postgresql_url}?sslmode=require"))
    missing = await failure(f"{postgresql_url}?sslmode=verify-full&sslrootcert={tmp_path}/no.crt")
    assert is_refusal(missing) or is_outage(missing)
    engine = create_engine(f"{postgresql_url}?sslmode=prefer")
    async with engine.connect() as connection:
        assert (await connection.execute(sa.text("SELECT 1"))).scalar() == 1
    await engine.dispose()


async def test_a_role_without_rights_is_refused(postgresql_url: str) -> None:
    """I7: A missing privilege is told to the operator, by the table's name."""
    admin = await asyncpg.connect(postgresql_url)
    await admin.execute("CREATE TABLE private (a int)")
    await admin.execute("DROP ROLE IF EXISTS nobody_special")
    await admin.execute("CREATE ROLE nobody_special LOGIN")
    await admin.close()
    error = await failure(postgresql_url.replace("postgres@", "nobody_special@"), "SELECT * FROM private")
    assert_refusal(error)
    assert "permission denied for table private" in describe(error)


WAITED_FOR = {
    "a read-only server": ["SET TRANSACTION READ ONLY", "CREATE TABLE t (a int)"],
    "a statement that takes too long": ["SET LOCAL statement_timeout = '20ms'", "SELECT pg_sleep(5)"],
    "a backend an administrator ended": ["SELECT pg_terminate_backend(pg_backend_pid())"],
    "a cancelled statement": ["SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(5)"],
    "an internal error": ["DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'XX000'; END $$"],
    "a full disk": ["DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '53100'; END $$"],
    "a server that starts": ["DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '57P03'; END $$"],
}


@pytest.mark.parametrize("name", WAITED_FOR)
async def test_what_passes_is_waited_for(postgresql_url: str, name: str) -> None:
    """I3: What an operator may be doing to a server right now is an outage."""
    assert_outage(await failure(postgresql_url, *WAITED_FOR[name]))


async def test_corrupt_data_is_refused(postgresql_url: str) -> None:
    """I7: A corrupt table or index needs an operator."""
    assert_refusal(await failure(postgresql_url, "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'XX001'; END $$"))


async def test_a_lock_held_too_long_is_waited_for(postgresql_url: str) -> None:
    """I4: Somebody else's lock passes."""
    admin = await asyncpg.connect(postgresql_url)
    await admin.execute("CREATE TABLE t (a int)")
    await admin.execute("BEGIN; LOCK TABLE t")
    assert_outage(await failure(postgresql_url, "SET LOCAL lock_timeout = '20ms'", "SELECT * FROM t"))
    await admin.close()


async def test_transactions_that_collide_are_waited_for(postgresql_url: str) -> None:
    """I4: A deadlock and a serialization failure end with the next attempt."""
    setup = await asyncpg.connect(postgresql_url)
    await setup.execute("CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 0), (2, 0)")
    await setup.close()
    update = "UPDATE t SET n = n + 1 WHERE id = "
    short = "SET LOCAL deadlock_timeout = '10ms'"
    pause = "SELECT pg_sleep(0.2)"
    deadlocked = await asyncio.gather(
        failure(postgresql_url, short, f"{update}1", pause, f"{update}2", "SELECT 1/0"),
        failure(postgresql_url, short, f"{update}2", pause, f"{update}1", "SELECT 1/0"),
    )
    (deadlock,) = [error for error in deadlocked if "deadlock" in describe(error)]
    assert_outage(deadlock)
    serializable = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
    engine = create_engine(postgresql_url)
    async with engine.connect() as connection:
        await connection.execute(sa.text(serializable))
        await connection.execute(sa.text("SELECT * FROM t"))
        async with engine.begin() as other:
            await other.execute(sa.text(f"{update}1"))
        with pytest.raises(sa.exc.DBAPIError, match="serialize") as raised:
            await connection.execute(sa.text(f"{update}1"))
    await engine.dispose()
    assert_outage(raised.value)


async def test_a_plan_made_before_a_migration_is_made_again(postgresql_url: str) -> None:
    """I7: A column that changed under an open connection is an outage of one attempt."""
    engine = create_engine(postgresql_url)
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE t (a int)"))
        await connection.execute(sa.text("SELECT * FROM t"))
    admin = await asyncpg.connect(postgresql_url)
    await admin.execute("ALTER TABLE t ALTER a TYPE text")
    await admin.close()
    async with engine.connect() as connection:
        with pytest.raises(sa.exc.DBAPIError) as raised:
            await connection.execute(sa.text("SELECT * FROM t"))
    assert_outage(raised.value)
    async with engine.connect() as connection:
        assert (await connection.execute(sa.text("SELECT * FROM t"))).all() == []
    await engine.dispose()


async def test_a_lot_dropped_under_the_worker_is_made_again(postgresql_store: Store) -> None:
    """I7: DROP OWNED takes the session's own table along: an outage of one attempt, and no lost schema."""
    dropped: list[str] = []

    def drop(_: object, cursor: Any, statement: str, *__: object) -> None:
        if statement.startswith("CREATE TEMPORARY TABLE"):
            dropped.append(statement)
            cursor.execute("DROP TABLE pg_temp.chunk_lot")

    await postgresql_store.write(known("run-1"))
    sa.event.listen(postgresql_store.transactions.engine, "after_cursor_execute", drop)
    with pytest.raises(asyncpg.UndefinedTableError, match="chunk_lot") as raised:
        await postgresql_store.write(lot("run-1", 1, 3))
    assert dropped
    assert_outage(raised.value)
    sa.event.remove(postgresql_store.transactions.engine, "after_cursor_execute", drop)
    await postgresql_store.write(lot("run-1", 1, 3))
    assert list(await postgresql_store.chunks("run-1")) == [1, 2, 3]


async def test_a_connection_killed_while_it_was_idle(postgresql_store: Store) -> None:
    """I3: Connections that were cut in the pool cost an attempt each at most, then writing works."""
    await postgresql_store.write(known("run-1"))
    admin = await asyncpg.connect(postgresql_store.url)
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'letta-ingest'"
        " AND datname = current_database()"
    )
    await admin.close()
    await asyncio.sleep(0.05)
    with pytest.raises(sa.exc.DBAPIError) as raised:
        await postgresql_store.write(known("run-2"))
    assert_outage(raised.value)
    await postgresql_store.write(known("run-2"))


async def test_a_server_that_is_away_is_waited_for(own_postgres: PostgresServer) -> None:
    """I3: A stopped server, one that cannot be found, and one with too many clients are outages."""
    url = own_postgres.create_database()
    admin = await asyncpg.connect(url)
    await admin.execute("CREATE ROLE one_at_a_time LOGIN CONNECTION LIMIT 0")
    assert_outage(await failure(url.replace("postgres@", "one_at_a_time@")))
    await admin.execute("DROP ROLE one_at_a_time")
    await admin.close()
    assert_outage(await failure("postgresql://user@no-such-host.invalid/db"))
    own_postgres.stop()
    try:
        assert_outage(await failure(url))
    finally:
        own_postgres.start()


# SQLite


async def test_a_locked_file_is_waited_for(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I4: A lock of another process passes."""
    monkeypatch.setattr("worker.storage.engine.BUSY_TIMEOUT_SECONDS", 0.05)
    locking = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
    locking += (
        "c.execute('PRAGMA journal_mode=WAL'); c.execute('BEGIN IMMEDIATE'); print('locked', flush=True); input()"
    )
    path = sqlite_url.removeprefix("sqlite:///")
    pipe = asyncio.subprocess.PIPE
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", locking, path, stdin=pipe, stdout=pipe)
    assert other.stdout is not None
    assert await other.stdout.readline() == b"locked\n"
    assert_outage(await failure(sqlite_url))
    await other.communicate(b"\n")


def tear(path: Path) -> None:
    """Make a database with a table `t` whose pages are garbage."""
    made = sqlite3.connect(path)
    made.execute("CREATE TABLE t (a)")
    made.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 100)
    made.commit()
    made.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * 8192 + whole[4096 + 8192 :])


async def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """I7: What is no database, and a database with torn pages, need an operator."""
    (tmp_path / "letter").write_bytes(b"this is a letter, not a database" * 200)
    not_ours = await failure(f"sqlite:///{tmp_path}/letter")
    assert_refusal(not_ours)
    assert "not a database" in describe(not_ours)
    tear(tmp_path / "torn.db")
    corrupt = await failure(f"sqlite:///{tmp_path}/torn.db", "SELECT * FROM t")
    assert_refusal(corrupt)
    assert "malformed" in describe(corrupt)


def test_a_file_that_cannot_be_written_now_is_waited_for(tmp_path: Path) -> None:
    """I3: A file that turned read-only, or cannot be opened at the moment, may come back."""
    path = tmp_path / "x.db"
    sqlite3.connect(path).close()
    reading = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly") as raised:
        reading.execute("CREATE TABLE t (a)")
    reading.close()
    assert_outage(raised.value)
    with pytest.raises(sqlite3.OperationalError, match="unable to open") as raised:
        sqlite3.connect(tmp_path / "missing" / "x.db")
    assert_outage(raised.value)


# What is said of an error


def test_a_connection_lost_under_a_statement_is_told_as_such() -> None:
    """The driver speaks of its own states then; an operator hears what happened, and it is waited out (I3)."""
    error = asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress")
    assert is_outage(error)
    assert describe(error).startswith("the connection was lost in the middle of a statement (InternalClientError: ")


TELLING: dict[str, tuple[str, object]] = {
    "a number too large": ("SELECT CAST(:value AS bigint)", 2**80),
    "text for a number": ("SELECT CAST(CAST(:value AS text) AS bigint)", SECRET),
    "a NUL": ("SELECT CAST(:value AS text)", SECRET + "\x00"),
    "a lone surrogate": ("SELECT CAST(:value AS text)", SECRET + "\ud800"),
    "a list for text": ("SELECT CAST(:value AS text)", [SECRET]),
    "no JSON": ("SELECT CAST(CAST(:value AS text) AS json)", SECRET),
    "no time": ("SELECT CAST(CAST(:value AS text) AS timestamptz)", SECRET),
}


@pytest.mark.parametrize("name", TELLING)
async def test_an_error_does_not_tell_what_agents_said_on_postgresql(postgresql_url: str, name: str) -> None:
    """I10: What is written about a value the database cannot take does not contain it."""
    statement, value = TELLING[name]
    error = await failure(postgresql_url, statement, value=value)
    assert not is_outage(error)
    assert SECRET not in describe(error)
    assert SECRET not in str(error).split("[SQL:")[-1]


async def test_an_error_does_not_tell_what_agents_said(store: Store) -> None:
    """I10: Neither the sentence nor SQLAlchemy's own text shows the values of a statement that failed."""
    unwritable = RunWrite("run-1", AT, "following", accepted([row(1, SECRET + "\ud800", step_id=SECRET)]))
    with pytest.raises((sa.exc.DBAPIError, UnicodeEncodeError)) as raised:
        await store.write(known("run-1"), unwritable)
    assert not is_outage(raised.value)
    assert not is_refusal(raised.value)
    assert SECRET not in describe(raised.value)
    broken = sa.text("INSERT INTO chunks (run_id, seq_id, payload) VALUES ('run-1', 1, :payload)")
    async with store.engine.connect() as connection:
        with pytest.raises(sa.exc.DBAPIError) as raised_too:
            await connection.execute(broken, {"payload": SECRET})
    assert SECRET not in describe(raised_too.value)
    assert SECRET not in str(raised_too.value).split("DETAIL")[0]
