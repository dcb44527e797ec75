"""The schema's version: upgrade it, or refuse to work on one we do not know. Used by app.py and `migrate`."""

from importlib.resources import files
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.errors import RefusedError
from worker.storage.engine import describe, is_refusal


async def upgrade(engine: AsyncEngine) -> tuple[str | None, str]:
    """Bring the schema to this version; return the revision before and after. Running twice is harmless."""
    config = _alembic_config()
    before = await current_revision(engine)
    head = _head(config)
    _refuse_unknown(before, config)
    if before != head:

        def run(connection: sa.Connection) -> None:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

        async with engine.begin() as connection:
            await connection.run_sync(run)
    return before, head


async def require_current(engine: AsyncEngine) -> None:
    """Raise RefusedError, naming the command that helps, unless the schema is exactly this version's (I7)."""
    config = _alembic_config()
    revision = await current_revision(engine)
    _refuse_unknown(revision, config)
    if revision is None:
        raise RefusedError("the database has no letta-ingest schema yet: run `letta-ingest migrate`")
    if revision != _head(config):
        raise RefusedError(
            f"the database's schema is at {revision}, this version needs {_head(config)}: run `letta-ingest migrate`"
        )


async def current_revision(engine: AsyncEngine) -> str | None:
    """The revision the database is at; None for an empty one. Raises RefusedError when it does not let us in."""
    try:
        async with engine.execution_options(reads_only=True).connect() as connection:
            return await connection.run_sync(lambda c: MigrationContext.configure(c).get_current_revision())
    except RefusedError:
        raise
    except Exception as error:
        if is_refusal(error):
            raise RefusedError(f"the database refuses us: {describe(error)}") from error
        raise


def _refuse_unknown(revision: str | None, config: AlembicConfig) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in known:
        raise RefusedError(
            f"the database's schema ({revision}) is unknown to this letta-ingest: it is newer, then install the version"
            " that made it; or it is another program's, then name another database in storage.url"
        )


def _head(config: AlembicConfig) -> str:
    head = ScriptDirectory.from_config(config).get_current_head()
    if head is None:
        raise RefusedError("this installation has no migrations: install letta-ingest again")
    return head


def _alembic_config() -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    return config


def _migrations() -> Path:
    """The migrations travel inside the wheel; a checkout has them at its top level."""
    package = Path(str(files("worker")))
    packaged = package / "migrations"
    return packaged if packaged.is_dir() else package.parent / "migrations"
