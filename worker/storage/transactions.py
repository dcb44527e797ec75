"""Where write transactions run: a thread of their own. Used by committer.py; app.py opens and closes it.

On the loop that reads the streams each statement would wait until that loop comes round again, and it is busy just
when there is much to write.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Self

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.storage.engine import GOODBYE_SECONDS, create_writing_engine

Work = Callable[[sa.Connection], None]


class Transactions:
    """Runs transactions, inside `async with`."""

    def __init__(self, url: str) -> None:
        self._engine = create_writing_engine(url)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="transactions", daemon=True)
        self._loop = Future[asyncio.AbstractEventLoop]()
        self._is_over = asyncio.Event()

    @property
    def engine(self) -> sa.Engine:
        """The engine whose events tell of each of them."""
        return self._engine.sync_engine if isinstance(self._engine, AsyncEngine) else self._engine

    async def __aenter__(self) -> Self:
        self._thread.start()
        await asyncio.wrap_future(self._loop)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.result().call_soon_threadsafe(self._is_over.set)
        await asyncio.to_thread(self._thread.join, GOODBYE_SECONDS)

    async def run(self, work: Work) -> None:
        """Do this in one transaction; returns when it is durable. Cancelled, it may become so all the same."""
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._transact(work), self._loop.result()))

    async def _live(self) -> None:
        self._loop.set_result(asyncio.get_running_loop())
        await self._is_over.wait()
        if isinstance(self._engine, AsyncEngine):
            await self._engine.dispose()
        else:
            self._engine.dispose()

    async def _transact(self, work: Work) -> None:
        if isinstance(self._engine, AsyncEngine):
            async with self._engine.begin() as connection:
                await connection.run_sync(work)
        else:
            with self._engine.begin() as connection:  # the loop stands still meanwhile: it has nothing else to do
                work(connection)
