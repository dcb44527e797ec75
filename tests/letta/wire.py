"""What stands between client and server in these tests: raw servers of a few lines, and a byte relay."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    from worker.core.chunks import Event
    from worker.letta.client import Address, LettaClient

SECRET = "sk-never-to-be-seen"


async def events_of(client: LettaClient, address: Address, cursor: int = 0) -> list[Event]:
    """Read a stream to its end."""
    async with client.stream(address, cursor) as received:
        return [event for events in [lot async for lot in received] for event in events]


class Relay:
    """Passes bytes on to a port, with or without TLS in front, and keeps what the client said first."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.port = 0


@contextlib.asynccontextmanager
async def relaying(target: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[Relay]:
    """A TLS terminator, or a proxy: FakeLetta understands the absolute address a proxy is asked with."""
    relay = Relay()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        relay.heads.append(head)
        back, forth = await asyncio.open_connection("127.0.0.1", target)
        try:
            forth.write(head)
            await asyncio.gather(_pass_on(reader, forth), _pass_on(back, writer))
        finally:
            forth.transport.abort()

    async with serving(serve, tls) as port:
        relay.port = port
        yield relay


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while received := await reader.read(65536):
            writer.write(received)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def answering(answer: bytes, *, resets: bool = False) -> AsyncIterator[int]:
    """A server that sends these bytes, whatever it is asked, and closes the connection (or resets it)."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if resets:
            writer.transport.abort()
        else:
            await writer.drain()
            writer.close()

    async with serving(serve) as port:
        yield port


@contextlib.asynccontextmanager
async def serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Listen on a free loopback port; every connection is over when this is."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await serve(reader, writer)
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
