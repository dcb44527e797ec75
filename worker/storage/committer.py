"""The group committer: one task that commits whatever all followers have ready, in one transaction (I3, I8).

No timer and no batch size to tune: while one transaction is under way the next lot gathers, so under light load a
commit carries one chunk and under heavy load thousands. Used by follower, discovery and backfill through `submit`.
"""

import asyncio
import datetime as dt
import time
from collections import deque
from collections.abc import Generator
from typing import Any

import asyncpg
import tenacity
from sqlalchemy.exc import DatabaseError, StatementError

from worker.errors import InvariantError, RefusedError
from worker.logs import Log
from worker.metrics import Metrics
from worker.storage.engine import describe, is_outage, is_refusal, is_sqlite, is_timeout, outage_retries
from worker.storage.transactions import Transactions
from worker.storage.writes import PostgresDialect, RunWrite, SqliteDialect, Write, write

MAX_WAITING_BYTES = 32 * 1024 * 1024
"""So much may wait for its commit in the whole process; then reading stops, and TCP slows the server down (I8)."""
MAX_TRANSACTION_BYTES = 8 * 1024 * 1024


class Commit:
    """A submitted write. Await it until it is durable; whoever gives up waiting leaves it in the queue all the same."""

    def __init__(self, content: Write) -> None:
        self.content = content
        self.size = content.size
        self.durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __await__(self) -> Generator[Any, None, None]:
        # Shielded: cancelling a task cancels the future it waits for, and the write would look done (I2).
        return asyncio.shield(self.durable).__await__()

    def settle(self, failure: Exception | None = None) -> None:
        """Tell whoever waits, unless it has been told before."""
        if self.durable.done():
            return
        if failure is None:
            self.durable.set_result(None)
        else:
            self.durable.set_exception(failure)
            self.durable.exception()  # that nobody waits is no fault


class Committer:
    """Start `run` as a task, then `submit` from any number of other tasks."""

    def __init__(self, transactions: Transactions, log: Log, metrics: Metrics) -> None:
        self._transactions = transactions
        self._log = log
        self._metrics = metrics
        self._dialect = SqliteDialect() if is_sqlite(transactions.engine) else PostgresDialect()
        self._queue: deque[Commit] = deque()
        self._waiting_bytes = 0
        self._lot_bytes = MAX_TRANSACTION_BYTES
        self._wakes = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._failure: BaseException | None = None
        self._moved_at = time.monotonic()
        metrics.unacknowledged_bytes.set_function(lambda: self._waiting_bytes)
        metrics.unacknowledged_chunks.set_function(lambda: sum(_chunk_count(commit.content) for commit in self._queue))
        self.is_failing = False
        """The database does not take commits at the moment."""

    async def submit(self, content: Write, after: Commit | None = None) -> Commit:
        """Hand over a write; returns as soon as there is room for it.

        Await what it returns until the write is durable. Writes are committed in the order of their submission, so
        the last of a submitter stands for all before it. Give it as `after`: a run's cursor must not pass rows that
        could not be written (I2), so where `after` has failed its error is raised.
        """
        while not self._has_room.is_set():  # all who wait are woken, but the first of them may fill it up again
            await self._has_room.wait()
        if self._failure is not None:
            raise RefusedError("nothing can be committed any more") from self._failure
        if after is not None and after.durable.done():
            after.durable.result()
        commit = Commit(content)
        if not self._queue:
            self._moved_at = time.monotonic()
        self._queue.append(commit)
        self._waiting_bytes += commit.size
        if self._waiting_bytes >= MAX_WAITING_BYTES:
            self._has_room.clear()
        self._wakes.set()
        return commit

    async def commit(self, content: Write) -> None:
        """Hand over a write and wait until it is durable."""
        await (await self.submit(content))

    def stalled_seconds(self) -> float:
        """Seconds for which there has been work and none was finished."""
        return time.monotonic() - self._moved_at if self._queue else 0.0

    async def run(self) -> None:
        """Commit until cancelled. Raises RefusedError when waiting for the database does not help."""
        try:
            while True:
                await self._wakes.wait()
                self._wakes.clear()
                while lot := self._next_lot():
                    try:
                        await self._commit_lot(lot)
                        self._lot_bytes = min(2 * self._lot_bytes, MAX_TRANSACTION_BYTES)
                    except _TooMuchError:
                        self._lot_bytes = sum(commit.size for commit in lot) // 2
        except BaseException as failure:
            self._fail(failure)
            raise

    async def drain(self) -> None:
        """Wait until everything submitted so far is durable."""
        if self._queue:
            await asyncio.wait([commit.durable for commit in self._queue])

    def _next_lot(self) -> list[Commit]:
        lot: list[Commit] = []
        size = 0
        for commit in self._queue:
            if lot and size + commit.size > self._lot_bytes:
                break
            lot.append(commit)
            size += commit.size
        return lot

    async def _commit_lot(self, lot: list[Commit]) -> None:
        live = [commit for commit in lot if not commit.durable.done()]
        try:
            if live:
                await self._commit_patiently([commit.content for commit in live])
        except _UnwritableError as error:
            if len(live) > 1:
                # One write the database cannot take must not hold up the others: find it.
                middle = len(lot) // 2
                await self._commit_lot(lot[:middle])
                await self._commit_lot(lot[middle:])
                return
            self._fail_run(live[0], InvariantError(f"the database does not take this write: {error}"))
        self._release(lot)

    def _fail_run(self, failed: Commit, failure: InvariantError) -> None:
        """Fail a write and all that its run has waiting behind it: they build upon it."""
        for commit in self._queue:
            if _subject(commit.content) == _subject(failed.content):
                commit.settle(failure)

    def _release(self, lot: list[Commit]) -> None:
        self._moved_at = time.monotonic()
        for commit in lot:
            self._queue.popleft()
            self._waiting_bytes -= commit.size
            commit.settle()
        if self._waiting_bytes < MAX_WAITING_BYTES:
            self._has_room.set()

    async def _commit_patiently(self, lot: list[Write]) -> None:
        """Repeat until it is durable. Whether a failed commit was durable does not matter: a repetition is harmless."""
        async for attempt in outage_retries(lambda state: self._report_outage(_error_of(state))):
            with attempt:
                await self._commit_once(lot)
        self._report_recovery()

    async def _commit_once(self, lot: list[Write]) -> None:
        started = time.monotonic()
        try:
            await self._transactions.run(lambda connection: write(connection, self._dialect, lot))
        except Exception as error:
            if len(lot) > 1 and is_timeout(error):
                # What a slow database cannot take in the time that is allowed it could never take, however often.
                self._report_outage(error)
                raise _TooMuchError from None
            if is_outage(error) or isinstance(error, RefusedError):
                raise
            if is_refusal(error):
                raise RefusedError(f"the database refuses to store: {describe(error)}") from error
            if isinstance(error, DatabaseError | StatementError | asyncpg.PostgresError | ValueError | OverflowError):
                self._report_recovery()
                raise _UnwritableError(describe(error)) from error
            raise
        self._count(lot, time.monotonic() - started)

    def _report_outage(self, error: BaseException | None) -> None:
        if not self.is_failing and error is not None:
            self.is_failing = True
            self._log.warning("database.unavailable", error=describe(error), waiting=len(self._queue))

    def _report_recovery(self) -> None:
        if self.is_failing:
            self.is_failing = False
            self._log.info("database.recovered")

    def _count(self, lot: list[Write], seconds: float) -> None:
        self._metrics.commits.inc()
        self._metrics.commit_seconds.observe(seconds)
        self._metrics.commit_at.set_to_current_time()
        now = dt.datetime.now(dt.UTC)
        stored = [(w, w.accepted) for w in lot if isinstance(w, RunWrite) and w.accepted is not None]
        for content, _ in stored:
            self._metrics.lag_seconds.observe((now - content.at).total_seconds())
        count = sum(map(_chunk_count, lot))
        self._metrics.commit_chunks.observe(count)
        self._metrics.chunks.inc(count)
        self._metrics.gaps.inc(sum(len(accepted.gaps) for _, accepted in stored))
        self._metrics.rejects.inc(sum(len(accepted.rejects) for _, accepted in stored))

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._has_room.set()
        while self._queue:
            self._queue.popleft().settle(RefusedError("nothing can be committed any more"))


def _chunk_count(content: Write) -> int:
    return len(content.accepted.rows) if isinstance(content, RunWrite) and content.accepted is not None else 0


def _subject(content: Write) -> str | None:
    return content.run_id if isinstance(content, RunWrite) else None


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


class _TooMuchError(Exception):
    """The database took too long for so many writes at once."""


class _UnwritableError(Exception):
    """The database understood the write and cannot take it."""
