"""Life of the process: discovery and one supervised task per unfinished run, from the first sweep to the drain.

Used by app.py. A follower that fails is started again and never stops the others; no task dies unseen.
"""

import asyncio
import datetime as dt
import functools
import math
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any

import tenacity

from worker import systemd
from worker.core.records import STREAM_EXPIRY
from worker.discovery import Discovery
from worker.errors import InvariantError, RefusedError, WorkerError
from worker.follower import Equipment, Follower
from worker.logs import shown
from worker.monitor import Health
from worker.patience import until_it_works
from worker.places import Places
from worker.storage.reads import StoredRun

STREAM_LIFE = STREAM_EXPIRY + dt.timedelta(minutes=10)
"""Older runs have surely lost their stream and go through a lane of their own, a few at a time."""
OLD_RUNS_AT_ONCE = 20
DRAIN_SECONDS = 10.0
FAILED_TASK_DELAY = 5.0
STATUS_SECONDS = 3.0
"""So often the line that `systemctl status` shows may change."""
MOST_STATUS_CHARS = 500


class Service:
    """Runs until stopped, or, with `once`, until no run is active."""

    def __init__(
        self, discovery: Discovery, equipment: Equipment, health: Health, *, interval: float, max_streams: int
    ) -> None:
        self._discovery = discovery
        self._with = equipment
        self._log = equipment.log
        self._health = health
        self._interval = interval
        # One place is for the runs of the past, so that neither they nor the living starve.
        self._places = Places(max(1, max_streams - 1))
        self._old_places = Places(1) if max_streams > 1 else self._places
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._created_at: dict[str, dt.datetime] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._failure: WorkerError | None = None
        self._has_old_runs = asyncio.Event()
        self._has_old_runs.set()
        self.is_ready = False
        """The database takes what is written, and the runs have been listed once."""
        self._has_said_ready = False
        equipment.metrics.expires_at.set_function(self._expires_at)

    def stop(self) -> None:
        """Ask for a drain; returns at once. May be called from a signal handler, and twice."""
        if not self._stopping.is_set():
            self._log.info("worker.stopping")
            systemd.notify("STOPPING=1")
        self._stopping.set()

    async def run(self, *, once: bool = False) -> None:
        """Follow runs until `stop`, then drain. Raises RefusedError when an operator has to act."""
        committing = asyncio.create_task(self._with.committer.run(), name="commit")
        stopping = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            self._start("discover", self._follow_everything(once=once))
            self._start("old runs", self._follow_old_runs())
            self._start("watchdog", self._feed_watchdog())
            self._start("status", self._tell_status())
            await asyncio.wait({committing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._drain(committing)
            stopping.cancel()
        if self._failure is not None:
            raise self._failure

    async def _drain(self, committing: asyncio.Task[None]) -> None:
        """Stop reading, finish the commit. What is not committed in time is read again at the next start."""
        everything = {*self._tasks, *self._followers.values()}
        for task in everything:
            task.cancel()
        if everything:
            await asyncio.wait(everything)
        if not committing.done():
            draining = asyncio.create_task(self._with.committer.drain())
            done, _ = await asyncio.wait({draining, committing}, timeout=DRAIN_SECONDS, return_when="FIRST_COMPLETED")
            draining.cancel()
            if draining not in done:
                self._log.warning("worker.stop_unclean", reason="the database takes no commits")
        committing.cancel()
        await asyncio.wait({committing})
        if not committing.cancelled() and (failure := committing.exception()) is not None:
            self._failure = failure if isinstance(failure, WorkerError) else _bug("commit", failure)
        self._log.info("worker.stopped")

    # Runs

    async def _follow_everything(self, *, once: bool) -> None:
        since = dt.datetime.now(dt.UTC) - STREAM_LIFE
        self._follow(await self._with.reads.unsettled_since(since), self._places)
        while True:
            new_runs = await self._sweep()
            if once and not new_runs and not self._followers and not await self._old_runs(1):
                self.stop()
                return
            await self._wait_for_next_sweep(once=once)

    async def _wait_for_next_sweep(self, *, once: bool) -> None:
        """Wait for the interval; with `once` not longer than there is something to follow."""
        if once and self._followers:
            await asyncio.wait([*self._followers.values()], timeout=self._interval)
        elif once:
            await asyncio.sleep(min(0.2, self._interval))
        else:
            await asyncio.sleep(self._interval)

    async def _sweep(self) -> int:
        """One sweep of discovery, repeated until it works. Returns the number of new runs."""
        count = 0
        async for attempt in until_it_works(self._report_failed_sweep):
            with attempt:
                async for found in self._discovery.sweep():
                    self._health.discovery_moved()
                    count += len(found)
                    self._take_up(found)
        if self._health.discovery_has_failed:
            self._log.info("discovery.recovered")
        self._health.discovery_succeeded()
        self._with.metrics.discovery_at.set_to_current_time()
        if not self.is_ready:
            self.is_ready = True
            self.say_ready()
        return count

    def _take_up(self, found: list[StoredRun]) -> None:
        since = dt.datetime.now(dt.UTC) - STREAM_LIFE
        recent = [run for run in found if run.record.created_at >= since]
        self._follow(sorted(recent, key=lambda run: run.record.created_at), self._places)
        if len(recent) < len(found):
            self._has_old_runs.set()

    async def _follow_old_runs(self) -> None:
        """Runs of the past, newest first, a few at a time: there may be a million of them."""
        while True:
            await self._has_old_runs.wait()
            self._has_old_runs.clear()
            under_way: set[asyncio.Task[None]] = set()
            while (runs := await self._old_runs(OLD_RUNS_AT_ONCE - len(under_way))) or under_way:
                self._follow(runs, self._old_places)
                under_way |= {self._followers[run.record.run_id] for run in runs}
                _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)

    async def _old_runs(self, limit: int) -> list[StoredRun]:
        """Old runs nobody follows yet."""
        before = dt.datetime.now(dt.UTC) - STREAM_LIFE
        runs = await self._with.reads.unsettled_before(before, limit + len(self._followers))
        return [run for run in runs if run.record.run_id not in self._followers][:limit]

    def _follow(self, runs: Iterable[StoredRun], places: Places) -> None:
        for run in runs:
            run_id = run.record.run_id
            if run_id not in self._followers:
                task = asyncio.create_task(self._supervise(run, places), name=f"follow:{run_id}")
                self._followers[run_id] = task
                self._created_at[run_id] = run.record.created_at
                task.add_done_callback(functools.partial(self._forget, run_id))

    def _forget(self, run_id: str, _: asyncio.Task[None]) -> None:
        del self._followers[run_id], self._created_at[run_id]

    async def _supervise(self, run: StoredRun, places: Places) -> None:
        """Follow a run whatever happens to its follower; start again from what the store holds."""
        async for attempt in self._again(f"follow:{run.record.run_id}"):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    run = await self._with.reads.run(run.record.run_id) or run
                await Follower(run, self._with, places).follow()

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start a task of the service itself: when it ends with an error, the service stops."""

        async def watched() -> None:
            try:
                await work
            except RefusedError as refusal:
                self._refuse(refusal)
            except Exception as error:  # noqa: BLE001 - whatever it is, the service must stop loudly (I7)
                self._log.error("worker.task_failed", task=name, error=repr(error), exc_info=error)
                self._refuse(_bug(name, error))

        task = asyncio.create_task(watched(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _again(self, name: str) -> AsyncIterator[tenacity.AttemptManager]:
        """Attempts of a task that must not die: after an error nobody expected it is logged and tried again."""

        def report(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            self._log.error("worker.task_failed", task=name, error=repr(error), exc_info=error)

        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_not_exception_type((RefusedError, asyncio.CancelledError)),
                wait=tenacity.wait_exponential(multiplier=FAILED_TASK_DELAY, max=300),
                before_sleep=report,
                reraise=True,
            ):
                yield attempt
        except RefusedError as refusal:
            self._refuse(refusal)

    def _refuse(self, failure: WorkerError) -> None:
        self._failure = self._failure or failure
        self.stop()

    # What the outside sees

    def _report_failed_sweep(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait = round(state.next_action.sleep, 1) if state.next_action else None
        self._health.discovery_failed(str(error))
        self._log.warning("discovery.failed", error=str(error), attempt=state.attempt_number, wait=wait)

    def _expires_at(self) -> float:
        """When the server drops the oldest of the streams it still has, in seconds since 1970; infinite without one."""
        streams_since = dt.datetime.now(dt.UTC) - STREAM_EXPIRY
        oldest = min((at for at in self._created_at.values() if at > streams_since), default=None)
        return math.inf if oldest is None else oldest.timestamp() + STREAM_EXPIRY.total_seconds()

    def say_ready(self) -> None:
        """Tell systemd so; what it has no room for is said again with the next status."""
        self._has_said_ready = systemd.notify("READY=1")

    async def _tell_status(self) -> None:
        """Keep the line that `systemctl status` shows true."""
        told = None
        while True:
            if self.is_ready and not self._has_said_ready:
                self.say_ready()
            line = self._status()
            if line != told and systemd.notify(f"STATUS={line}"):
                told = line
            await asyncio.sleep(STATUS_SECONDS)

    def _status(self) -> str:
        """One line for a person."""
        value = self._with.metrics.registry.get_sample_value
        streams = value("letta_ingest_followers", {"state": "reading"}) or 0
        chunks = value("letta_ingest_chunks_stored_total") or 0
        parts = [
            f"{streams:.0f} streams open",
            f"{chunks:.0f} chunks stored",
            f"{len(self._followers)} runs unfinished",
        ]
        parts += [f"{name}: {shown(trouble)}" for name, trouble in self._health.known_troubles().items()]
        return "; ".join(parts)[:MOST_STATUS_CHARS]

    async def _feed_watchdog(self) -> None:
        interval = systemd.watchdog_interval()
        while interval is not None:
            if not self._health.stuck():
                systemd.notify("WATCHDOG=1")
            await asyncio.sleep(interval / 2)


def _bug(name: str, error: BaseException) -> InvariantError:
    return InvariantError(f"the task `{name}` failed in a way nobody foresaw, please report it: {error!r}")
