"""How FakeLetta reads a run's log out to one client: the server's three wrapped generators as one loop.

Polling a Redis stream, breaking off cancelled runs, and keepalive pings, each with the real server's slips.
Used by fake_routes.py for both stream endpoints.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel

from worker.demo.fake_faults import EVENT_STREAM, Exchange, reader_error
from worker.demo.fake_run import compact, message_head

if TYPE_CHECKING:
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import Entry, FakeRun

CANCELLED_BY_READER = 'data: {"message_type": "stop_reason", "stop_reason": "cancelled"}\n\n'
NO_POLL_INTERVAL = "'<=' not supported between instances of 'NoneType' and 'int'"


class StreamRequest(BaseModel):
    """The body of both stream endpoints, with the server's defaults and leniency."""

    agent_id: str | None = None
    run_id: str | None = None
    otid: str | None = None
    starting_after: int = 0
    include_pings: bool | None = True
    poll_interval: float | None = 0.1
    batch_size: int | None = 100


WITHOUT_BODY = StreamRequest(include_pings=None, poll_interval=None, batch_size=None)


class ReaderFailedError(Exception):
    """The reader itself broke: Redis is gone, or its parameters make no sense."""


@dataclass
class LogReader:
    """Walks a log by batches, from the last entry it saw (asked for again each time) onwards."""

    letta: FakeLetta
    run: FakeRun
    starting_after: int
    batch_size: int | None
    at_end: bool = False
    _seen: int | None = None

    def take(self) -> list[Entry]:
        """Read one batch; what the cursor covers is read and not delivered."""
        if self.letta.redis == "down":
            raise ReaderFailedError("Error 111 connecting to 127.0.0.1:6379. Connect call failed ('127.0.0.1', 6379).")
        if self.batch_size is not None and self.batch_size <= 0:
            raise ReaderFailedError("XRANGE count must be a positive integer")
        entries = [e for e in self.run.read(self._seen, self.batch_size) if e.index != self._seen]
        self.at_end = not entries
        if entries:
            self._seen = entries[-1].index
        return [entry for entry in entries if entry.seq_id > self.starting_after and entry.data]


class StreamAnswer:
    """One streaming response."""

    def __init__(self, letta: FakeLetta, exchange: Exchange, run: FakeRun, asked: StreamRequest) -> None:
        self._letta = letta
        self._exchange = exchange
        self._run = run
        self._asked = asked
        self._clock = asyncio.get_running_loop().time
        self._checked_at = self._sent_at = self._data_at = self._clock()
        self._last_seq_id: int | None = None

    async def deliver(self) -> None:
        """Send the run until its terminal; a reader that breaks is told only to those without pings."""
        with self._letta.counted_stream():
            try:
                await self._read_out()
            except ReaderFailedError as failure:
                # The keepalive wrapper swallows the error, so that with pings the stream merely ends.
                if self._exchange.response is not None and not self._asked.include_pings:
                    await self._exchange.write(reader_error(str(failure)))
            if self._exchange.response is None:
                await self._exchange.start(500, {"content-type": EVENT_STREAM})

    async def _read_out(self) -> None:
        reader = LogReader(self._letta, self._run, self._asked.starting_after, self._asked.batch_size)
        while True:
            for entry in reader.take():
                if self._is_found_cancelled():
                    await self._exchange.event(CANCELLED_BY_READER)
                    return
                await self._send(entry)
                if entry.complete:
                    return
            if reader.at_end and not await self._wait():
                return
            await asyncio.sleep(0)  # each batch takes its time, also one that the cursor covers

    async def _send(self, entry: Entry) -> None:
        text = self._run.on_the_wire(entry)
        numbered = re.search(r'"seq_id":(\d+)', text)
        if numbered:
            self._last_seq_id = int(numbered.group(1))
        self._data_at = self._clock()
        await self._exchange.event(text)
        self._sent_at = self._clock()

    def _is_found_cancelled(self) -> bool:
        """Look at the run's status, but only every half second and only when there is something to send."""
        now = self._clock()
        if now - self._checked_at < self._letta.cancel_check_interval:
            return False
        self._checked_at = now
        return self._run.status == "cancelled"

    async def _wait(self) -> bool:
        """Wait for the log to grow, pinging meanwhile; False when the silence has lasted too long."""
        if self._asked.poll_interval is None:
            raise ReaderFailedError(NO_POLL_INTERVAL)
        grown = self._run.grown
        while not grown.is_set():
            ping_at = self._sent_at + self._letta.keepalive_interval if self._asked.include_pings else None
            try:
                async with asyncio.timeout_at(ping_at):
                    await grown.wait()
            except TimeoutError:
                if self._clock() - self._data_at > self._letta.max_stream_silence:
                    return False
                await self._ping()
        return True

    async def _ping(self) -> None:
        ping = message_head("ping", self._letta.ids.new("ping"), self._run.id) | {"seq_id": self._last_seq_id}
        await self._exchange.event(f"data: {compact(ping)}\n\n")
        self._sent_at = self._clock()
