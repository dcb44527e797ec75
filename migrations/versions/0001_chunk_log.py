"""The first schema: runs with their cursors, chunks, gaps, rejects, messages, how far discovery got.

Why: everything the delivery promise rests on (docs/promise.md).
How it is undone: the tables are dropped, with all that agents said in them.

Revision: 0001
"""

import sqlalchemy as sa
from alembic import op

from worker.storage.tables import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("conversation_id", sa.Text),
        sa.Column("agent_id", sa.Text),
        sa.Column("background", sa.Boolean),
        sa.Column("status", sa.Text),
        sa.Column("stop_reason", sa.Text),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("completed_at", UtcDateTime),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("last_seq_id", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("chunk_count", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("error", sa.Text),
        sa.Column("discovered_at", UtcDateTime, nullable=False),
        sa.Column("updated_at", UtcDateTime, nullable=False),
        sa.Column("settled_at", UtcDateTime),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        sa.CheckConstraint(
            "state IN ('pending', 'following', 'complete', 'incomplete', 'backfilled', 'unavailable')",
            name=op.f("ck_runs_state"),
        ),
    )
    op.create_index("ix_runs_conversation_id_created_at", "runs", ["conversation_id", "created_at"])
    op.create_index("ix_runs_agent_id_created_at", "runs", ["agent_id", "created_at"])
    op.create_index("ix_runs_created_at", "runs", ["created_at"])
    op.create_index(
        "ix_runs_unsettled",
        "runs",
        ["created_at"],
        sqlite_where=sa.text("settled_at IS NULL"),
        postgresql_where=sa.text("settled_at IS NULL"),
    )
    op.create_table(
        "chunks",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("seq_id", sa.BigInteger, nullable=False),
        sa.Column("message_type", sa.Text),
        sa.Column("message_id", sa.Text),
        sa.Column("otid", sa.Text),
        sa.Column("step_id", sa.Text),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("received_at", UtcDateTime, nullable=False),
        sa.Column("seq_source", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "seq_id", name="pk_chunks"),
        sa.CheckConstraint("seq_source IN ('wire', 'derived')", name=op.f("ck_chunks_seq_source")),
    )
    op.create_index("ix_chunks_message_type_received_at", "chunks", ["message_type", "received_at"])
    op.create_index("ix_chunks_received_at", "chunks", ["received_at"], postgresql_using="brin")
    op.create_table(
        "gaps",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("first_seq_id", sa.BigInteger, nullable=False),
        sa.Column("last_seq_id", sa.BigInteger),
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("detected_at", UtcDateTime, nullable=False),
        sa.Column("resolution", sa.Text),
        sa.Column("resolved_at", UtcDateTime),
        sa.PrimaryKeyConstraint("run_id", "first_seq_id", name="pk_gaps"),
    )
    op.create_table(
        "rejects",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("after_seq_id", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("raw", sa.LargeBinary, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("received_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "after_seq_id", "digest", name="pk_rejects"),
    )
    op.create_table(
        "messages",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("message_id", sa.Text, nullable=False),
        sa.Column("part", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("message_type", sa.Text),
        sa.Column("otid", sa.Text),
        sa.Column("step_id", sa.Text),
        sa.Column("date", UtcDateTime),
        sa.Column("text", sa.Text),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("stored_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "message_id", "part", name="pk_messages"),
    )
    op.create_table(
        "discovery",
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("start_at", UtcDateTime),
        sa.Column("position_at", UtcDateTime),
        sa.Column("updated_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("scope", name="pk_discovery"),
    )


def downgrade() -> None:
    """Undo."""
    for table in ("discovery", "messages", "rejects", "gaps", "chunks", "runs"):
        op.drop_table(table)
