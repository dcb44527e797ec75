"""Fixtures of the behaviour suite: FakeLetta and the real server, one after the other, and a plain client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.behaviour.fake_server import FakeServer
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.behaviour.server import LettaUnderTest
    from tests.real_letta.driver import Driver
    from tests.real_letta.lab.lab import Lab


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
def lab_parts(request: pytest.FixtureRequest) -> tuple[Lab, Driver] | None:
    """The lab, if the real server is meant. Started outside of any event loop, as it uses loops of its own."""
    if request.param == "fake":
        return None
    return request.getfixturevalue("lab"), request.getfixturevalue("driver")


@pytest.fixture
async def letta(lab_parts: tuple[Lab, Driver] | None) -> AsyncIterator[LettaUnderTest]:
    """The server under test."""
    if lab_parts is None:
        async with FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.004, seed=1) as fake:
            yield FakeServer(fake)
        return
    from tests.behaviour.real_server import RealServer  # noqa: PLC0415 - needs what only `make real` has

    real = RealServer(*lab_parts)
    yield real
    await real.close()


@pytest.fixture
async def client(letta: LettaUnderTest) -> AsyncIterator[httpx.AsyncClient]:
    """A plain client of that server. Each request has its own connection: an idle one is closed after 5 s (j)."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=letta.url, timeout=30, limits=limits, trust_env=False) as session:
        yield session
