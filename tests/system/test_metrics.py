"""/metrics of a real worker process: the figures are what happened, and asking costs little."""

from __future__ import annotations

import asyncio
import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

import asyncpg
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.lives import until
from tests.support.promlint import faults_of
from tests.support.rig import SECRET as KEY
from tests.support.rig import working
from tests.support.shell import SECRET, Shell, free_address
from worker import census
from worker.census import Census
from worker.core.records import STREAM_EXPIRY
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.support.rig import Rig


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server that asks for a key."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as server:
        yield server


class Page:
    """One look at /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the series with this name and these labels."""
        found = [
            s.value for s in self._samples if s.name == f"letta_ingest_{name}" and labels.items() <= s.labels.items()
        ]
        assert found, name
        return sum(found)


async def page_of(shell: Shell) -> Page:
    """Scrape."""
    async with httpx.AsyncClient(base_url=f"http://{shell.listen}", trust_env=False) as client:
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return Page(answer.text)


async def until_page(shell: Shell, is_so: Callable[[Page], bool]) -> Page:
    """Scrape until it is so."""
    async with asyncio.timeout(10):
        while not is_so(page := await page_of(shell)):  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.05)
    return page


async def test_figures_are_what_happened(letta: FakeLetta, database_url: str, tmp_path: Path) -> None:
    """Promise 4: the figures of a worker process are those of what it did, and pass Prometheus' linter as they are."""
    shell = Shell(letta, tmp_path, database_url, listen=free_address())
    done, live = letta.new_run(), letta.new_run()
    done.say("hello")
    done.complete()
    live.say("hello")
    await shell.do("migrate")
    began_at = time.time()
    life = shell.start("run")
    await shell.until_logged(life, "run.finished")
    rows = len(done.expected_rows()) + len(live.expected_rows())
    page = await until_page(shell, lambda page: page("chunks_stored_total") >= rows)
    assert faults_of(page.text) == []

    assert page("chunks_stored_total") == rows
    assert page("commit_chunks_sum") == rows
    assert page("commits_total") == page("commit_duration_seconds_count") == page("commit_chunks_count") > 2
    assert 2 <= page("commit_lag_seconds_count") <= rows
    assert 0 < page("commit_lag_seconds_sum") < 10 * page("commit_lag_seconds_count")
    assert page("commit_lag_seconds_bucket", le="60.0") == page("commit_lag_seconds_count")
    assert page("received_bytes_total") > sum(len(payload) for _, payload in done.expected_rows())
    assert (page("runs_finished_total", state="complete"), page("runs_finished_total")) == (1, 1)
    assert (page("backfills_total", result="fetched"), page("backfills_total")) == (1, 1)
    assert (page("followers", state="reading"), page("followers")) == (1, 1)
    assert page("nearest_expiry_timestamp_seconds") == pytest.approx((live.created_at + STREAM_EXPIRY).timestamp())
    for name in ("discovery", "commit"):
        assert began_at < page(f"{name}_last_success_timestamp_seconds") < time.time()
    nothing = ("gaps_total", "rejects_total", "chunks_duplicate_total", "unacknowledged_chunks", "unacknowledged_bytes")
    assert [page(name) for name in nothing] == [0] * 5
    assert page("build_info", version=version("letta-ingest"), python=platform.python_version()) == 1

    received = page("received_bytes_total")
    await letta.drop_connections()
    await until_page(shell, lambda page: page("reconnects_total") > 0 and page("received_bytes_total") > received)
    live.complete()
    await until(lambda: len([line for line in shell.logged(life) if line["event"] == "run.finished"]) == 2, 10)
    page = await page_of(shell)
    assert (page("followers"), page("nearest_expiry_timestamp_seconds")) == (0, float("inf"))
    assert await shell.stop(life) == 0


async def test_what_waits_is_counted(letta: FakeLetta, sqlite_url: str) -> None:
    """I8: chunks that wait for their commit are counted, in number and bytes, and how long they waited is measured."""
    letta.password = KEY
    run = letta.new_run()
    run.say("hello")
    run.complete()
    async with working(letta, sqlite_url) as rig:
        await rig.sweep()
    async with working(letta, sqlite_url, commits=False) as rig:
        value = rig.metrics.registry.get_sample_value
        following = asyncio.create_task(rig.follow(run))
        await until(lambda: value("letta_ingest_unacknowledged_chunks") == len(run.expected_rows()), 10)
        assert (value("letta_ingest_unacknowledged_bytes") or 0) > sum(len(text) for _, text in run.expected_rows())
        await asyncio.sleep(0.2)
        committing = asyncio.create_task(rig.committer.run())
        await following
        assert value("letta_ingest_unacknowledged_chunks") == value("letta_ingest_unacknowledged_bytes") == 0
        assert (value("letta_ingest_commit_lag_seconds_sum") or 0) >= 0.2
        committing.cancel()
        await asyncio.wait([committing])


def counted(rig: Rig) -> float | None:
    """Runs that are waiting, as the last census found them."""
    return rig.metrics.registry.get_sample_value("letta_ingest_runs", {"state": "pending"})


async def test_counting_is_bounded(letta: FakeLetta, postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: runs are counted in the store seldom, however often somebody asks, and a slow count holds nobody up."""
    letta.password = KEY
    monkeypatch.setattr(census, "REST_SECONDS", 0.5)
    monkeypatch.setattr(census, "REST_TIMES", 0)
    async with working(letta, postgresql_url) as rig:
        counts = Census(rig.reads, rig.metrics)
        letta.new_run()
        await rig.sweep()
        await counts.refresh(5)
        assert counted(rig) == 1
        letta.new_run()
        await rig.sweep()
        await counts.refresh(5)
        assert counted(rig) == 1, "counted again at once"
        await asyncio.sleep(0.6)
        other = await asyncpg.connect(postgresql_url)
        async with other.transaction():
            await other.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
            began = time.monotonic()
            await counts.refresh(0.1)
            await counts.refresh(0.1)
            assert time.monotonic() - began < 1
            assert counted(rig) == 1
        await counts.refresh(5)
        assert counted(rig) == 2
        await other.close()
        await counts.close()
