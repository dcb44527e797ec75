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
from worker.core.records import RunRecord
from worker.demo.fake_faults import Answer
from worker.demo.fake_letta import FakeLetta, Paging
from worker.errors import TroubleError
from worker.letta.answers import RunPage
from worker.letta.paging import Paging as Walker

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
    return [run.run_id async for page in client.newest_runs(limit) for run in page.runs]


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
                    seen += [run.run_id for run in page.runs]
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
        assert len(page.runs) == 3
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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), max_size=12), st.integers(1, 4))
def test_entries_that_are_no_runs(usable: list[bool], limit: int) -> None:
    """Unreadable entries end no walk early and hide no run (I5); a page of nothing else is trouble, not the end."""
    made = [RunRecord(f"run-{n:02}", NOW - timedelta(minutes=n)) for n in range(len(usable))]
    entries = [run if is_run else None for run, is_run in zip(made, usable, strict=True)]

    async def page_of(limit: int, cursor: dict[str, str]) -> RunPage:
        if cursor.get("order") == "asc":
            chosen = entries[::-1][:limit]
        else:
            behind = next((n + 1 for n, run in enumerate(entries) if run and run.run_id == cursor.get("before")), 0)
            chosen = entries[behind : behind + limit] if "after" not in cursor else []
        runs = [run for run in chosen if run is not None]
        return RunPage(runs, len(chosen), TroubleError("no run") if len(runs) < len(chosen) else None)

    async def check() -> None:
        seen: list[RunRecord] = []
        troubles = 0
        try:
            async for page in Walker().walk(page_of, limit):
                seen += page.runs
                troubles += page.trouble is not None
        except TroubleError:
            troubles += 1
            assert None in entries
        else:
            assert seen == [run for run in entries if run is not None]
        assert (troubles > 0) == (len(seen) < len(entries))

    asyncio.run(check())
