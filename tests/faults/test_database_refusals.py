"""Databases in trouble that does not pass: the process ends with one sentence that says what to do, and exit code 3.

Once somebody has mended it, the next start has everything the server still serves; nothing was stored half.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pwd
import re
import sqlite3
import tempfile
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.database_faults import asyncpg_connection, postgres_database
from tests.storage.test_grants import documented_grants
from tests.support.shell import Shell, shell_on, talking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.faults.database_faults import Postgres
    from tests.support.lives import Life
    from tests.support.postgres import PostgresServer

STORED = 40
"""So many chunks are stored before anything breaks."""


async def last_words(shell: Shell, life: Life) -> str:
    """Wait until a life ends as it should: exit code 3, and behind the log one sentence to the operator."""
    assert await life.wait(30) == 3
    lines = (shell.folder / f"{shell.lives.index(life) + 1}.err").read_text().splitlines()
    assert [line for line in lines if line.startswith("letta-ingest: ")] == lines[-1:]
    assert "Traceback" not in "".join(lines)
    return lines[-1]


async def break_and_mend(
    shell: Shell, broken: Callable[[], Awaitable[None]], said: str, mended: Callable[[], Awaitable[None]]
) -> None:
    """Break the database under a running worker, read its last words; mend it, and start again."""
    async with talking(shell.letta, speakers=3):
        life = shell.start("run")
        await shell.until_logged(life, "worker.started")
        async with asyncio.timeout(30):
            while await shell.rows() < STORED:  # noqa: ASYNC110 - it happens in another process
                await asyncio.sleep(0.05)
        await broken()
        assert re.search(said, await last_words(shell, life))
    await mended()
    done = await shell.do("run", "--once")
    assert done.code == 0, done.err
    tally = await shell.tally()
    assert tally.is_exact, tally


# PostgreSQL

RESTORE = r".*; restore it from a backup, or make a new database"


@dataclass(frozen=True)
class Breakage:
    """What an administrator does, how the worker calls it, and what mends it. From outside: not in the database."""

    broken: tuple[str, ...]
    said: str
    mended: tuple[str, ...] = ()
    is_new: bool = False
    """It is mended by making everything anew."""


END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'letta-ingest'"
BREAKAGES = {
    "a privilege revoked": Breakage(
        ("REVOKE INSERT ON chunks FROM {role}",),
        "permission denied for table chunks; grant what docs/postgresql.md lists",
        ("GRANT INSERT ON chunks TO {role}",),
    ),
    "the role locked out": Breakage(
        ("ALTER ROLE {role} NOLOGIN", END),
        'role ".*" is not permitted to log in; check the user and the password',
        ("ALTER ROLE {role} LOGIN",),
    ),
    "the role dropped": Breakage(
        ("DROP OWNED BY {role}", "DROP ROLE {role}", END),
        # Which of the two it meets first is chance.
        'role ".*" does not exist; check the user and the password|permission denied for',
        ("CREATE ROLE {role} LOGIN", "GRANTS"),
    ),
    "a table dropped": Breakage(
        ("DROP TABLE chunks CASCADE",),
        f'relation "chunks" does not exist{RESTORE}',
        ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public"),
        is_new=True,
    ),
}
RARE = ("the role locked out", "a table dropped")


async def grant(database: Postgres) -> None:
    """Give the worker's role what the documentation lists."""
    await database.do(*(statement.replace("letta_ingest", "{role}") for statement in documented_grants()))


@asynccontextmanager
async def granted(server: PostgresServer, folder: Path) -> AsyncIterator[tuple[Postgres, Shell]]:
    """A migrated database, and commands that run as a role that has what the documentation lists."""
    async with postgres_database(server) as database, shell_on(database.url, folder) as shell:
        await database.do("ALTER DATABASE {name} OWNER TO postgres")
        assert (await shell.do("migrate")).code == 0
        await grant(database)
        shell.database_url = database.worker_url
        yield database, shell


async def make_anew(database: Postgres, shell: Shell) -> None:
    """Make the schema, and grant its tables."""
    shell.database_url = database.url
    assert (await shell.do("migrate")).code == 0
    await grant(database)
    shell.database_url = database.worker_url


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.campaign if name in RARE else ()) for name in BREAKAGES]
)
async def test_postgresql_that_refuses(postgres_server: PostgresServer, tmp_path: Path, name: str) -> None:
    """What only an operator can mend ends the worker with the reason and exit code 3, and costs no chunk (I3, I7)."""
    breakage = BREAKAGES[name]
    async with granted(postgres_server, tmp_path) as (database, shell):

        async def mend() -> None:
            await database.do(*(statement for statement in breakage.mended if statement != "GRANTS"))
            if breakage.is_new:
                await make_anew(database, shell)
            if "GRANTS" in breakage.mended:
                await grant(database)

        await break_and_mend(shell, lambda: database.do(*breakage.broken), breakage.said, mend)


async def test_a_database_that_is_dropped(postgres_server: PostgresServer, tmp_path: Path) -> None:
    """The same where the whole database is gone: the worker names it (I7)."""
    async with granted(postgres_server, tmp_path) as (database, shell):
        name = database.name
        async with asyncpg_connection(postgres_server.url("postgres")) as admin:

            async def drop() -> None:
                await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

            async def create() -> None:
                await admin.execute(f"CREATE DATABASE {name}")
                async with asyncpg_connection(database.url) as database.admin:
                    await make_anew(database, shell)

            await break_and_mend(shell, drop, f'database "{name}" does not exist; create it', create)


# SQLite


def overwrite(path: Path) -> None:
    """The disk has put garbage behind the first page. What is in the log beside the file does not hide it."""
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            pass
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))


def delete(path: Path) -> None:
    """Somebody cleans up."""
    path.unlink()


def replace(path: Path) -> None:
    """Somebody puts another file in its place."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


def drop_table(path: Path) -> None:
    """Somebody plays with it."""
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        connection.execute("DROP TABLE chunks")


MOVED = "deleted, moved or replaced under the running worker: put it back, or start again without it"
SQLITE_BREAKAGES = {
    "corrupt": (overwrite, f"malformed{RESTORE}"),
    "deleted": (delete, MOVED),
    "replaced": (replace, MOVED),
    "a table dropped": (drop_table, f"no such table: chunks{RESTORE}"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.campaign if name in {"replaced", "a table dropped"} else ())
        for name in SQLITE_BREAKAGES
    ],
)
async def test_sqlite_that_refuses(tmp_path: Path, name: str) -> None:
    """The same on SQLite, also where SQLite itself would go on writing into a file nobody will find (I7)."""
    break_it, said = SQLITE_BREAKAGES[name]
    path = tmp_path / "letta-ingest.db"
    async with shell_on(f"sqlite:///{path}", tmp_path) as shell:

        async def broken() -> None:
            break_it(path)

        async def begin_anew() -> None:
            for file in tmp_path.glob("letta-ingest.db*"):  # noqa: ASYNC240 - nothing else runs
                file.unlink()

        await break_and_mend(shell, broken, said, begin_anew)


def garble(path: Path) -> None:
    """A file that is something else."""
    path.write_bytes(b"this is a letter, not a database" * 200)


def close_folder(path: Path) -> None:
    """A folder in which nothing can be made."""
    path.parent.chmod(0o555)


def close_file(path: Path) -> None:
    """A file that can only be read."""
    path.chmod(0o444)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (garble, f"file is not a database{RESTORE}"),
        (close_folder, "SQLite keeps files beside it, and may not write there"),
        (close_file, "not a file this user may read and write"),
    ],
)
async def test_a_file_that_cannot_be_used_from_the_start(spoil: Callable[[Path], None], said: str) -> None:
    """What is wrong before the start is said at the start (I7)."""
    # Root may do everything; but who may do what is asked of the kernel for the real user, whom we can change.
    user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.getuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)  # noqa: ASYNC240 - nothing else runs
        path = Path(folder) / "data" / "letta-ingest.db"
        path.parent.mkdir()
        path.touch()
        path.chmod(0o666)
        path.parent.chmod(0o777)
        spoil(path)
        async with shell_on(f"sqlite:///{path}", Path(folder)) as shell:
            life = shell.start("run", prepare=functools.partial(os.setresuid, user, -1, -1))
            assert re.search(said, await last_words(shell, life))
        path.parent.chmod(0o777)
