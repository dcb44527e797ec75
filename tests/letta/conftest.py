"""Fixtures: FakeLetta, and the client as the worker's composition root makes it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from tests.letta.wire import SECRET
from worker import app
from worker.config import Config
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from worker.letta.client import LettaClient


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server with quick clocks."""
    async with FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.03, seed=1) as server:
        yield server


@pytest.fixture
def opened(letta: FakeLetta) -> Callable[..., contextlib.AbstractAsyncContextManager[LettaClient]]:
    """Opens a client with these settings; the server's address and a key unless they say otherwise."""

    def open_client(**settings: Any) -> contextlib.AbstractAsyncContextManager[LettaClient]:
        letta_settings = {"base_url": letta.url, "api_key": SECRET, **settings}
        return app.open_letta(Config.model_validate({"letta": letta_settings, "watch": {"all": True}}))

    return open_client


@pytest.fixture
async def client(
    opened: Callable[..., contextlib.AbstractAsyncContextManager[LettaClient]],
) -> AsyncIterator[LettaClient]:
    """The client with its default settings."""
    async with opened() as made:
        yield made
