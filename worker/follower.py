"""The life of one run: load cursor -> stream -> accept -> commit -> finish; reconnects, decides endings.

Used by service.py, one follower a run. An end is decided from evidence, never from EOF: the terminal marker, or
what the run's own record says of a stream that serves nothing more (letta-protocol g, traps 4, 6, 8).
"""

import asyncio
import datetime as dt
import enum
import random
import time
from collections.abc import Sequence

import msgspec
import tenacity

from worker import backfill
from worker.core.chunks import Ping
from worker.core.messages import Assembly, Comparison, Message, compare
from worker.core.records import STREAM_EXPIRY, MessageRecord
from worker.core.runlog import Accepted, RunLog
from worker.errors import (
    BadRequestError,
    NotFoundError,
    NotStreamableError,
    RunExpiredError,
    RunIdIgnoredError,
    TroubleError,
)
from worker.letta.client import Address, LettaClient
from worker.logs import Log
from worker.metrics import FollowerState, Metrics
from worker.patience import Patience, until_it_works
from worker.places import Places
from worker.storage.committer import Commit, Committer
from worker.storage.reads import Reads, StoredRun
from worker.storage.tables import UNFINISHED_STATES
from worker.storage.writes import RunWrite

LOGGED_LOSSES = 5
"""Of what one read brought; a stream of garbage would fill the log, and the time, with a line for each piece."""


class Outcome(enum.Enum):
    """How one reading of the stream ended."""

    FINISHED = "the terminal marker was seen and everything before it is accounted for"
    CUT = "the stream ended without a marker"
    HOLE = "numbers are missing; they may only be late"
    UNPROVEN = "the events cannot be proven to be this run's"
    YIELDED = "another run waits for the place"
    QUIET = "the run is over, but its stream gives nothing more"


class Equipment(msgspec.Struct, frozen=True):
    """What all followers of a worker share."""

    letta: LettaClient
    committer: Committer
    reads: Reads
    patience: Patience
    metrics: Metrics
    log: Log


class Follower:
    """Follows one run until there is nothing more to do for it."""

    def __init__(self, run: StoredRun, equipment: Equipment, places: Places) -> None:
        self._run = run
        self._record = run.record
        self._with = equipment
        self._places = places
        self._log = equipment.log.bind(run_id=run.record.run_id, conversation_id=run.record.conversation_id)
        self._runlog = RunLog(run.record.run_id, run.cursor, run.chunk_count)
        # What this process hears from a run's first chunk to its last need not be read back to be compared.
        self._heard = Assembly(keeps_texts=False) if run.cursor == run.chunk_count == 0 else None
        self._last_commit: Commit | None = None
        self._is_by_run = False
        self._chunk_at = self._part_at = 0.0
        self._absence = equipment.patience.silence
        self._is_handing_over = False
        self._fruitless_count = 0
        self._quiet_count = 0
        self._quiet_since = 0.0
        self._reconnect_count = 0
        self._state: FollowerState | None = None

    async def follow(self) -> None:
        """Store the run to its end, then its record and its messages.

        Raises RefusedError when an operator has to act, and InvariantError when the database cannot take a write;
        trouble of the server and of the database is waited out.
        """
        started = time.monotonic()
        self._enter("waiting")
        try:
            missing = await self._follow_stream() if self._run.state in UNFINISHED_STATES else None
            self._enter("settling")
            state = await self._settle(missing)
        finally:
            self._enter(None)
        self._log.info(
            "run.finished",
            state=state,
            status=self._record.status,
            cursor=self._runlog.cursor,
            missing=missing,
            duplicates=self._runlog.duplicate_count,
            reconnects=self._reconnect_count,
            seconds=round(time.monotonic() - started, 3),
        )

    def _enter(self, state: FollowerState | None) -> None:
        """Be counted as in this state, and no longer as in the one before; None: not at all."""
        if self._state is not None:
            self._with.metrics.followers.labels(self._state).dec()
        if state is not None:
            self._with.metrics.followers.labels(state).inc()
        self._state = state

    async def _follow_stream(self) -> str | None:
        """Read until the run is finished (None), or until its stream is gone for good: then why."""
        if self._record.background is False:
            await self._await_end()
            return "not made in background mode"
        await self._remember_gaps()
        while True:
            outcome = Outcome.UNPROVEN
            try:
                async for attempt in until_it_works(self._report_fruitless_reading):
                    with attempt:
                        outcome = await self._read_once()
            except RunExpiredError:
                return "expired"
            except NotStreamableError:
                await self._await_end()
                return "not made in background mode"
            except NotFoundError:
                return "unknown to the server"
            except RunIdIgnoredError:
                outcome = Outcome.UNPROVEN
            if outcome is Outcome.FINISHED:
                return None
            if outcome is Outcome.QUIET:
                return "not served"
            await self._prepare_next(outcome)

    async def _remember_gaps(self) -> None:
        if self._run.chunk_count != self._run.cursor:
            gaps = await self._with.reads.open_gaps(self._record.run_id)
            self._runlog = RunLog(self._record.run_id, self._run.cursor, self._run.chunk_count, gaps)

    async def _prepare_next(self, outcome: Outcome) -> None:
        self._reconnect_count += 1
        self._with.metrics.reconnects.labels(outcome.name.lower()).inc()
        self._log.debug("run.reconnecting", cursor=self._runlog.cursor, reason=outcome.name.lower())
        if outcome is Outcome.UNPROVEN:
            self._is_by_run = True
            self._log.info("run.address_changed", reason=outcome.value)
        elif outcome is Outcome.YIELDED and self._fruitless_count:
            # Each reading of a silent run goes on costing the server after it is left: come back ever less often.
            await asyncio.sleep(self._absence)
            self._absence = min(2 * self._absence, self._with.patience.most_silence)

    # One reading

    async def _await_end(self) -> None:
        """Wait until a run without a stream is over: only then does REST have its messages."""
        age = dt.timedelta(seconds=self._with.patience.streamless)
        delay = 1.0
        while not self._record.is_ended and dt.datetime.now(dt.UTC) - self._record.created_at < age:
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._with.patience.most_silence)
            try:
                async for attempt in until_it_works(self._report_trouble):
                    with attempt:
                        self._record = await self._with.letta.retrieve_run(self._record.run_id)
            except NotFoundError:
                return  # deleted meanwhile; fetching its messages says so

    async def _read_once(self) -> Outcome:
        """Read one response to its end and see how far it brought us.

        Raises TroubleError when it brought nothing, so that waits grow only without progress.
        """
        if self._fruitless_count:
            # Over REST first: a run without a stream should not be asked for one again and again.
            self._record = await self._with.letta.retrieve_run(self._record.run_id)
        before = self._runlog.cursor
        self._enter("queued")
        try:
            async with self._places.place(self._record.created_at):
                outcome = await self._read_and_watch()
        except BadRequestError as error:
            if dt.datetime.now(dt.UTC) - self._record.created_at > STREAM_EXPIRY:
                raise RunExpiredError(str(error)) from error  # whatever is wrong with it: it will not get better
            raise
        except TroubleError:
            self._quiet_count = 0  # the silence of a server in trouble says nothing
            if self._runlog.cursor == before:
                self._fruitless_count += 1
                raise
            outcome = Outcome.CUT
        if self._runlog.cursor == before and outcome in {Outcome.CUT, Outcome.QUIET, Outcome.YIELDED}:
            self._fruitless_count += 1
            return self._weigh_silence(outcome)
        self._fruitless_count = self._quiet_count = 0
        self._absence = self._with.patience.silence
        return Outcome.CUT if outcome is Outcome.QUIET else outcome

    def _weigh_silence(self, outcome: Outcome) -> Outcome:
        """A reading brought nothing. That the stream is gone takes two such readings after the run's end."""
        if outcome is Outcome.YIELDED:
            return outcome
        if self._record.is_ended:
            self._quiet_count += 1
            if self._quiet_count == 1:
                self._quiet_since = time.monotonic()
                self._is_by_run = True  # a server that ignores run_id may have been waiting for another run
            elif time.monotonic() - self._quiet_since >= self._grace():
                return Outcome.QUIET
        if outcome is Outcome.QUIET:
            return Outcome.CUT
        raise TroubleError("the stream ended without bringing anything")

    async def _read_and_watch(self) -> Outcome:
        self._enter("reading")
        duplicates_before = self._runlog.duplicate_count
        reader = asyncio.create_task(self._read(), name=f"read:{self._record.run_id}")
        try:
            return await self._watch(reader)
        except TroubleError as error:
            if error.is_outage:
                await asyncio.sleep(random.uniform(0, self._with.patience.rest))  # noqa: S311 - no secret
            raise
        finally:
            # The response must be closed before the place is given away.
            reader.cancel()
            await asyncio.wait([reader])
            self._with.metrics.duplicates.inc(self._runlog.duplicate_count - duplicates_before)
            self._enter("waiting")

    async def _read(self) -> Outcome:
        """Read the stream from the cursor on and hand over for commit whatever becomes storable."""
        address = Address.of(self._record, by_run=self._is_by_run)
        async with self._with.letta.stream(address, self._runlog.cursor) as received:
            self._runlog.begin_read(is_by_run=address.is_by_run)
            self._log.debug("run.following", cursor=self._runlog.cursor, by_run=address.is_by_run)
            if self._run.state == "pending":
                await self._hand_over("following")
            async for events in received:
                if not events:
                    self._part_at = time.monotonic()
                for event in events:
                    self._runlog.accept(event)
                    if not isinstance(event, Ping):
                        self._chunk_at = time.monotonic()
                    if self._runlog.is_finished or self._runlog.is_unproven or self._runlog.wants_reread:
                        break
                await self._hand_over()
                if self._runlog.is_finished:
                    return Outcome.FINISHED
                if self._runlog.is_unproven:
                    return Outcome.UNPROVEN
                if self._runlog.wants_reread:
                    return Outcome.HOLE
        return Outcome.CUT

    async def _watch(self, reader: asyncio.Task[Outcome]) -> Outcome:
        """Wait for the reader; meanwhile look up a silent run, and give the place away when it is wanted."""
        patience = self._with.patience
        opened = self._chunk_at = time.monotonic()
        look_up_after = self._grace() if self._record.is_ended else patience.silence
        tick = min(patience.silence, patience.ended, patience.turn) / 4
        while True:
            done, _ = await asyncio.wait({reader}, timeout=tick)
            if done:
                return reader.result()
            quiet, was_ended = self._quiet_seconds(), self._record.is_ended
            if quiet >= look_up_after:
                answers = await self._look_up(quiet)
                if was_ended and answers and self._quiet_seconds() >= quiet:
                    return Outcome.QUIET
                look_up_after = quiet + (self._grace() if self._record.is_ended else min(quiet, patience.most_silence))
            if quiet < tick:
                look_up_after = self._grace() if was_ended else patience.silence
            # A run that is over needs its place only until its end is read; one that is alive can wait for its turn.
            is_turn_over = time.monotonic() - opened >= patience.turn
            # Never while a lot waits for room at the committer: the RunLog has given it away, and it would be lost.
            if self._places.is_wanted and is_turn_over and not was_ended and not self._is_handing_over:
                return Outcome.YIELDED

    async def _look_up(self, quiet: float) -> bool:
        """Ask for the run's record; whether the server gave it."""
        try:
            self._record = await self._with.letta.retrieve_run(self._record.run_id)
        except TroubleError as error:
            self._log.info("run.silent", seconds=round(quiet), error=str(error))
            return False
        self._log.info("run.silent", seconds=round(quiet), status=self._record.status)
        return True

    def _quiet_seconds(self) -> float:
        """Seconds in which the server could have sent a chunk and did not; waiting for our database is not silence.

        Nor is a part of something large, over a slow line; but bytes that never make an event are, in the end.
        """
        if self._is_handing_over:
            return 0.0
        since_chunk = time.monotonic() - self._chunk_at
        is_in_parts = since_chunk < self._with.patience.slow_chunk
        return min(since_chunk, time.monotonic() - self._part_at) if is_in_parts else since_chunk

    def _grace(self) -> float:
        patience = self._with.patience
        return patience.cancelled if self._record.status == "cancelled" else patience.ended

    def _report_fruitless_reading(self, retry: tenacity.RetryCallState) -> None:
        self._with.metrics.reconnects.labels("trouble").inc()
        self._report_trouble(retry)

    def _report_trouble(self, retry: tenacity.RetryCallState) -> None:
        error = retry.outcome.exception() if retry.outcome else None
        wait = round(retry.next_action.sleep, 1) if retry.next_action else None
        event = self._log.info if isinstance(error, TroubleError) else self._log.warning
        event("run.reconnecting", cursor=self._runlog.cursor, error=str(error), attempt=retry.attempt_number, wait=wait)

    # What is stored

    async def _hand_over(self, state: str | None = None) -> None:
        """Give what is storable to the committer; waits while too much waits there."""
        accepted = self._runlog.take()
        if accepted is None and state is None:
            return
        if accepted is not None:
            self._log_losses(accepted)
            self._hear(accepted)
            if accepted.is_finished:
                state = "complete" if accepted.is_complete else "incomplete"
        write = RunWrite(self._record.run_id, dt.datetime.now(dt.UTC), state or "following", accepted)
        self._is_handing_over = True
        try:
            self._last_commit = await self._with.committer.submit(write, after=self._last_commit)
        finally:
            self._is_handing_over = False
            self._chunk_at = time.monotonic()

    def _hear(self, accepted: Accepted) -> None:
        if accepted.has_late_rows:
            self._heard = None  # it takes the chunks of a message in their order only
        if self._heard is not None:
            for row in accepted.rows:
                self._heard.add(row.seq_id, row.chunk.payload)

    def _log_losses(self, accepted: Accepted) -> None:
        for gap in accepted.gaps[:LOGGED_LOSSES]:
            self._log.warning("run.gap_found", first=gap.first_seq_id, last=gap.last_seq_id, cause=gap.cause)
        for reject in accepted.rejects[:LOGGED_LOSSES]:
            self._log.warning("run.rejected", after=reject.after_seq_id, reason=reject.reason)
        if (more := max(len(accepted.gaps), len(accepted.rejects)) - LOGGED_LOSSES) > 0:
            self._log.warning("run.rejected", more=more)

    async def _committed(self) -> None:
        if self._last_commit is not None:
            await self._last_commit

    async def _settle(self, missing: str | None) -> str:
        """Store what REST has of the run and how it compares; where the stream is gone for good, what is missing."""
        await self._committed()  # before anything is fetched: else what is fetched would pile up behind a slow database
        found = await backfill.fetch(
            self._with.letta, self._record, self._with.patience, self._report_trouble, is_over=missing is None
        )
        self._record = found.record
        self._with.metrics.backfills.labels("failed" if found.missing else "fetched").inc()
        if missing is not None:
            await self._close(missing, state_without_log="backfilled" if found.messages else "unavailable")
        state = await self._final_state()
        streamed, comparison = await self._reconcile(state, found.messages)
        await self._with.committer.commit(
            RunWrite(
                run_id=self._record.run_id,
                at=dt.datetime.now(dt.UTC),
                error=found.missing,
                record=found.record,
                messages=found.messages,
                streamed=streamed,
                comparison=comparison,
                is_settled=True,
            )
        )
        self._with.metrics.runs_finished.labels(state=state).inc()
        return state

    async def _final_state(self) -> str:
        """The run's state in the store: another worker may have seen more of it, but nobody more than everything."""
        if self._runlog.is_complete:
            return "complete"
        stored = await self._with.reads.run(self._record.run_id) or self._run
        return stored.state

    async def _close(self, missing: str, state_without_log: str) -> None:
        """Close the run's log with a gap; the store says from where, because another worker may have gone further."""
        stored = await self._with.reads.run(self._record.run_id)
        if stored is None or stored.state not in UNFINISHED_STATES:
            return
        if stored.cursor > self._runlog.cursor:
            gaps = await self._with.reads.open_gaps(self._record.run_id)
            self._runlog = RunLog(self._record.run_id, stored.cursor, stored.chunk_count, gaps)
        self._runlog.give_up(missing)
        accepted = self._runlog.take()
        if accepted is not None:
            self._log_losses(accepted)
        is_partial = state_without_log == "unavailable" and accepted is not None and accepted.stored_count
        state = "incomplete" if is_partial else state_without_log
        await self._with.committer.commit(RunWrite(self._record.run_id, dt.datetime.now(dt.UTC), state, accepted))

    async def _reconcile(
        self, state: str, listed: Sequence[MessageRecord]
    ) -> tuple[Sequence[Message], Comparison | None]:
        """What the chunks say, where the server lists no messages; and, of a complete run, how they compare."""
        if listed and state != "complete":
            return (), None
        if listed and self._heard is not None and self._runlog.is_complete:
            streamed = self._heard.messages()
        else:
            assembly = Assembly(keeps_texts=not listed)
            async for page in self._with.reads.payloads(self._record.run_id):
                for seq_id, payload in page:
                    assembly.add(seq_id, payload)
            streamed = assembly.messages()
        comparison = compare(streamed, listed) if state == "complete" else None
        if comparison is not None and comparison.verdict == "differs":
            self._log.warning("run.differs", differences=comparison.differences)
        return () if listed else streamed, comparison
