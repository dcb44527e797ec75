"""A server and a systemd for a worker's process; a test that needs another server has a fixture of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.shell import SECRET
from tests.support.systemd import Systemd
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server that asks for a key."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as server:
        yield server


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    """A systemd, whose socket a worker is given."""
    made = Systemd()
    yield made
    made.close()
