"""Connections: one engine per database, with the settings the promise rests on. Used by app.py and the commands."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import tenacity
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from worker.errors import RefusedError

BUSY_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 10.0
STATEMENT_TIMEOUT_SECONDS = 120.0

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}


def parse_url(text: str) -> URL:
    """The URL with the driver the worker uses. Raises ValueError with what would be right."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise ValueError('not a database URL; write "sqlite:///letta-ingest.db" or "postgresql://..."') from None
    driver = _DRIVERS.get(url.drivername.split("+")[0])
    if driver is None:
        raise ValueError(f'"{url.drivername}" is not supported; write "sqlite:///..." or "postgresql://..."')
    if driver.startswith("sqlite") and url.database in {None, "", ":memory:"}:
        raise ValueError('a database in memory would lose everything; write "sqlite:///letta-ingest.db"')
    return url.set(drivername=driver)


def create_engine(text: str) -> AsyncEngine:
    """An engine for a URL as it stands in the configuration. Opens no connection yet."""
    url = parse_url(text)
    return _sqlite_engine(url) if url.get_backend_name() == "sqlite" else _postgresql_engine(url)


def is_sqlite(engine: AsyncEngine) -> bool:
    """The database is a file of ours, which the worker upgrades by itself."""
    return engine.dialect.name == "sqlite"


def _postgresql_engine(url: URL) -> AsyncEngine:
    query = dict(url.query)
    settings: dict[str, Any] = {"server_settings": {"application_name": "letta-ingest", "timezone": "UTC"}}
    # libpq's word, which every operator knows; asyncpg takes the same values under another name.
    if "sslmode" in query:
        settings["ssl"] = query.pop("sslmode")
    return create_async_engine(
        url.set(query=query),
        pool_size=4,
        max_overflow=0,
        pool_recycle=1800,
        connect_args={"timeout": CONNECT_TIMEOUT_SECONDS, "command_timeout": STATEMENT_TIMEOUT_SECONDS, **settings},
    )


def _sqlite_engine(url: URL) -> AsyncEngine:
    engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}, pool_size=4, max_overflow=0)
    path = Path(url.database or "")

    @sa.event.listens_for(engine.sync_engine, "do_connect")
    def create_private(*_: object) -> None:
        # What agents said is nobody else's business: SQLite itself would create the file readable for all.
        if not path.exists():
            try:
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise RefusedError(f"cannot create the database {path}: {error.strerror}") from error

    @sa.event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, and by nobody else
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # IMMEDIATE: a transaction that turned writer half way would fail where waiting was possible.
        mode = "DEFERRED" if connection.get_execution_options().get("reads_only") else "IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


_REFUSING_SQLSTATES = ("28", "3D", "42", "0A", "3F")
"""Classes: authorization, unknown database, access rule or undefined table, unsupported, unknown schema."""
_REFUSING_SQLITE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_PERM})
_WAITING_SQLITE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
    }
)


def is_refusal(error: BaseException) -> bool:
    """Waiting does not help: wrong credentials, no such database or table, no right, a corrupt file."""
    cause = _driver_error(error)
    if isinstance(cause, RefusedError):
        return True
    if isinstance(cause, sqlite3.Error):
        return (
            _sqlite_code(cause) in _REFUSING_SQLITE or "no such table" in str(cause) or "no such column" in str(cause)
        )
    return str(getattr(cause, "sqlstate", None) or "").startswith(_REFUSING_SQLSTATES)


def is_outage(error: BaseException) -> bool:
    """Waiting may help: the database is away, full, busy, read-only or aborted the transaction."""
    cause = _driver_error(error)
    if isinstance(cause, sqlite3.Error):
        return _sqlite_code(cause) in _WAITING_SQLITE
    sqlstate = getattr(cause, "sqlstate", None)
    if sqlstate is None:
        return isinstance(
            cause, OSError | TimeoutError | sa.exc.TimeoutError | sa.exc.InterfaceError | ConnectionError
        ) or (type(cause).__module__.startswith("asyncpg"))
    return str(sqlstate)[:2] in {"08", "25", "40", "53", "54", "55", "57", "58", "XX"}


def outage_retries(
    before_sleep: Callable[[tenacity.RetryCallState], None] | None = None,
    stop: tenacity.stop.stop_base | Callable[[tenacity.RetryCallState], bool] = tenacity.stop_never,
) -> tenacity.AsyncRetrying:
    """Attempts against a database that is away; every other error goes straight through."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(is_outage),
        wait=tenacity.wait_exponential_jitter(initial=0.1, max=15, jitter=0.5),
        stop=stop,
        before_sleep=before_sleep,
        reraise=True,
    )


def describe(error: BaseException) -> str:
    """The driver's own sentence, without the statement and its values: they hold what agents said."""
    cause = _driver_error(error)
    return f"{type(cause).__name__}: {cause}".splitlines()[0][:300]


def _driver_error(error: BaseException) -> BaseException:
    """The error of sqlite3 or asyncpg below SQLAlchemy's wrapping."""
    cause: BaseException = error
    if isinstance(cause, sa.exc.DBAPIError) and cause.orig is not None:
        cause = cause.orig
    while cause.__cause__ is not None and not isinstance(cause, sqlite3.Error):
        cause = cause.__cause__
    return cause


def _sqlite_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
