"""The tables (a contract: design in docs/architecture.md). Used by the rest of storage/ and by migrations/env.py."""

import datetime as dt

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

UNFINISHED_STATES = ("pending", "following")
STATES = (*UNFINISHED_STATES, "complete", "incomplete", "backfilled", "unavailable")


class UtcDateTime(TypeDecorator[dt.datetime]):
    """Aware UTC datetimes with microseconds on both databases; SQLite keeps ISO text without a zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        """Refuse naive times: they would be read as UTC without being it."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a time without a zone cannot be stored")
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(dt.UTC).replace(tzinfo=None)

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:  # noqa: ARG002
        """Read every time as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("conversation_id", Text),
    Column("agent_id", Text),
    Column("background", Boolean(create_constraint=False)),
    Column("status", Text),
    Column("stop_reason", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("completed_at", UtcDateTime),
    Column("state", Text, nullable=False),
    Column("last_seq_id", BigInteger, nullable=False, server_default="0"),
    Column("chunk_count", BigInteger, nullable=False, server_default="0"),
    Column("error", Text),
    Column("discovered_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("settled_at", UtcDateTime),
    Column("verdict", Text),
    Column("verdict_detail", Text),
    CheckConstraint(f"state IN ({', '.join(repr(s) for s in STATES)})", name="state"),
    Index(None, "conversation_id", "created_at"),
    Index(None, "agent_id", "created_at"),
    Index(None, "created_at"),
    Index(
        "ix_runs_unsettled",
        "created_at",
        sqlite_where=Column("settled_at").is_(None),
        postgresql_where=Column("settled_at").is_(None),
    ),
)

chunks = Table(
    "chunks",
    metadata,
    Column("run_id", Text, nullable=False),
    Column("seq_id", BigInteger, nullable=False),
    Column("message_type", Text),
    Column("message_id", Text),
    Column("otid", Text),
    Column("step_id", Text),
    Column("payload", Text, nullable=False),
    Column("received_at", UtcDateTime, nullable=False),
    Column("seq_source", Text, nullable=False),
    PrimaryKeyConstraint("run_id", "seq_id"),
    CheckConstraint("seq_source IN ('wire', 'derived')", name="seq_source"),
    Index(None, "message_type", "received_at"),
    # PostgreSQL: rows arrive in time order, which is what a BRIN index is for; it costs next to nothing.
    Index(None, "received_at", postgresql_using="brin"),
)

gaps = Table(
    "gaps",
    metadata,
    Column("run_id", Text, nullable=False),
    Column("first_seq_id", BigInteger, nullable=False),
    Column("last_seq_id", BigInteger),
    Column("cause", Text, nullable=False),
    Column("detected_at", UtcDateTime, nullable=False),
    Column("resolution", Text),
    Column("resolved_at", UtcDateTime),
    PrimaryKeyConstraint("run_id", "first_seq_id"),
)

rejects = Table(
    "rejects",
    metadata,
    Column("run_id", Text, nullable=False),
    Column("after_seq_id", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("reason", Text, nullable=False),
    Column("received_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("run_id", "after_seq_id", "digest"),
)

messages = Table(
    "messages",
    metadata,
    Column("run_id", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("part", Text, nullable=False),
    Column("position", Integer, nullable=False),
    Column("message_type", Text),
    Column("otid", Text),
    Column("step_id", Text),
    Column("date", UtcDateTime),
    Column("text", Text),
    Column("payload", Text, nullable=False),
    Column("stored_at", UtcDateTime, nullable=False),
    # The reasoning and the reply of one step share message_id; `part` (otid, else message_type) tells them apart.
    PrimaryKeyConstraint("run_id", "message_id", "part"),
)

streamed_messages = Table(
    "streamed_messages",
    metadata,
    Column("run_id", Text, nullable=False),
    Column("first_seq_id", BigInteger, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("message_type", Text, nullable=False),
    Column("otid", Text),
    Column("text", Text, nullable=False),
    PrimaryKeyConstraint("run_id", "first_seq_id"),
)
"""What the chunks of a run say, for runs of which the server lists no messages: cancelled, failed, deleted."""

discovery = Table(
    "discovery",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("start_at", UtcDateTime),
    Column("position_at", UtcDateTime),
    Column("updated_at", UtcDateTime, nullable=False),
)
