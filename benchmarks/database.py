"""A fresh database for each measurement, on SQLite and PostgreSQL, and what is in it afterwards."""

import asyncio
import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg

from tests.support.postgres import PostgresServer

DATABASES = ("SQLite", "PostgreSQL")


@contextlib.contextmanager
def fresh(database: str, server: PostgresServer) -> Iterator[tuple[Path, str]]:
    """A folder of one's own, and the URL of an empty database that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="letta-ingest-bench-") as name:
        folder = Path(name)
        if database == "SQLite":
            yield folder, f"sqlite:///{folder / 'bench.db'}"
            return
        url = server.create_database()
        yield folder, url
        query(server.url("postgres"), f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run one statement; its rows."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as database:
            return database.execute(statement).fetchall()
    return asyncio.run(_on_postgresql(url, statement))


async def _on_postgresql(url: str, statement: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()
