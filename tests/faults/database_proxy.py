"""A network between worker and PostgreSQL that can be told what to do to commits; for tests/faults/test_database*.py.

It reads just enough of the protocol to know a COMMIT and its answer: both are small messages that asyncpg and the
server send by themselves, not in the middle of others.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

COMMIT = b"Q\x00\x00\x00\x0cCOMMIT;\x00"
COMMITTED = b"C\x00\x00\x00\x0bCOMMIT\x00"

Cut = Literal["before the commit", "before its answer"]


class DatabaseProxy:
    """Enter it with the server's port; the worker connects to `port`."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._links: set[asyncio.Task[None]] = set()
        self._is_flowing = asyncio.Event()
        self._is_flowing.set()
        self.port = 0
        self.cut: Cut | None = None
        self.cut_every = 2
        """Of so many commits one is cut."""
        self.delay = 0.0
        """Seconds each commit waits on its way."""
        self.commits = 0
        """COMMITs that came from the worker."""
        self.lost = 0
        """Those of them that never reached the server."""
        self.unheard = 0
        """Those that the server has done, and the worker never heard of."""
        self.held = 0
        """Reads that were not passed on for the time being."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def through(self, url: str) -> str:
        """The same database, by this way."""
        return url.replace(f":{self._upstream}/", f":{self.port}/")

    def fall_silent(self) -> None:
        """Let no byte through any more, in either direction; connections stay open, and new ones are accepted."""
        self._is_flowing.clear()

    def flow(self) -> None:
        """Let through what was held back, and everything else."""
        self._is_flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.close()
            return
        link = asyncio.create_task(self._link(reader, writer, far_reader, far_writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        """Copy both ways until one side leaves or is cut off; then leave both."""
        is_unheard = asyncio.Event()
        ways: list[Coroutine[Any, Any, None]] = [
            self._copy_up(reader, far_writer, is_unheard),
            self._copy_down(far_reader, writer, is_unheard),
        ]
        tasks = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for end in (writer, far_writer):
                end.transport.abort()

    async def _hold(self) -> None:
        self.held += not self._is_flowing.is_set()
        await self._is_flowing.wait()

    async def _copy_up(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_unheard: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 16):
            await self._hold()
            if COMMIT in data:
                self.commits += 1
                await asyncio.sleep(self.delay)
                if self.cut is not None and self.commits % self.cut_every == 0:
                    if self.cut == "before the commit":
                        self.lost += 1
                        return
                    is_unheard.set()
            writer.write(data)
            await writer.drain()

    async def _copy_down(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_unheard: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 16):
            await self._hold()
            if is_unheard.is_set() and COMMITTED in data:
                self.unheard += 1
                return
            writer.write(data)
            await writer.drain()
