"""Write transactions: beside the loop that reads, whole or not at all, and nothing left open behind them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tests.storage.store import Store, known, lot
from worker.storage import tables
from worker.storage.transactions import Transactions
from worker.storage.writes import write

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNKS = (known("run-1"), lot("run-1", 1, 3))


def writing(store: Store, then: Callable[[], None]) -> Callable[[sa.Connection], None]:
    """Work that writes some chunks and then does this, in its thread."""

    def work(connection: sa.Connection) -> None:
        write(connection, store.dialect, CHUNKS)
        then()

    return work


async def test_reading_goes_on_meanwhile(store: Store) -> None:
    """I8: The loop of the streams has its turns while a transaction is slow; none of them waits for it."""
    running = asyncio.create_task(store.transactions.run(writing(store, lambda: time.sleep(0.5))))
    turns = 0
    while not running.done():
        await asyncio.sleep(0.01)
        turns += 1
    await running
    assert turns >= 20
    assert await store.count(tables.chunks) == 3


async def test_a_failure_comes_back_and_leaves_nothing(store: Store) -> None:
    """I3: What is wrong in a transaction is raised where it was asked for, and all of it is undone."""
    failure = RuntimeError("half way")

    def fail() -> None:
        raise failure

    with pytest.raises(RuntimeError) as raised:
        await store.transactions.run(writing(store, fail))
    assert raised.value is failure
    assert await store.count(tables.runs) == 0


async def test_a_cancelled_wait_leaves_all_or_nothing(store: Store) -> None:
    """I3: Whoever stops waiting stops no transaction half way, and the next one works."""
    begun, go_on = threading.Event(), threading.Event()

    def linger() -> None:
        begun.set()
        go_on.wait(10)

    waiting = asyncio.create_task(store.transactions.run(writing(store, linger)))
    await asyncio.to_thread(begun.wait, 10)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert waiting.cancelled()
    go_on.set()
    await store.transactions.run(lambda connection: None)
    assert (await store.count(tables.runs), await store.count(tables.chunks)) in {(0, 0), (1, 3)}
    await store.write(*CHUNKS)
    assert await store.count(tables.chunks) == 3


async def test_nothing_is_left_open(store: Store) -> None:
    """At the end its thread is over and its connection closed."""
    sessions: list[int] = []

    def note(connection: sa.Connection) -> None:
        if connection.dialect.name == "postgresql":
            sessions.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())

    before = set(threading.enumerate())
    async with Transactions(store.url) as transactions:
        await transactions.run(note)
        assert len(set(threading.enumerate()) - before) >= 1
        pool = transactions.engine.pool
        assert (pool.checkedin(), pool.checkedout()) == (1, 0)  # type: ignore[attr-defined]
    assert pool.checkedin() == 0  # type: ignore[attr-defined]
    assert [thread for thread in set(threading.enumerate()) - before if thread.name == "transactions"] == []
    if sessions:
        alive = sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:pids)").bindparams(pids=sessions)
        async with asyncio.timeout(5):
            while await store.all(alive) != [(0,)]:  # type: ignore[arg-type] # noqa: ASYNC110 - happens in the server
                await asyncio.sleep(0.02)
