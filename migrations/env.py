"""Alembic's entry: runs migrations on the connection storage/schema.py hands over, one process at a time."""

from alembic import context
from sqlalchemy import Connection, text

from worker.storage.tables import metadata

LOCK_KEY = 0x1E77A16E57


def run(connection: Connection) -> None:
    """Migrate inside the caller's transaction: all steps or none."""
    if connection.dialect.name == "postgresql":
        # Two workers starting at once must not migrate at once, and a forgotten session must not block for ever.
        connection.execute(text("SET LOCAL lock_timeout = '30s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
    context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=False)
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
