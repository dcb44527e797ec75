"""Reconciliation: the verdict on each run, what was streamed where REST lists nothing, and views for people.

Why: a reader must know what is complete and what is not, without joins (docs/queries.md).
How it is undone: views, columns and table are dropped; all of it can be derived from chunks and messages.

Revision: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

RUN_REPORT = """
CREATE VIEW run_report AS
SELECT
    told.*,
    CASE
        WHEN told.settled_at IS NULL THEN 'following'
        WHEN told.state = 'complete' AND told.verdict = 'differs' THEN 'differs'
        WHEN told.state = 'complete' THEN 'complete'
        WHEN told.message_count > 0 THEN 'messages only'
        WHEN told.chunk_count > 0 THEN 'partial'
        ELSE 'nothing'
    END AS completeness
FROM (
    SELECT
        r.run_id, r.conversation_id, r.agent_id, r.created_at, r.completed_at, r.status, r.stop_reason,
        r.state, r.verdict, r.verdict_detail, r.chunk_count, r.last_seq_id, r.error, r.settled_at,
        (SELECT COUNT(*) FROM messages m WHERE m.run_id = r.run_id) AS message_count,
        (SELECT COUNT(*) FROM rejects x WHERE x.run_id = r.run_id) AS reject_count,
        ({missing}) AS missing
    FROM runs r
) told
"""
MISSING = {
    "sqlite": """
        SELECT group_concat(first_seq_id || '-' || COALESCE(last_seq_id, '?') || ' (' || cause || ')', ', ')
        FROM (SELECT * FROM gaps g WHERE g.run_id = r.run_id AND g.resolved_at IS NULL ORDER BY g.first_seq_id)
    """,
    "postgresql": """
        SELECT string_agg(
            g.first_seq_id || '-' || COALESCE(g.last_seq_id::text, '?') || ' (' || g.cause || ')', ', '
            ORDER BY g.first_seq_id
        ) FROM gaps g WHERE g.run_id = r.run_id AND g.resolved_at IS NULL
    """,
}

TRANSCRIPT = """
CREATE VIEW transcript AS
SELECT
    r.conversation_id, r.agent_id, r.run_id, r.created_at AS run_created_at, m.position,
    COALESCE(m.date, r.created_at) AS said_at,
    CASE m.message_type
        WHEN 'user_message' THEN 'user'
        WHEN 'system_message' THEN 'system'
        WHEN 'tool_return_message' THEN 'tool'
        ELSE 'agent'
    END AS speaker,
    m.message_type, m.message_id, m.text, 'server' AS source, r.completeness
FROM run_report r
JOIN messages m ON m.run_id = r.run_id
UNION ALL
SELECT
    r.conversation_id, r.agent_id, r.run_id, r.created_at, s.first_seq_id,
    COALESCE(c.received_at, r.created_at),
    CASE s.message_type WHEN 'tool_return_message' THEN 'tool' ELSE 'agent' END,
    s.message_type, s.message_id, s.text, 'stream', r.completeness
FROM run_report r
JOIN streamed_messages s ON s.run_id = r.run_id
LEFT JOIN chunks c ON c.run_id = s.run_id AND c.seq_id = s.first_seq_id
WHERE r.message_count = 0
"""


def upgrade() -> None:
    """Apply."""
    op.add_column("runs", sa.Column("verdict", sa.Text))
    op.add_column("runs", sa.Column("verdict_detail", sa.Text))
    op.create_table(
        "streamed_messages",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("first_seq_id", sa.BigInteger, nullable=False),
        sa.Column("message_id", sa.Text, nullable=False),
        sa.Column("message_type", sa.Text, nullable=False),
        sa.Column("otid", sa.Text),
        sa.Column("text", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "first_seq_id", name="pk_streamed_messages"),
    )
    op.execute(RUN_REPORT.format(missing=MISSING[op.get_bind().dialect.name]))
    op.execute(TRANSCRIPT)


def downgrade() -> None:
    """Undo."""
    op.execute("DROP VIEW transcript")
    op.execute("DROP VIEW run_report")
    op.drop_table("streamed_messages")
    op.drop_column("runs", "verdict_detail")
    op.drop_column("runs", "verdict")
