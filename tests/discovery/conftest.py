"""Fixtures: FakeLetta with quick clocks, and a worker in this process that follows it (tests/support/rig.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.rig import hurry, working
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.rig import Rig


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    hurry(monkeypatch)


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server with quick clocks: what takes seconds at the real one takes hundredths here."""
    async with FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.03, seed=1) as server:
        yield server


@pytest.fixture
async def rig(letta: FakeLetta, sqlite_url: str) -> AsyncIterator[Rig]:
    """A worker on SQLite."""
    async with working(letta, sqlite_url) as made:
        yield made


@pytest.fixture
async def rig_on_both(letta: FakeLetta, database_url: str) -> AsyncIterator[Rig]:
    """A worker on SQLite and on PostgreSQL, one after the other."""
    async with working(letta, database_url) as made:
        yield made
