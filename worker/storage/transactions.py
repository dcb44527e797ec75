"""How a write transaction runs: a function of a plain SQLAlchemy connection, as a whole. Used by committer.py.

On PostgreSQL it waits on the event loop, as everything else does. On SQLite it has a thread: sent there one by one,
each of its statements would wait until a loop busy with reading comes round again.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.storage.engine import is_sqlite, threaded_engine

Work = Callable[[sa.Connection], None]


class Transactions:
    """Runs them one at a time. `engine` is the one whose events tell of each."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._on_loop = engine
        self._thread: ThreadPoolExecutor | None = None
        self.engine = engine.sync_engine
        if is_sqlite(engine):
            # Of its own: in asyncio's a commit would queue behind name servers that do not answer.
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="transactions")
            self.engine = threaded_engine(engine.url)

    async def run(self, work: Work) -> None:
        """Do this in one transaction; returns when it is durable. Cancelled, it may become so all the same."""
        if self._thread is None:
            async with self._on_loop.begin() as connection:
                await connection.run_sync(work)
        else:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._run_here, work)

    def close(self) -> None:
        """Close the thread's connection when what is under way is done; nobody waits for that but the process's end."""
        if self._thread is not None:
            self._thread.submit(self.engine.dispose)

    def _run_here(self, work: Work) -> None:
        with self.engine.begin() as connection:
            work(connection)
