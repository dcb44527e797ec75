"""The schema: what the migrations make, what the worker says of any other, and upgrading by two at once."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from worker.errors import RefusedError
from worker.storage import schema
from worker.storage.engine import create_engine, is_outage, is_sqlite
from worker.storage.tables import metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

HEAD = "0002"


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine on an empty database."""
    made = create_engine(database_url)
    yield made
    await made.dispose()


async def definitions(engine: AsyncEngine) -> set[tuple[str, ...]]:
    """Every column, constraint and index as the database itself describes it; views are what the queries test."""
    if is_sqlite(engine):
        query = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' AND type <> 'view'"
    else:
        query = (
            "SELECT table_name, column_name, concat_ws(' ', data_type, is_nullable, column_default)"
            " FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)"
            " WHERE table_schema = 'public' AND table_type = 'BASE TABLE'"
            " UNION ALL SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = 'public'::regnamespace AND contype <> 'n'"
            " UNION ALL SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
        )
    async with engine.connect() as connection:
        found = await connection.execute(sa.text(query))
        return {tuple(_plain(value) for value in row) for row in found if "alembic_version" not in str(row)}


def _plain(value: Any) -> str:
    """One spelling for what differs only in white space, quotes or the order of what a table consists of."""
    text = re.sub(r"\s+", " ", str(value)).replace('"', "").strip()
    if text.startswith("CREATE TABLE"):
        head, _, body = text.partition("(")
        return head + "|".join(sorted(part.strip(" )(") for part in re.split(r", (?![^(]*\))", body)))
    return text


async def test_the_migrations_make_what_the_code_uses(engine: AsyncEngine) -> None:
    """I7: Upgrading an empty database gives the tables of tables.py: columns, keys, checks and indexes."""
    assert await schema.upgrade(engine) == (None, HEAD)
    async with engine.connect() as connection:
        found = await connection.run_sync(
            lambda c: compare_metadata(
                MigrationContext.configure(c, opts={"compare_type": True, "compare_server_default": True}), metadata
            )
        )
    assert found == []
    migrated = await definitions(engine)
    async with engine.begin() as connection:
        await connection.run_sync(lambda c: command.downgrade(_config(c), "base"))
        assert await connection.run_sync(lambda c: sa.inspect(c).get_table_names()) == ["alembic_version"]
        await connection.run_sync(metadata.create_all)
    assert await definitions(engine) == migrated


def _config(connection: sa.Connection) -> Any:
    config = schema._alembic_config()
    config.attributes["connection"] = connection
    return config


async def test_down_and_up_again(engine: AsyncEngine) -> None:
    """I7: A downgrade leaves nothing behind, and upgrading afterwards gives the same schema."""
    await schema.upgrade(engine)
    first = await definitions(engine)
    async with engine.begin() as connection:
        await connection.run_sync(lambda c: command.downgrade(_config(c), "base"))
    assert await definitions(engine) == set()
    assert await schema.current_revision(engine) is None
    assert await schema.upgrade(engine) == (None, HEAD)
    assert await definitions(engine) == first


async def test_upgrading_twice_is_harmless(engine: AsyncEngine) -> None:
    """I7: An upgrade of a current schema does nothing and says so."""
    await schema.upgrade(engine)
    async with engine.begin() as connection:
        await connection.execute(
            sa.text("INSERT INTO discovery (scope, updated_at) VALUES ('*', '2026-01-01 00:00:00')")
        )
    assert await schema.upgrade(engine) == (HEAD, HEAD)
    await schema.require_current(engine)
    async with engine.connect() as connection:
        assert (await connection.execute(sa.text("SELECT count(*) FROM discovery"))).scalar() == 1


async def test_an_empty_database_is_told_apart(engine: AsyncEngine) -> None:
    """I7: A database without a schema is refused with the command that makes one."""
    with pytest.raises(RefusedError, match="no letta-ingest schema yet: run `letta-ingest migrate`"):
        await schema.require_current(engine)


async def test_an_unknown_schema_is_refused(engine: AsyncEngine) -> None:
    """I7: A schema of a newer version, or of another program, is neither used nor touched."""
    await schema.upgrade(engine)
    async with engine.begin() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    before = await definitions(engine)
    for attempt in (schema.require_current, schema.upgrade):
        with pytest.raises(RefusedError, match=r"9999.*unknown to this letta-ingest.*newer.*another program"):
            await attempt(engine)
    assert await definitions(engine) == before


def with_another_step(tmp_path: Path, body: str) -> Path:
    """The migrations as a next version may bring them."""
    migrations = tmp_path / "migrations"
    shutil.copytree(schema._migrations(), migrations, ignore=shutil.ignore_patterns("__pycache__"))
    (migrations / "versions" / "0003_next.py").write_text(
        f'from alembic import op\nrevision = "0003"\ndown_revision = "{HEAD}"\n\ndef upgrade():\n    {body}\n'
    )
    return migrations


async def test_an_old_schema_is_upgraded(engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I7: A schema of an older version is refused with the command that helps, and that command helps."""
    await schema.upgrade(engine)
    migrations = with_another_step(tmp_path, 'op.execute("CREATE TABLE more (a int)")')
    monkeypatch.setattr(schema, "_migrations", lambda: migrations)
    with pytest.raises(RefusedError, match="is at 0002, this version needs 0003: run `letta-ingest migrate`"):
        await schema.require_current(engine)
    assert await schema.upgrade(engine) == (HEAD, "0003")
    await schema.require_current(engine)


async def test_what_the_first_schema_held_is_kept(engine: AsyncEngine) -> None:
    """I1: A database of the first schema keeps its rows through the upgrade, and the views show them."""
    async with engine.begin() as connection:
        await connection.run_sync(lambda c: command.upgrade(_config(c), "0001"))
        now = "'2026-01-01 00:00:00'"
        await connection.execute(
            sa.text(
                "INSERT INTO runs (run_id, conversation_id, created_at, state, last_seq_id, chunk_count, discovered_at,"
                f" updated_at, settled_at) VALUES ('run-1', 'conv-1', {now}, 'complete', 3, 3, {now}, {now}, {now})"
            )
        )
        await connection.execute(
            sa.text(
                "INSERT INTO messages (run_id, message_id, part, position, message_type, text, payload, stored_at)"
                f" VALUES ('run-1', 'message-1', 'user_message', 0, 'user_message', 'hi', '{{}}', {now})"
            )
        )
    assert await schema.upgrade(engine) == ("0001", HEAD)
    await schema.require_current(engine)
    async with engine.connect() as connection:
        said = await connection.execute(sa.text("SELECT speaker, text, completeness FROM transcript"))
        assert [tuple(row) for row in said] == [("user", "hi", "complete")]


async def test_an_upgrade_that_fails_leaves_nothing(
    engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I7: All steps of an upgrade are one transaction: where one fails, the database stays as it was."""
    migrations = with_another_step(tmp_path, 'op.execute("CREATE TABLE more (a int)"); op.execute("SELECT 1 FROM no")')
    monkeypatch.setattr(schema, "_migrations", lambda: migrations)
    with pytest.raises(sa.exc.DBAPIError):
        await schema.upgrade(engine)
    assert await schema.current_revision(engine) is None
    assert await definitions(engine) == set()


UPGRADE = """
import asyncio, sys
from worker.storage import schema
from worker.storage.engine import create_engine
async def main():
    engine = create_engine(sys.argv[1])
    sys.stdin.readline()
    await schema.upgrade(engine)
    await schema.require_current(engine)
    await engine.dispose()
asyncio.run(main())
"""


async def test_two_processes_upgrade_at_once(database_url: str) -> None:
    """I4: Of workers that upgrade the same database at the same moment none fails."""
    pipe = asyncio.subprocess.PIPE
    racers = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", UPGRADE, database_url, stdin=pipe, stderr=pipe)
        for _ in range(2)
    ]
    ended = await asyncio.gather(*(racer.communicate(b"\n") for racer in racers))
    assert [racer.returncode for racer in racers] == [0, 0], ended


async def test_a_forgotten_session_does_not_block_an_upgrade_for_ever(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I7: Waiting for another upgrade has an end, which is an outage like any other."""
    migrations = with_another_step(tmp_path, "pass")
    environment = (migrations / "env.py").read_text()
    assert environment.count("'30s'") == 1
    (migrations / "env.py").write_text(environment.replace("'30s'", "'50ms'"))
    monkeypatch.setattr(schema, "_migrations", lambda: migrations)
    forgotten = await asyncpg.connect(postgresql_url)
    await forgotten.execute(
        "SELECT pg_advisory_lock($1)", int(re.findall("LOCK_KEY = (0x[0-9A-F]+)", environment)[0], 16)
    )
    engine = create_engine(postgresql_url)
    with pytest.raises(sa.exc.DBAPIError, match="lock timeout") as raised:
        await schema.upgrade(engine)
    assert is_outage(raised.value)
    await forgotten.close()
    assert await schema.upgrade(engine) == (None, "0003")
    await engine.dispose()


async def test_a_server_that_does_not_let_us_in_is_told(postgresql_url: str) -> None:
    """I7: Credentials the server refuses are one sentence, not a traceback."""
    engine = create_engine(postgresql_url.replace("postgres@", "stranger@"))
    with pytest.raises(RefusedError, match=r'the database refuses us: .*role "stranger" does not exist'):
        await schema.require_current(engine)
    await engine.dispose()


def test_the_migrations_are_found_wherever_the_package_lies(tmp_path: Path) -> None:
    """I7: An installed package has its migrations inside; they are found and they work from any directory."""
    site = tmp_path / "site"
    root = Path(schema.__file__).parents[2]
    shutil.copytree(root / "worker", site / "worker", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(schema._migrations(), site / "worker" / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    program = f"import sys; sys.path.insert(0, {str(site)!r})\n{UPGRADE}\nprint(schema._migrations(), schema.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program, f"sqlite:///{tmp_path}/x.db"],
        check=True,
        cwd=tmp_path,
        input="\n",
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [f"{site}/worker/migrations", f"{site}/worker/storage/schema.py"]
