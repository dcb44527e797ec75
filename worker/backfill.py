"""What the stream does not hold, over REST: a run's final record and its messages. Used by follower.py.

The user's prompt is only there; and of a run whose stream is gone it is all there is (letta-protocol f, trap 10).
"""

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import tenacity

from worker.core.records import MessageRecord, RunRecord
from worker.errors import BadRequestError, NotFoundError, TroubleError
from worker.letta.client import LettaClient
from worker.patience import Patience, until_it_works

MOST_ANSWERS = 8
"""A deleted run or agent makes the server fail for good (letta-protocol e), so trying has an end: about a minute.
An outage says nothing of the run and does not count."""

Report = Callable[[tenacity.RetryCallState], None]


class Backfill(msgspec.Struct, frozen=True):
    """What REST says of a run that is over. `missing` says in words what could not be had."""

    record: RunRecord
    messages: Sequence[MessageRecord] = ()
    missing: str | None = None


async def fetch(
    letta: LettaClient, record: RunRecord, patience: Patience, report: Report, *, is_over: bool
) -> Backfill:
    """Fetch the final record and the messages of a run; waits while the server is away, and reports that.

    `is_over`: the run's terminal marker was seen, so the record is asked for until it says so too, within bounds.
    """
    try:
        record = await _final_record(letta, record, patience if is_over else None, report)
        messages = await _messages(letta, record.run_id, report)
    except NotFoundError as error:
        return Backfill(record, missing=f"the server does not know the run any more: {error}")
    except (TroubleError, BadRequestError) as error:
        return Backfill(record, missing=f"the server does not give the run's record and messages: {error}")
    return Backfill(record, messages)


async def _final_record(letta: LettaClient, record: RunRecord, patience: Patience | None, report: Report) -> RunRecord:
    """The status changes shortly after the marker is in the stream (letta-protocol trap 9)."""
    delay, waited = 0.05, 0.0
    while True:
        async for attempt in until_it_works(report, most_answers=MOST_ANSWERS):
            with attempt:
                record = await letta.retrieve_run(record.run_id)
        if record.is_ended or patience is None or waited >= patience.record:
            return record
        await asyncio.sleep(delay)
        waited += delay
        delay *= 2


async def _messages(letta: LettaClient, run_id: str, report: Report) -> list[MessageRecord]:
    messages: list[MessageRecord] = []
    async for attempt in until_it_works(report, most_answers=MOST_ANSWERS):
        with attempt:
            messages = [message async for page in letta.run_messages(run_id) for message in page]
    return messages
