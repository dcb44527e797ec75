"""A TCP proxy between worker and server that goes wrong on request: real sockets, real resets, real silence.

Used by the tests/faults/test_network*.py. It passes bytes on and understands no more of HTTP than the request line
by which a fault is chosen; what happens to the bytes is decided by the faults, each of which counts how often it fired.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

HOST = "127.0.0.1"
READ_BYTES = 65536
NO_LINGER = struct.pack("ii", 1, 0)
"""Closing a socket with this sends RST instead of FIN."""

How = Literal["reset", "close", "silence"]


class LinkOverError(Exception):
    """A fault has ended this connection."""


@dataclass
class Asked:
    """One request as it came from the worker."""

    line: str
    head: bytes
    at: float = field(default_factory=time.monotonic)


@dataclass(kw_only=True)
class Fault:
    """Takes the next `times` requests whose line matches `on`, and passes everything on; the others do worse."""

    on: str = ""
    times: int = 1
    fired: int = field(default=0, init=False)

    async def begin(self, link: Link) -> None:
        """Interfere before the server sees the request; after `link.is_deaf = True` it never will."""

    async def pass_on(self, link: Link, data: bytes) -> None:
        """Interfere with bytes of the answer."""
        await link.send(data)


@dataclass
class Cut(Fault):
    """End the connection after so many bytes of the answer: by RST, by FIN, or half open, without a word for ever."""

    after: int = 0
    how: How = "reset"

    async def begin(self, link: Link) -> None:
        """End it before the server has the request."""
        if self.after == 0:
            await self._cut(link)

    async def pass_on(self, link: Link, data: bytes) -> None:
        """Pass on what still fits."""
        room = self.after - link.sent
        await link.send(data[:room])
        if len(data) >= room:
            await self._cut(link)

    async def _cut(self, link: Link) -> None:
        self.fired += 1
        if self.how == "silence":
            link.fall_silent()
            return
        await (link.reset() if self.how == "reset" else link.close())
        raise LinkOverError


@dataclass
class Refuse(Fault):
    """Reset the connection, and be a port nobody listens on for a while."""

    seconds: float = 0.1

    async def begin(self, link: Link) -> None:
        """Begin to refuse."""
        self.fired += 1
        await link.proxy.stop_listening()
        asyncio.get_running_loop().call_later(self.seconds, link.proxy.start_listening_soon)
        await link.reset()
        raise LinkOverError


@dataclass
class Delay(Fault):
    """Hold the answer back for a while."""

    seconds: float

    async def pass_on(self, link: Link, data: bytes) -> None:
        """Hold its first bytes."""
        if link.sent == 0:
            self.fired += 1
            await asyncio.sleep(self.seconds)
        await link.send(data)


@dataclass
class Drip(Fault):
    """Pass on the answer in small pieces, with a pause after each."""

    piece: int = 64
    pause: float = 0.001

    async def pass_on(self, link: Link, data: bytes) -> None:
        """Drip."""
        self.fired += link.sent == 0
        for start in range(0, len(data), self.piece):
            await link.send(data[start : start + self.piece])
            await asyncio.sleep(self.pause)


@dataclass
class Rewrite(Fault):
    """Exchange bytes in the head of the answer, as a meddling proxy does."""

    old: bytes
    new: bytes

    async def pass_on(self, link: Link, data: bytes) -> None:
        """Exchange them where they stand."""
        self.fired += self.old in data
        await link.send(data.replace(self.old, self.new))


@dataclass
class Answer(Fault):
    """Send these bytes in the server's place, and `tail` without end behind them; then leave, or stay for more."""

    answer: bytes
    tail: bytes = b""
    pause: float = 0.0
    then: Literal["stay", "reset", "close"] = "stay"

    async def begin(self, link: Link) -> None:
        """Answer."""
        self.fired += 1
        link.is_deaf = True
        await link.send(self.answer)
        while self.tail:
            await link.send(self.tail)
            await asyncio.sleep(self.pause)
        if self.then != "stay":
            await (link.reset() if self.then == "reset" else link.close())
            raise LinkOverError


@dataclass
class Redirect(Fault):
    """Send the worker elsewhere: to the same path at another base address, or to another path."""

    status: int
    to: str = ""

    async def begin(self, link: Link) -> None:
        """Redirect."""
        self.fired += 1
        link.is_deaf = True
        location = self.to if self.to.startswith("/") else (self.to or link.proxy.url) + link.line.split(" ")[1]
        await link.send(answer(self.status, b"", location=location))


@dataclass
class Record(Fault):
    """Keep what passes by."""

    answer: bytearray = field(default_factory=bytearray)

    async def pass_on(self, link: Link, data: bytes) -> None:
        """Keep and pass on."""
        self.fired += link.sent == 0
        self.answer += data
        await link.send(data)


def answer(status: int, body: bytes, content_type: str = "application/json", **headers: str) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status} Whatever", f"content-type: {content_type}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Link:
    """One connection of the worker, and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.line = ""
        self.sent = 0
        """Bytes of the present answer that went to the worker."""
        self.is_deaf = False
        """What the worker says goes nowhere."""
        self._fault = Fault()
        self._from_worker, self._to_worker = reader, writer
        self._is_mute = False

    async def serve(self) -> None:
        """Pass bytes both ways until one side leaves or a fault ends it."""
        try:
            from_server, self._to_server = await asyncio.open_connection(HOST, self.proxy.target)
        except ConnectionError:
            await self.reset()
            return
        ways = (self._pass_requests(self._to_server), self._pass_answers(from_server))
        tasks = [asyncio.create_task(self._ending(way)) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._to_worker.transport.abort()
            self._to_server.transport.abort()

    async def send(self, data: bytes) -> None:
        """Send to the worker."""
        if data and not self._is_mute:
            self.sent += len(data)
            self._to_worker.write(data)
            await self._to_worker.drain()

    def fall_silent(self) -> None:
        """Go half open: what either side sends is lost, and nobody is told."""
        self.is_deaf = self._is_mute = True

    async def close(self) -> None:
        """Say goodbye to the worker properly, after what was sent."""
        self._to_worker.close()
        with contextlib.suppress(ConnectionError):
            await self._to_worker.wait_closed()

    async def reset(self) -> None:
        """Send the worker RST."""
        sock = self._to_worker.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it may be closed already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._to_worker.transport.abort()

    async def _pass_requests(self, to_server: asyncio.StreamWriter) -> None:
        while data := await self._from_worker.read(READ_BYTES):
            if data.startswith((b"GET ", b"POST ")):  # the worker never sends a request before the last is answered
                self.is_deaf, self.sent = self._is_mute, 0
                head = data.partition(b"\r\n\r\n")[0]
                self.line = head.partition(b"\r\n")[0].decode()
                self._fault = self.proxy.take_fault(Asked(self.line, head))
                await self._fault.begin(self)
            if not self.is_deaf:
                to_server.write(data)
                await to_server.drain()

    async def _pass_answers(self, from_server: asyncio.StreamReader) -> None:
        while data := await from_server.read(READ_BYTES):
            if not self.is_deaf:
                await self._fault.pass_on(self, data)
        if self.is_deaf:
            await asyncio.Event().wait()
        await self.close()

    async def _ending(self, work: Awaitable[None]) -> None:
        try:
            await work
        except LinkOverError:
            pass
        except ConnectionError:
            await self.reset()


class Proxy:
    """Listens on a port of its own, in front of one on which the server listens."""

    def __init__(self, server_url: str) -> None:
        self.target = int(server_url.rpartition(":")[2])
        self.faults: list[Fault] = []
        self.requests: list[Asked] = []
        self.accepted: list[float] = []
        """When each connection came; of the monotonic clock."""
        self.is_down = False
        """Every connection is reset as it comes, which, unlike one to a closed port, can be counted."""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], Link] = {}
        self._restarting: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.start_listening()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._restarting:
            task.cancel()
        await self.stop_listening()
        tasks = set(self._links)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    @property
    def url(self) -> str:
        """The base URL for the worker; it stays the same."""
        return f"http://{HOST}:{self._port}"

    async def start_listening(self) -> None:
        """Accept connections, on the port of the last time if there was one."""
        self._server = await asyncio.start_server(self._accept, HOST, self._port, backlog=4096)
        self._port = self._server.sockets[0].getsockname()[1]

    def start_listening_soon(self) -> None:
        """The same, for whoever cannot wait."""
        task = asyncio.create_task(self.start_listening())
        self._restarting.add(task)
        task.add_done_callback(self._restarting.discard)

    async def stop_listening(self) -> None:
        """Refuse new connections; those that are open go on."""
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)

    def fall_silent(self, on: str) -> list[float]:
        """Let every connection on which this was asked for last go half open; return since when, for each."""
        links = [link for link in self._links.values() if re.search(on, link.line)]
        for link in links:
            link.fall_silent()
        return [time.monotonic() for _ in links]

    async def reset_all(self) -> None:
        """Send RST to the worker on every connection."""
        for link in list(self._links.values()):
            await link.reset()

    def asked(self, on: str) -> list[Asked]:
        """The requests whose line matches."""
        return [asked for asked in self.requests if re.search(on, asked.line)]

    def take_fault(self, asked: Asked) -> Fault:
        """The fault a request meets; one that does nothing if there is none for it."""
        self.requests.append(asked)
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.on, asked.line):
                fault.times -= 1
                return fault
        return Fault()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.append(time.monotonic())
        link = Link(self, reader, writer)
        if self.is_down:
            await link.reset()
            return
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = link
        try:
            with contextlib.suppress(asyncio.CancelledError):  # only ever by us
                await link.serve()
        finally:
            del self._links[task]


@contextlib.asynccontextmanager
async def unanswering() -> AsyncIterator[str]:
    """The URL of a port at which connections are neither accepted nor refused: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((HOST, 0), backlog=0))
        loop = asyncio.get_running_loop()
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)  # noqa: FBT003 - the socket API
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await loop.sock_connect(waiting, listener.getsockname())
        yield f"http://{HOST}:{listener.getsockname()[1]}"
