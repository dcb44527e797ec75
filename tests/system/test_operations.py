"""What docs/operations.md tells an operator to do keeps the promise: backup, restore, listing again."""

from __future__ import annotations

import asyncio
import re
import shlex
import sqlite3
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from tests.support.shell import Shell, shell_on, talking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.postgres import PostgresServer

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
BACKUP_ROWS = 150


def documented(begin: str) -> str:
    """The command of the page that begins so."""
    (command,) = re.findall(rf"(?:^|`)({re.escape(begin)}[^`\n]*)(?:`|$)", PAGE, re.MULTILINE)
    return str(command)


@asynccontextmanager
async def working(folder: Path, url: str) -> AsyncIterator[Shell]:
    """Commands on this database and a server that talks."""
    async with shell_on(url, folder) as shell:
        assert (await shell.do("migrate")).code == 0
        yield shell


async def until_stored(shell: Shell, rows: int) -> None:
    """Wait until so much is stored."""
    async with asyncio.timeout(20):
        while await shell.rows() < rows:  # noqa: ASYNC110 - what another process does sets no event of ours
            await asyncio.sleep(0.05)


async def confirm_restored(shell: Shell) -> None:
    """The worker on the restored database brings it to all that the server has."""
    before = await shell.rows()
    assert (await shell.do("run", "--once")).code == 0
    assert before < await shell.rows()
    tally = await shell.tally()
    assert tally.is_exact, tally
    done = await shell.do("verify", "--server")
    assert done.code == 0, done.out


async def test_sqlite_backup_is_restored(tmp_path: Path) -> None:
    """I1, I2, I3: A backup made while the worker runs, restored later: every chunk is there again exactly once."""
    file = tmp_path / "letta-ingest.db"
    async with working(tmp_path, f"sqlite:///{file}") as shell:
        async with talking(shell.letta):
            life = shell.start("run")
            await until_stored(shell, BACKUP_ROWS)
            statement = documented("VACUUM INTO").replace("letta-ingest-backup.db", str(tmp_path / "backup.db"))
            with closing(sqlite3.connect(file)) as connection:
                connection.execute(statement)
            await until_stored(shell, await shell.rows() + BACKUP_ROWS)
            assert await shell.stop(life) == 0
        for name in ("letta-ingest.db-wal", "letta-ingest.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "backup.db").replace(file)
        await confirm_restored(shell)


async def test_postgresql_backup_is_restored(tmp_path: Path, postgres_server: PostgresServer) -> None:
    """I1, I2, I3: The same with pg_dump and pg_restore, into another database."""
    url = postgres_server.create_database()
    dump = postgres_server._root / f"{url.rpartition('/')[2]}.dump"
    connected = ("--host", "127.0.0.1", "--port", str(postgres_server.port), "--username", "postgres")

    def do(command: str, database: str) -> None:
        words = command.replace("letta-ingest.dump", str(dump)).replace("letta_ingest", database.rpartition("/")[2])
        program, *arguments = shlex.split(words)
        postgres_server._run(program, *connected, *arguments)

    async with working(tmp_path, url) as shell:
        async with talking(shell.letta):
            life = shell.start("run")
            await until_stored(shell, BACKUP_ROWS)
            do(documented("pg_dump"), url)
            await until_stored(shell, await shell.rows() + BACKUP_ROWS)
            assert await shell.stop(life) == 0
        shell.database_url = postgres_server.create_database()
        do(documented("pg_restore"), shell.database_url)
        await confirm_restored(shell)


async def test_runs_are_listed_again(tmp_path: Path, database_url: str) -> None:
    """I1: What somebody deleted comes back once the position is forgotten, and nothing else is touched."""
    async with working(tmp_path, database_url) as shell:
        async with talking(shell.letta):
            life = shell.start("run")
            await until_stored(shell, BACKUP_ROWS)
            await shell.stop(life)
        assert (await shell.do("run", "--once")).code == 0
        lost = next(iter(shell.letta.runs))
        tables = ("chunks", "gaps", "rejects", "messages", "streamed_messages", "runs")
        await execute(database_url, *(f"DELETE FROM {table} WHERE run_id = '{lost}'" for table in tables))
        assert f"MISSING  {lost}" in (await shell.do("verify", "--server")).out
        await execute(database_url, documented("DELETE FROM discovery"))
        assert (await shell.do("run", "--once")).code == 0
        assert (await shell.tally()).is_exact
        assert (await shell.do("verify", "--server")).code == 0


async def execute(url: str, *statements: str) -> None:
    """As an administrator."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file, file:
            for statement in statements:
                file.execute(statement)
        return
    connection = await asyncpg.connect(url)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()
