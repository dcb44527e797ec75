"""Places: never more than there are, none lost, the endangered first."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.places import ENDANGERED_AFTER, Places

NOW = datetime.now(UTC)
YOUNG = NOW - timedelta(minutes=1)


def endangered(minutes: float) -> datetime:
    """When a run was made that has been endangered for so long."""
    return NOW - ENDANGERED_AFTER - timedelta(minutes=minutes)


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_order() -> None:
    """Places are had in the order they were asked for, but endangered runs go first, the oldest of them before all."""
    places, had = Places(1), []

    async def hold(name: str, created_at: datetime) -> None:
        async with places.place(created_at):
            had.append(name)

    async with places.place(YOUNG):
        assert not places.is_wanted
        asked = [("a", YOUNG), ("b", endangered(1)), ("c", YOUNG - timedelta(hours=1)), ("d", endangered(9))]
        tasks = []
        for name, created_at in asked:
            tasks.append(asyncio.create_task(hold(name, created_at)))
            await settle()
        assert places.is_wanted
        assert had == []
    await asyncio.gather(*tasks)

    assert had == ["d", "b", "a", "c"]
    assert not places.is_wanted


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 3),
    steps=st.lists(st.tuples(st.sampled_from(["ask", "leave", "cancel", "wait"]), st.integers(0, 9)), max_size=40),
)
def test_places_are_never_lost_or_too_many(count: int, steps: list[tuple[str, int]]) -> None:  # noqa: C901 - a model
    """Whoever asks, leaves or gives up, and whenever: never more than `count` at once, and at the end all are free."""

    async def check() -> None:
        places, held, tasks, leave = Places(count), set(), {}, {}

        async def hold(number: int) -> None:
            async with places.place(YOUNG):
                held.add(number)
                assert len(held) <= count
                try:
                    await leave[number].wait()
                finally:
                    held.discard(number)

        for number, (step, choice) in enumerate(steps):
            if step == "ask":
                leave[number] = asyncio.Event()
                tasks[number] = asyncio.create_task(hold(number))
            elif step == "wait":
                await settle()
                assert len(held) == min(count, sum(not task.done() for task in tasks.values()))
            elif tasks:
                chosen = sorted(tasks)[choice % len(tasks)]
                leave[chosen].set() if step == "leave" else tasks[chosen].cancel()
        for event in leave.values():
            event.set()
        if tasks:
            await asyncio.wait(tasks.values())
        for task in tasks.values():
            assert task.cancelled() or task.exception() is None
        assert not places.is_wanted
        async with asyncio.timeout(1), contextlib.AsyncExitStack() as stack:
            for _ in range(count):
                await stack.enter_async_context(places.place(YOUNG))

    asyncio.run(check())
