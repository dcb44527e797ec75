"""Fixtures for the tests of FakeLetta: the server and a plain client of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server with quick clocks: what takes seconds at the real one takes hundredths here."""
    async with FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.03, seed=1) as server:
        yield server


@pytest.fixture
async def client(letta: FakeLetta) -> AsyncIterator[httpx.AsyncClient]:
    """A plain client of that server."""
    async with httpx.AsyncClient(base_url=letta.url, timeout=5, trust_env=False) as session:
        yield session
