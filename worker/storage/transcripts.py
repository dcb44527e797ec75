"""What people read: the views `run_report` and `transcript` (docs/queries.md), a page at a time. Used by page/."""

import datetime as dt
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from worker.storage.reads import Reads
from worker.storage.tables import UtcDateTime, runs

RUNS_A_PAGE = 20
MESSAGES_A_PAGE = 100
TEXT_CHARS = 10_000
"""So much of a message is read: what a page costs is bounded, whatever was said (I8)."""
REASON_CHARS = 1_000
"""The same for what is said about a run: its error, its gaps."""


class Told(msgspec.Struct, frozen=True):
    """A run, and whether all of it is stored."""

    run_id: str
    conversation_id: str | None
    agent_id: str | None
    created_at: dt.datetime
    state: str
    status: str | None
    completeness: str
    chunk_count: int
    missing: str | None
    error: str | None
    verdict: str | None
    verdict_detail: str | None

    @property
    def conversation(self) -> str | None:
        """Its conversation as the configuration names it: an agent's own one is the agent's id."""
        return self.conversation_id or self.agent_id


class Said(msgspec.Struct, frozen=True):
    """A message, as far as a page shows it. `size`: characters of the whole text."""

    run_id: str
    position: int
    said_at: dt.datetime
    speaker: str
    message_type: str | None
    text: str | None
    size: int
    source: str


class Start(msgspec.Struct, frozen=True):
    """Where a page begins: at this run, after this position in it."""

    run_id: str
    after: int | None = None


class TranscriptPage(msgspec.Struct, frozen=True):
    """Some runs of a conversation in their order, and what was said in them. `next`: where it goes on."""

    runs: Sequence[Told]
    messages: Sequence[Said]
    next: Start | None


_REPORT = sa.table(
    "run_report",
    *(sa.column(name, UtcDateTime if name == "created_at" else None) for name in Told.__struct_fields__),
)
_REASONS = {"missing", "error", "verdict_detail"}
_TRANSCRIPT = sa.table(
    "transcript",
    *(sa.column(name) for name in ("run_id", "position", "speaker", "message_type", "source")),
    sa.column("text"),
    sa.column("run_created_at", UtcDateTime),
    sa.column("said_at", UtcDateTime),
)


class Transcripts:
    """Queries about runs as people see them. Raises RefusedError as `reads` does."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    async def newest(self, limit: int) -> list[Told]:
        """The newest runs."""
        # The view counts what belongs to each run: it is asked about a few runs only.
        newest = sa.select(runs.c.run_id).order_by(runs.c.created_at.desc()).limit(limit)
        run_ids = [row.run_id for row in await self._reads.rows(newest)]
        return await self._told(run_ids)

    async def page(self, conversation: str, start: Start | None = None) -> TranscriptPage:
        """A page of a conversation (or of an agent's own one, by the agent's id), from its beginning or `start`."""
        run_ids = await self._run_ids(conversation, start)
        shown, later = run_ids[:RUNS_A_PAGE], run_ids[RUNS_A_PAGE:]
        order = {run_id: number for number, run_id in enumerate(shown)}
        told = await self._told(shown)
        said = await self._said(shown, start)
        if len(said) > MESSAGES_A_PAGE:
            said = said[:MESSAGES_A_PAGE]
            last = said[-1]
            told = told[: order[last.run_id] + 1]
            return TranscriptPage(told, said, Start(last.run_id, last.position))
        return TranscriptPage(told, said, Start(later[0]) if later else None)

    async def _run_ids(self, conversation: str, start: Start | None) -> list[str]:
        """One more than a page shows."""
        is_direct = sa.and_(runs.c.conversation_id.is_(None), runs.c.agent_id == conversation)
        query = sa.select(runs.c.run_id).where(sa.or_(runs.c.conversation_id == conversation, is_direct))
        if start is not None:
            first = sa.select(runs.c.created_at).where(runs.c.run_id == start.run_id).scalar_subquery()
            is_later = sa.and_(runs.c.created_at == first, runs.c.run_id >= start.run_id)
            query = query.where(sa.or_(runs.c.created_at > first, is_later))
        rows = await self._reads.rows(query.order_by(runs.c.created_at, runs.c.run_id).limit(RUNS_A_PAGE + 1))
        return [row.run_id for row in rows]

    async def _told(self, run_ids: Sequence[str]) -> list[Told]:
        """The report on these runs, in this order."""
        columns = [
            sa.func.substr(column, 1, REASON_CHARS).label(column.name) if column.name in _REASONS else column
            for column in _REPORT.c
        ]
        rows = await self._reads.rows(sa.select(*columns).where(_REPORT.c.run_id.in_(run_ids)))
        told = {row.run_id: Told(**row._mapping) for row in rows}  # noqa: SLF001 - its public name
        return [told[run_id] for run_id in run_ids if run_id in told]

    async def _said(self, run_ids: Sequence[str], start: Start | None) -> list[Said]:
        """One more than a page shows."""
        shown = {"text": sa.func.substr(_TRANSCRIPT.c.text, 1, TEXT_CHARS), "size": sa.func.length(_TRANSCRIPT.c.text)}
        columns = [shown[name].label(name) if name in shown else _TRANSCRIPT.c[name] for name in Said.__struct_fields__]
        query = sa.select(*columns).where(_TRANSCRIPT.c.run_id.in_(run_ids))
        if start is not None and start.after is not None:
            is_later = sa.or_(_TRANSCRIPT.c.run_id != start.run_id, _TRANSCRIPT.c.position > start.after)
            query = query.where(is_later)
        order = (_TRANSCRIPT.c.run_created_at, _TRANSCRIPT.c.run_id, _TRANSCRIPT.c.position)
        rows = await self._reads.rows(query.order_by(*order).limit(MESSAGES_A_PAGE + 1))
        return [Said(**{**row._mapping, "size": row.size or 0}) for row in rows]  # noqa: SLF001 - its public name
