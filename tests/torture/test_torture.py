"""The crash campaign: kill after kill, at random and at every durable boundary, on each database, while agents talk.

`make torture` runs it: KILLS kills on each database, or as many as fit into MINUTES, chosen and timed by SEED. Each
life of the worker has another batch size and another number of streams. In the end the rows are compared with the
server's own logs. The figures go to .cache/torture: one JSON file for each database, and a chart.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.torture.campaign import SPEAKERS, campaigning, talking
from tests.torture.faults import in_migration, inflict, kinds, plan
from tests.torture.figures import Figures, chart

if TYPE_CHECKING:
    from collections.abc import Iterator

KILLS = int(os.environ.get("LETTA_INGEST_KILLS") or "200")
MINUTES = float(os.environ.get("LETTA_INGEST_MINUTES") or "0")
SEED = int(os.environ.get("LETTA_INGEST_SEED") or "1")
REPORT = Path(__file__).parents[2] / ".cache" / "torture"

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def report() -> Iterator[list[Figures]]:
    """The campaigns of this session; written down when they are over."""
    campaigns: list[Figures] = []
    yield campaigns
    REPORT.mkdir(parents=True, exist_ok=True)
    for figures in campaigns:
        (REPORT / f"{figures.database}.json").write_text(json.dumps(figures.as_json(), indent=1))
    if campaigns:
        (REPORT / "torture.svg").write_text(chart(campaigns))


async def test_kills_lose_and_double_nothing(database_url: str, tmp_path: Path, report: list[Figures]) -> None:
    """Whatever is killed or stopped, and wherever: every chunk is stored exactly once (I1, I2, I3, I4, I5)."""
    figures = Figures(database_url.partition(":")[0], SEED)
    async with campaigning(database_url, tmp_path, figures) as campaign:
        for _ in range(max(2, KILLS // 100)):
            await in_migration(campaign)
            await campaign.bury()
        assert await campaign.start("migrate").life.wait(60) == 0
        async with talking(campaign):
            faults = plan(random.Random(SEED), is_server=campaign.look.is_server)
            for number, fault in enumerate(faults):
                is_enough = figures.seconds() >= 60 * MINUTES if MINUTES else len(figures.kills) >= KILLS
                if is_enough and number >= kinds(is_server=campaign.look.is_server):
                    break
                await inflict(campaign, fault)
            tally = await campaign.end()
        stored = await campaign.look.runs()
        gaps, rejects = await campaign.look.count("gaps"), await campaign.look.count("rejects")
    report.append(figures)
    print(figures.as_text())
    assert tally.is_exact, tally
    totals = {run.id: len(run.expected_rows()) for run in campaign.letta.runs.values()}
    assert {run_id: (run.state, run.cursor, run.rows) for run_id, run in stored.items()} == {
        run_id: ("complete", total, total) for run_id, total in totals.items()
    }
    assert (figures.runs, figures.chunks) == (tally.runs, tally.chunks)
    assert (gaps, rejects) == (0, 0)
    assert figures.sides("in COMMIT") == {"gone", "durable"}
    assert figures.fewest_live >= SPEAKERS - 8
