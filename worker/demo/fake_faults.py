"""What can go wrong between FakeLetta and its client: scripted faults, and the exchange they interfere with.

A test puts faults into ``FakeLetta.faults``; each applies to the next requests it matches and counts how
often it really took effect, so that a test can prove that its fault fired.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web

from worker.demo.fake_run import compact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.demo.fake_run import FakeRun

Kind = Literal["any", "health", "runs", "run", "messages", "conversations", "stream", "cancel", "other"]

EVENT_STREAM = "text/event-stream; charset=utf-8"


class EndOfAnswerError(Exception):
    """A fault has ended this answer; nothing more is written."""


@dataclass
class Request:
    """What one request was, and how it was answered. Times are of the monotonic clock."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    kind: Kind = "other"
    run_id: str | None = None
    status: int = 0
    opened_at: float = field(default_factory=time.monotonic)
    closed_at: float | None = None
    bytes_sent: int = 0


class Exchange:
    """One request being answered; everything that is sent goes through its fault, if it has one."""

    def __init__(self, wire: web.BaseRequest, record: Request, raw_body: bytes) -> None:
        self.wire = wire
        self.record = record
        self.raw_body = raw_body
        self.fault: Fault | None = None
        self.response: web.StreamResponse | None = None
        self.event_count = 0

    async def start(self, status: int, headers: Mapping[str, str], length: int | None = None) -> None:
        """Prepare status and headers; they leave with the first bytes of the body."""
        self.record.status = status
        self.response = web.StreamResponse(status=status, headers={"server": "uvicorn", **headers})
        self.response.content_length = length
        await self.response.prepare(self.wire)

    async def send(self, data: bytes) -> None:
        """Send through the fault."""
        if self.fault is None:
            await self.write(data)
        else:
            await self.fault.send(self, data)

    async def write(self, data: bytes) -> None:
        """Send past the fault, as one HTTP chunk."""
        if self.response is None:
            raise RuntimeError("an answer is started before it is written")
        if data:
            self.record.bytes_sent += len(data)
            await self.response.write(data)

    async def event(self, text: str) -> None:
        """Send one SSE event; the first brings the headers with it."""
        if self.response is None:
            await self.start(200, {"content-type": EVENT_STREAM})
        await self.send(text.encode())
        self.event_count += 1
        if self.fault is not None:
            await self.fault.after_event(self)

    async def json(self, status: int, value: object) -> None:
        """Send a whole JSON answer."""
        body = compact(value).encode()
        await self.start(status, {"content-type": "application/json"}, len(body))
        await self.send(body)

    def drop(self) -> None:
        """Close the connection in the middle of the answer; what was written before still arrives."""
        if self.wire.transport is not None:
            self.wire.transport.close()


@dataclass(kw_only=True)
class Fault:
    """Matches the next ``times`` requests of a kind (and of a run, if given); None means every one."""

    on: Kind = "any"
    run_id: str | None = None
    times: int | None = 1
    fired: int = field(default=0, init=False)

    def matches(self, record: Request) -> bool:
        """Tell whether this fault is meant for this request."""
        return self.on in ("any", record.kind) and self.run_id in (None, record.run_id)

    async def begin(self, exchange: Exchange) -> None:
        """Interfere before the server looks at the request; end the answer to keep it from looking."""

    def run_to_serve(self, run: FakeRun) -> FakeRun:
        """Interfere with which run's log is read."""
        return run

    async def send(self, exchange: Exchange, data: bytes) -> None:
        """Interfere with bytes on their way out."""
        await exchange.write(data)

    async def after_event(self, exchange: Exchange) -> None:
        """Interfere after an SSE event, keepalive pings included."""


@dataclass
class Answer(Fault):
    """Answer this instead: an error status, or any bytes at all (``body`` is sent ``repeat`` times)."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    repeat: int = 1

    async def begin(self, exchange: Exchange) -> None:
        """Send the scripted answer."""
        self.fired += 1
        is_stream = self.content_type.startswith("text/event-stream")
        length = None if is_stream else len(self.body) * self.repeat
        await exchange.start(self.status, {"content-type": self.content_type, **self.headers}, length)
        for _ in range(self.repeat):
            await exchange.write(self.body)
        raise EndOfAnswerError


@dataclass
class Cut(Fault):
    """Break the connection after so many bytes of the body; 0 means before any answer."""

    after_bytes: int = 0

    async def begin(self, exchange: Exchange) -> None:
        """Break at once, if that is what is asked for."""
        if self.after_bytes == 0:
            self._break(exchange)

    async def send(self, exchange: Exchange, data: bytes) -> None:
        """Send what still fits, then break."""
        room = self.after_bytes - exchange.record.bytes_sent
        await exchange.write(data[:room])
        if len(data) >= room:
            self._break(exchange)

    def _break(self, exchange: Exchange) -> None:
        self.fired += 1
        exchange.drop()
        raise EndOfAnswerError


@dataclass
class Hang(Fault):
    """Fall silent after so many events (0: before any answer) until released; then go on as if nothing was."""

    after_events: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def release(self) -> None:
        """Let every request held by this fault go on."""
        self.released.set()

    async def begin(self, exchange: Exchange) -> None:
        """Hold the request, if that is what is asked for."""
        if exchange.event_count == self.after_events:
            await self._hold()

    async def after_event(self, exchange: Exchange) -> None:
        """Hold the stream."""
        if exchange.event_count == self.after_events:
            await self._hold()

    async def _hold(self) -> None:
        self.fired += 1
        await self.released.wait()


@dataclass
class EndEarly(Fault):
    """End the response properly after so many events, without any marker that the run is over."""

    after_events: int = 0

    async def begin(self, exchange: Exchange) -> None:
        """End with an empty body."""
        if self.after_events == 0:
            await exchange.start(200, {"content-type": EVENT_STREAM})
            self._end()

    async def after_event(self, exchange: Exchange) -> None:
        """End after this event if it is the one."""
        if exchange.event_count == self.after_events:
            self._end()

    def _end(self) -> None:
        self.fired += 1
        raise EndOfAnswerError


@dataclass
class ReaderError(Fault):
    """Let the server's reader break after so many events: its own ``event: error``, not the run's."""

    after_events: int = 1
    error: str = "Error 111 connecting to 127.0.0.1:6379. Connect call failed ('127.0.0.1', 6379)."

    async def after_event(self, exchange: Exchange) -> None:
        """Send the error and end."""
        if exchange.event_count == self.after_events:
            self.fired += 1
            await exchange.write(reader_error(self.error))
            raise EndOfAnswerError


@dataclass
class OtherRun(Fault):
    """Deliver the chunks of another run than the one asked for."""

    run: FakeRun

    def run_to_serve(self, run: FakeRun) -> FakeRun:
        """Return the wrong run."""
        self.fired += run is not self.run
        return self.run


@dataclass
class Drip(Fault):
    """Send everything in small pieces with a pause after each."""

    piece: int = 1
    pause: float = 0.001

    async def send(self, exchange: Exchange, data: bytes) -> None:
        """Send piece by piece."""
        self.fired += exchange.record.bytes_sent == 0
        for start in range(0, len(data), self.piece):
            await exchange.write(data[start : start + self.piece])
            await asyncio.sleep(self.pause)


def reader_error(message: str) -> bytes:
    """Return the event the server sends when its own reading fails; json.dumps puts the spaces there."""
    escaped = compact(message)
    return f'event: error\ndata: {{"error": {escaped}, "code": "INTERNAL_SERVER_ERROR"}}\n\n'.encode()
