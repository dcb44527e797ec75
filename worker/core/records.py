"""What the server's REST API says of runs and messages, as values both edges understand."""

from datetime import datetime, timedelta

import msgspec

STREAM_EXPIRY = timedelta(hours=3)
"""So long after a run's creation the server serves its stream (letta-protocol d: 410)."""
ENDED_STATUSES = frozenset({"completed", "failed", "cancelled"})
"""Letta's words for a run that is over; `created` and `running` are the others in 0.16.8 (letta-protocol e)."""


class RunRecord(msgspec.Struct, frozen=True):
    """One run as `GET /v1/runs/` lists it. Times are UTC and aware."""

    run_id: str
    created_at: datetime
    status: str | None = None
    conversation_id: str | None = None
    agent_id: str | None = None
    background: bool | None = None
    stop_reason: str | None = None
    completed_at: datetime | None = None
    error: str | None = None

    @property
    def is_ended(self) -> bool:
        """The server says that the run is over; its last chunks may still be on their way (letta-protocol g1)."""
        return self.status in ENDED_STATUSES


class MessageRecord(msgspec.Struct, frozen=True):
    """One message item as `GET /v1/runs/ID/messages` lists it; several items of one step share `message_id`."""

    message_id: str
    payload: str
    message_type: str | None = None
    otid: str | None = None
    step_id: str | None = None
    date: datetime | None = None
    text: str | None = None
