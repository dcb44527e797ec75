"""A PostgreSQL role with no more than what docs/postgresql.md grants can run, and can do no harm."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest
import sqlalchemy as sa

from tests.storage.store import AT, RecordingLog, Store, accepted, known, later, lot, row
from tests.storage.test_atomic import EVERYTHING
from worker.errors import RefusedError
from worker.metrics import Metrics
from worker.storage import schema
from worker.storage.committer import Committer
from worker.storage.reads import Reads
from worker.storage.writes import RunWrite, SweepWrite

DOCUMENT = Path(__file__).parents[2] / "docs" / "postgresql.md"


def documented_grants() -> list[str]:
    """The GRANT statements as they are printed."""
    return re.findall(r"^    (GRANT .*;)$", DOCUMENT.read_text(), re.MULTILINE)


async def as_documented(url: str, *, without: str | None = None) -> str:
    """Do what the document says, but one grant; return the URL of the role that runs."""
    admin = await asyncpg.connect(url)
    try:
        await admin.execute("DROP ROLE IF EXISTS letta_ingest")
        await admin.execute("CREATE ROLE letta_ingest LOGIN")
        # A careful administrator has taken away what PostgreSQL gives to everybody.
        await admin.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        for grant in documented_grants():
            if grant != without:
                await admin.execute(grant)
    finally:
        await admin.close()
    return url.replace("postgres@", "letta_ingest@")


async def forget(url: str) -> None:
    """Remove the role, which belongs to the whole server."""
    admin = await asyncpg.connect(url)
    await admin.execute("DROP OWNED BY letta_ingest; DROP ROLE letta_ingest")
    await admin.close()


async def do_everything(url: str) -> None:
    """All that a running worker ever does to its database."""
    store = Store(url)
    try:
        await schema.require_current(store.engine)
        late = RunWrite("run-1", later(9), None, accepted([row(7), row(8)], cursor=9, count=9, late=True))
        writes = [known("run-1"), *EVERYTHING, late, SweepWrite(AT, (), dropped_scopes=["all"]), lot("run-3", 1, 2)]
        async with store.transactions:
            committer = Committer(store.transactions, RecordingLog(), Metrics())
            running = asyncio.create_task(committer.run())
            try:
                for write in writes:
                    await committer.commit(write)
            finally:
                running.cancel()
                await asyncio.wait([running])
        reads = Reads(store.engine, is_patient=False)
        await reads.totals()
        await reads.runs_by_state()
        await reads.open_gaps("run-1")
        await reads.discovery_state()
        await reads.last_received(["run-1"])
        assert [run.record.run_id for run in await reads.unsettled_since(AT)] == ["run-2", "run-3"]
    finally:
        await store.engine.dispose()


async def test_the_documented_grants_are_enough(postgresql_store: Store) -> None:
    """I10: The role that runs needs no more than the document grants it; it may not delete or change a chunk."""
    url = await as_documented(postgresql_store.url)
    try:
        await do_everything(url)
        limited = Store(url)
        for harm in (
            "DELETE FROM chunks",
            "UPDATE chunks SET payload = ''",
            "DROP TABLE runs",
            "CREATE TABLE t (a int)",
        ):
            with pytest.raises(sa.exc.DBAPIError, match=r"permission denied|must be owner"):
                async with limited.engine.begin() as connection:
                    await connection.execute(sa.text(harm))
        await limited.engine.dispose()
    finally:
        await forget(postgresql_store.url)


@pytest.mark.parametrize("grant", documented_grants(), ids=lambda grant: grant[:25])
async def test_no_documented_grant_is_too_many(postgresql_store: Store, grant: str) -> None:
    """I7: Without any one of the grants the worker refuses in one sentence, and does not wait for it."""
    url = await as_documented(postgresql_store.url, without=grant)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(RefusedError):
                await do_everything(url)
    finally:
        await forget(postgresql_store.url)
