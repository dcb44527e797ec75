"""Connections: one engine per database, with the settings the promise rests on. Used by app.py and the commands."""

import os
import sqlite3
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import asyncpg
import sqlalchemy as sa
import tenacity
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from worker.errors import RefusedError, WorkerError

BUSY_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 10.0
STATEMENT_TIMEOUT_SECONDS = 45.0
"""Shorter than monitor.STUCK_SECONDS: a commit that hangs is an outage first, and a stuck worker only then."""
GOODBYE_SECONDS = 5.0
"""A dead link would keep a polite goodbye waiting until the statement timeout."""
IDLE_TRANSACTION_SECONDS = 15.0
"""PostgreSQL takes its locks from a worker that falls silent in a transaction (stopped, or its machine is gone): the
next worker would wait for them for as long as the first one's connection seems to live."""

OLDEST_SQLITE = (3, 33)
"""The first that can move many cursors in one statement (UPDATE FROM); of August 2020."""

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_SSL_PARAMETERS = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl")
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}


def parse_url(text: str) -> URL:
    """The URL with the driver the worker uses. Raises ValueError with what would be right."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        raise ValueError('not a database URL; write "sqlite:///letta-ingest.db" or "postgresql://..."') from None
    driver = _DRIVERS.get(url.drivername.split("+")[0])
    if driver is None:
        raise ValueError(f'"{url.drivername}" is not supported; write "sqlite:///..." or "postgresql://..."')
    if driver.startswith("sqlite") and url.database in {None, "", ":memory:"}:
        raise ValueError('a database in memory would lose everything; write "sqlite:///letta-ingest.db"')
    if url.get_backend_name() != "sqlite" and text.count("@") > 1:
        # What follows the first one in a password would be taken for the host, and shown as such (I10).
        raise ValueError("an @ in the user's name or the password must be written %40")
    _check_parameters(url)
    return url.set(drivername=driver)


def _check_parameters(url: URL) -> None:
    """Refuse what nobody would obey: a misspelt sslmode must not mean no encryption."""
    known = () if url.get_backend_name() == "sqlite" else _SSL_PARAMETERS
    if unknown := sorted(url.query.keys() - set(known)):
        right = f"only {', '.join(known)} can be set" if known else "a SQLite URL has none"
        raise ValueError(f'the database URL has the unknown parameter "{unknown[0]}"; {right}')
    if url.query.get("sslmode", "prefer") not in _SSL_MODES:
        raise ValueError(f"sslmode must be one of {', '.join(_SSL_MODES)}")


def create_engine(text: str) -> AsyncEngine:
    """An engine for a URL as it stands in the configuration. Opens no connection yet."""
    url = parse_url(text)
    # Asked first, because who reads should not hear of a connection that the server has dropped meanwhile.
    return _sqlite_engine(url) if url.get_backend_name() == "sqlite" else _postgresql_engine(url, pings=True)


def is_sqlite(engine: AsyncEngine | sa.Engine) -> bool:
    """The database is a file of ours, which the worker upgrades by itself."""
    return engine.dialect.name == "sqlite"


def _postgresql_engine(url: URL, *, pings: bool) -> AsyncEngine:
    engine = create_async_engine(
        url.set(query={}),
        pool_size=4,
        max_overflow=0,
        pool_recycle=1800,
        pool_pre_ping=pings,
        hide_parameters=True,
        connect_args={
            # libpq's parameters, which every operator knows; asyncpg takes them from a DSN only.
            "dsn": f"postgresql://?{urlencode(url.query)}" if url.query else None,
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": STATEMENT_TIMEOUT_SECONDS,
            "server_settings": {
                "application_name": "letta-ingest",
                "timezone": "UTC",
                "idle_in_transaction_session_timeout": f"{IDLE_TRANSACTION_SECONDS:.0f}s",
            },
        },
    )

    @sa.event.listens_for(engine.sync_engine, "connect")
    def require_unicode(connection: Any, _: object) -> None:
        encoding = connection.driver_connection.get_settings().server_encoding
        if encoding != "UTF8":
            raise RefusedError(
                f"the database's encoding is {encoding}, which cannot hold all that agents say:"
                " make one with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
            )

    @sa.event.listens_for(engine.sync_engine, "handle_error")
    def leave_standby(context: sa.ExceptionContext) -> None:
        # A server that is a standby now stays one for who is connected: only a new connection finds the new primary.
        if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
            context.is_disconnect = True

    return engine


def _sqlite_engine(url: URL) -> AsyncEngine:
    engine = create_async_engine(
        url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}, pool_size=4, max_overflow=0, hide_parameters=True
    )
    _prepare_sqlite(engine.sync_engine)
    return engine


def create_writing_engine(text: str) -> AsyncEngine | sa.Engine:
    """An engine for a thread that waits for nothing else: for a SQLite file one that keeps it waiting itself."""
    url = parse_url(text)
    if url.get_backend_name() != "sqlite":
        return _postgresql_engine(url, pings=False)
    engine = sa.create_engine(
        url.set(drivername="sqlite"),
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS},
        pool_size=1,
        max_overflow=0,
        hide_parameters=True,
    )
    _prepare_sqlite(engine)
    return engine


def _prepare_sqlite(engine: sa.Engine) -> None:
    path = Path(engine.url.database or "")
    identity: _Identity | None = None

    @sa.event.listens_for(engine, "do_connect")
    def prepare(*_: object) -> None:
        nonlocal identity
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            needed = ".".join(map(str, OLDEST_SQLITE))
            raise RefusedError(
                f"this Python has SQLite {sqlite3.sqlite_version}, and {needed} is needed: take a newer one"
            )
        if identity is None:
            _make_private(path)
            identity = _identity(path)
        _require_same(path, identity)

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, and by nobody else
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        _require_same(path, identity)
        # IMMEDIATE: a transaction that turned writer half way would fail where waiting was possible.
        mode = "DEFERRED" if connection.get_execution_options().get("reads_only") else "IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN {mode}")


def _make_private(path: Path) -> None:
    """What agents said is nobody else's business: SQLite itself would create the file readable for all."""
    try:
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        # Not opened to find out: closing it again would drop the locks SQLite holds on it in this process.
        elif path.is_dir() or not os.access(path, os.R_OK | os.W_OK):
            raise RefusedError(f"cannot use the database {path}: not a file this user may read and write")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise RefusedError(f"cannot use the database {path}: SQLite keeps files beside it, and may not write there")
    except OSError as error:
        raise RefusedError(f"cannot create the database {path}: {error.strerror}") from error


_Identity = tuple[int, int]


def _identity(path: Path) -> _Identity | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _require_same(path: Path, identity: _Identity | None) -> None:
    """SQLite goes on writing into a file that was deleted, and says nothing: all of it would be lost."""
    if _identity(path) != identity:
        raise RefusedError(
            f"the database {path} was deleted, moved or replaced under the running worker: put it back, or start again"
            " without it, and what the server still has is read again"
        )


_REFUSING_SQLSTATES = ("28", "3D", "42", "0A", "3F", "XX001", "XX002")
"""Authorization, unknown database, access rule or undefined table, unsupported, unknown schema, corrupt data."""
_WAITING_SQLSTATES = frozenset({"08", "25", "40", "53", "54", "55", "57", "58", "XX"})
"""Connection, read-only, rolled back, resources, limits, lock or startup, operator, system, internal."""
_READ_ONLY, _PROGRAM_LIMIT = "25006", "54000"
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
    if isinstance(cause, sqlite3.Error):
        return (
            _sqlite_code(cause) in _REFUSING_SQLITE or "no such table" in str(cause) or "no such column" in str(cause)
        )
    if _is_of_the_session(cause):
        return False
    return (
        isinstance(cause, RefusedError | asyncpg.ClientConfigurationError | ssl.SSLCertVerificationError)
        or (isinstance(cause, ConnectionError) and "rejected SSL upgrade" in str(cause))
        or str(getattr(cause, "sqlstate", None) or "").startswith(_REFUSING_SQLSTATES)
    )


def is_outage(error: BaseException) -> bool:
    """Waiting may help: the database is away, full, busy, read-only or aborted the transaction."""
    cause = _driver_error(error)
    if is_refusal(cause):
        return False
    if isinstance(cause, sqlite3.Error):
        return _sqlite_code(cause) in _WAITING_SQLITE
    sqlstate = getattr(cause, "sqlstate", None)
    if sqlstate is None:
        is_drivers = type(cause).__module__.startswith("asyncpg")
        return is_drivers or isinstance(cause, OSError | TimeoutError | sa.exc.TimeoutError)
    if sqlstate == _PROGRAM_LIMIT and getattr(cause, "table_name", None):  # the row's fault: an index cannot hold it
        return False
    return _is_of_the_session(cause) or str(sqlstate)[:2] in _WAITING_SQLSTATES


def _is_of_the_session(cause: BaseException) -> bool:
    """The database is sound, and the next attempt works: somebody has migrated, or dropped the session's own table."""
    return isinstance(cause, asyncpg.InvalidCachedStatementError) or (
        isinstance(cause, asyncpg.UndefinedTableError) and "pg_temp." in str(cause)
    )


def is_timeout(error: BaseException) -> bool:
    """The database, or the way to it, took longer than somebody waits for one statement; less at a time may do."""
    return isinstance(_driver_error(error), TimeoutError | asyncpg.QueryCanceledError)


def outage_retries(
    before_sleep: Callable[[tenacity.RetryCallState], None] | None = None,
    stop: tenacity.stop.stop_base | Callable[[tenacity.RetryCallState], bool] = tenacity.stop_never,
) -> tenacity.AsyncRetrying:
    """Attempts against a database that is away; every other error goes straight through."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(is_outage),
        wait=tenacity.wait_exponential(multiplier=0.1, max=15) + tenacity.wait_random(0, 0.5),
        stop=stop,
        before_sleep=before_sleep,
        reraise=True,
    )


_RESTORE = "restore it from a backup, or make a new database: what the server still has is read again"
_REMEDIES = {
    "28": "check the user and the password in storage.url",
    "3D": "create it, or name another one in storage.url",
    "42501": "grant what docs/postgresql.md lists",
    "42": _RESTORE,
    "3F": _RESTORE,
    "XX00": _RESTORE,
    "SQLITE_": _RESTORE,
}
"""What an operator can do about a refusal, by how its state begins; the first that fits."""


def describe(error: BaseException) -> str:
    """The driver's own sentence, without the statement and its values: they hold what agents said. And what helps."""
    cause = _driver_error(error)
    if isinstance(cause, WorkerError):
        return str(cause)
    name, sqlstate = type(cause).__name__, str(getattr(cause, "sqlstate", None) or "")
    if sqlstate.startswith("22"):  # PostgreSQL quotes the value it could not take
        return f"{name} ({sqlstate})"
    said = f"{name}: {cause}".splitlines()[0][:300] if str(cause) else name
    if isinstance(cause, asyncpg.InternalClientError):  # the driver means its own bookkeeping
        said = f"the connection was lost in the middle of a statement ({said})"
    state = sqlstate or str(getattr(cause, "sqlite_errorname", ""))
    remedies = [remedy for start, remedy in _REMEDIES.items() if state.startswith(start)] if is_refusal(cause) else []
    return f"{said}; {remedies[0]}" if remedies else said


def _driver_error(error: BaseException) -> BaseException:
    """The error of sqlite3 or asyncpg below SQLAlchemy's wrapping, or our own."""
    cause: BaseException = error
    if isinstance(cause, sa.exc.DBAPIError) and cause.orig is not None:
        cause = cause.orig
    # A TimeoutError may have the cancellation as its cause that brought it about: it is an end, and no error.
    while isinstance(cause.__cause__, Exception) and not isinstance(cause, sqlite3.Error | WorkerError):
        cause = cause.__cause__
    return cause


def _sqlite_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
