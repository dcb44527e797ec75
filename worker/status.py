"""What `letta-ingest status` shows, as one value both for people and for programs. Used by cli.py and the demo."""

import datetime as dt
from typing import Any

import msgspec

from worker.core.chunks import MAX_COLUMN_CHARS
from worker.core.records import STREAM_EXPIRY
from worker.logs import shown
from worker.storage.reads import Reads

SHOWN_RUNS = 20


class FollowedRun(msgspec.Struct, frozen=True):
    """A run that is not finished. Times are UTC; seconds are whole."""

    run_id: str
    conversation_id: str | None
    state: str
    status: str | None
    cursor: int
    last_chunk_seconds_ago: float | None
    seconds_to_expiry: float


class Status(msgspec.Struct, frozen=True):
    """Figures of the whole store, and the unfinished runs that expire first."""

    at: dt.datetime
    runs: dict[str, int]
    chunks: int
    open_gaps: int
    rejects: int
    discovered_until: dt.datetime | None
    unfinished: list[FollowedRun]


async def read_status(reads: Reads, now: dt.datetime, shown: int = SHOWN_RUNS) -> Status:
    """Read it all. Cheap on a large store, and never in a writer's way."""
    totals = await reads.totals()
    unfinished = [
        run for run in await reads.unsettled_since(now - STREAM_EXPIRY) if run.state in {"pending", "following"}
    ]
    unfinished = unfinished[:shown]
    last = await reads.last_received([run.record.run_id for run in unfinished])
    return Status(
        at=now,
        runs=await reads.runs_by_state(),
        chunks=totals["chunks"],
        open_gaps=totals["open_gaps"],
        rejects=totals["rejects"],
        discovered_until=(await reads.discovery_state()).position_at,
        unfinished=[
            FollowedRun(
                run_id=run.record.run_id,
                conversation_id=run.record.conversation_id,
                state=run.state,
                status=run.record.status,
                cursor=run.cursor,
                last_chunk_seconds_ago=_seconds(now - last[run.record.run_id]) if run.record.run_id in last else None,
                # In this order: a server may name a time that has no later one.
                seconds_to_expiry=_seconds(STREAM_EXPIRY - (now - run.record.created_at)),
            )
            for run in unfinished
        ],
    )


def printable(value: Any, most: int = MAX_COLUMN_CHARS) -> str:
    """Text as a terminal may show it: an id made to move the cursor or to change colours is shown, not obeyed."""
    return "-" if value is None else shown(str(value)[:most])


def _seconds(duration: dt.timedelta) -> float:
    return round(duration.total_seconds(), 1)
