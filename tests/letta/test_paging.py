"""Walking the list of runs never loops and never skips, whichever way the server's cursors go (letta-protocol e)."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.letta.wire import SECRET
from worker import app
from worker.config import Config
from worker.demo.fake_faults import Answer
from worker.demo.fake_letta import FakeLetta, Paging
from worker.errors import TroubleError

if TYPE_CHECKING:
    from worker.letta.client import LettaClient

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
WAYS: tuple[Paging, ...] = get_args(Paging)


def order_of(letta: FakeLetta) -> list[str]:
    """The ids of all runs, newest first, by time and then by id."""
    runs = sorted(letta.runs.values(), key=lambda run: (run.created_at, run.id), reverse=True)
    return [run.id for run in runs]


async def walked(client: LettaClient, limit: int) -> list[str]:
    """The ids a walk brings, page by page."""
    return [run.run_id async for page in client.newest_runs(limit) for run in page]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    ways=st.lists(st.sampled_from(["swapped", "named"]), min_size=1, max_size=3),
    minutes=st.lists(st.integers(0, 6), max_size=14),
    limit=st.integers(1, 5),
    late=st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 8)), max_size=4),
)
def test_walks(ways: list[Paging], minutes: list[int], limit: int, late: list[tuple[int, int]]) -> None:
    """A walk brings every run there was, once, in order, with ties, exact multiples and runs that come meanwhile."""

    async def check() -> None:
        async with FakeLetta(seed=1) as letta, opened(letta) as client:
            for minute in minutes:
                letta.new_run(created_at=NOW + timedelta(minutes=minute))
            for way in ways:  # what one walk has learned of the server is not believed by the next
                letta.paging = way
                before, pages, seen = order_of(letta), 0, []
                async for page in client.newest_runs(limit):
                    seen += [run.run_id for run in page]
                    for _ in [place for place, _ in late if place == pages]:
                        minute = next(m for place, m in late if place == pages)
                        letta.new_run(created_at=NOW + timedelta(minutes=minute))
                    pages += 1
                    assert pages <= len(letta.runs) + 1
                assert [run_id for run_id in seen if run_id in before] == before
                assert seen == [run_id for run_id in order_of(letta) if run_id in seen]

    asyncio.run(check())


def opened(letta: FakeLetta) -> Any:
    """A client of this server."""
    return app.open_letta(
        Config.model_validate({"letta": {"base_url": letta.url, "api_key": SECRET}, "watch": {"all": True}})
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("count", "limit"), [(0, 1), (1, 1), (3, 3), (2, 3), (5, 5)])
async def test_one_page(letta: FakeLetta, client: LettaClient, way: Paging, count: int, limit: int) -> None:
    """Where all fits one page, exactly or not, that page is all, even if the server ignores cursors."""
    letta.paging = way
    for _ in range(count):
        letta.new_run(created_at=NOW)

    assert await walked(client, limit) == order_of(letta)


@pytest.mark.parametrize("way", ["swapped", "named"])
@pytest.mark.parametrize("count", [6, 7, 8, 9])
async def test_multiples(letta: FakeLetta, client: LettaClient, way: Paging, count: int) -> None:
    """A last page that is full is no reason to stop, or to go on for ever; all runs may be of one moment."""
    letta.paging = way
    for _ in range(count):
        letta.new_run(created_at=NOW)

    assert await walked(client, 3) == order_of(letta)
    assert await walked(client, 3) == order_of(letta)


async def test_cursors_ignored(letta: FakeLetta, client: LettaClient) -> None:
    """A server that always sends the first page is caught out: what is behind it would be missed silently."""
    letta.paging = "ignored"
    for minute in range(5):
        letta.new_run(created_at=NOW + timedelta(minutes=minute))

    with pytest.raises(TroubleError, match="paging by before and after fails"):
        await walked(client, 3)

    assert len(letta.requests) <= 4


async def test_only_one_request_where_one_is_enough(letta: FakeLetta, client: LettaClient) -> None:
    """Whoever needs only the newest page pays for that page alone."""
    for minute in range(9):
        letta.new_run(created_at=NOW + timedelta(minutes=minute))

    async for page in client.newest_runs(3):
        assert len(page) == 3
        break

    assert [(request.path, request.query) for request in letta.requests] == [
        ("/v1/runs/", {"order": "desc", "limit": "3"})
    ]


async def test_trouble_on_the_way(letta: FakeLetta, client: LettaClient) -> None:
    """A page that fails fails the walk; the next walk is whole."""
    for minute in range(9):
        letta.new_run(created_at=NOW + timedelta(minutes=minute))
    walk = client.newest_runs(3)
    await anext(walk)
    fault = Answer(500, on="runs")
    letta.faults.append(fault)

    with pytest.raises(TroubleError):
        await anext(walk)

    assert fault.fired == 1
    assert await walked(client, 3) == order_of(letta)
