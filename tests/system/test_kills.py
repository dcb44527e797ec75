"""The kill campaign: SIGKILL after SIGKILL at random moments, on each database, while dozens of runs talk.

`make kills` runs it; LETTA_INGEST_KILLS and LETTA_INGEST_SEED choose how many kills and which. Between two kills the
worker lives until it has stored something, plus up to a fifth of a second, and then until it stores again; some are
killed while they start. Each life has another batch size and another number of streams. In the end the rows are
compared with the server's own logs.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.support.lives import Life, until
from tests.support.looks import looking
from worker.demo.fake_letta import FakeLetta
from worker.demo.proof import compare
from worker.demo.talk import Talk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.looks import Look, RunLook

KILLS = int(os.environ.get("LETTA_INGEST_KILLS", "200"))
SEED = int(os.environ.get("LETTA_INGEST_SEED", "1"))

SPEAKERS = 24
CHUNKS_PER_SECOND = 600.0
LONGEST_RUN = 400
KILLED_EARLY = 0.04
"""The share of lives that are killed at any moment of their start, whether they have stored anything or not."""
RECENT_SECONDS = 0.1
"""A kill landed mid-write if rows were added so shortly before it."""
FIRST_ROWS_SECONDS = 30.0
END_SECONDS = 180.0

CONFIG = """\
letta = {{ base_url = "{url}", batch_size = {batch_size}, max_streams = {max_streams} }}
watch = {{ all = true }}
storage = {{ url = "{database_url}" }}
discovery = {{ interval = 0.3 }}
service = {{ listen = "127.0.0.1:0" }}
"""

pytestmark = pytest.mark.campaign


@dataclass(frozen=True)
class Kill:
    """What one kill interrupted: the seconds since rows were last added, and the rows of runs that were not over."""

    seconds_since_rows: float
    unfinished: dict[str, int]

    def landed(self, totals: dict[str, int]) -> bool:
        """Tell whether rows were being written, of a run that had some and was to get more."""
        is_half_way = any(0 < rows < totals[run_id] for run_id, rows in self.unfinished.items())
        return is_half_way and self.seconds_since_rows <= RECENT_SECONDS


@dataclass
class Campaign:
    """One worker, one life at a time, on one database."""

    letta: FakeLetta
    talk: Talk
    look: Look
    folder: Path
    database_url: str
    chance: random.Random = field(default_factory=lambda: random.Random(SEED))
    kills: list[Kill] = field(default_factory=list)
    cursors: dict[str, int] = field(default_factory=dict)
    fewest_live: int = SPEAKERS

    def start(self, *options: str) -> Life:
        """Start a life with settings of its own."""
        config, log = self.folder / "config.toml", self.folder / "worker.log"
        batch_size, max_streams = self.chance.choice((2, 10, 1000)), self.chance.choice((8, 16, 40))
        settings = {"url": self.letta.url, "batch_size": batch_size, "max_streams": max_streams}
        config.write_text(CONFIG.format(**settings, database_url=self.database_url))
        return Life([*options, "--config", str(config)], log)

    async def kill_once(self) -> None:
        """Let the worker live until a random moment, kill it, and see what it left."""
        life = self.start("run")
        try:
            if self.chance.random() < KILLED_EARLY:
                await asyncio.sleep(self.chance.uniform(0, 0.5))
                added_at, runs = 0.0, {}
            else:
                added_at, runs = await self._watch(life, self.chance.uniform(0, 0.2))
                await asyncio.sleep(self.chance.uniform(0, 0.03))
            seconds = time.monotonic() - added_at
            assert life.exit_code is None, f"the worker ended by itself:\n{self.log_tail()}"
        finally:
            life.kill()
        live = {run.id for run in self.talk.live_runs}
        self.fewest_live = min(self.fewest_live, len(live))
        self.kills.append(Kill(seconds, {run_id: run.rows for run_id, run in runs.items() if run_id in live}))
        if self.chance.random() < 0.5:  # else the worker is the first to see what is left
            await self._check_cursors()

    async def end(self) -> None:
        """Let all runs end, and the worker store what there is."""
        code = await self.start("run", "--once").wait(END_SECONDS)
        assert code == 0, self.log_tail()

    def log_tail(self) -> str:
        """The end of the worker's log."""
        return (self.folder / "worker.log").read_text()[-3000:]

    async def _watch(self, life: Life, seconds: float) -> tuple[float, dict[str, RunLook]]:
        """Look again and again until rows are added that long after the first rows of this life; say when that was."""
        deadline, before, end = time.monotonic() + FIRST_ROWS_SECONDS, None, None
        await asyncio.sleep(0.05)  # what the last life had handed to PostgreSQL is not this one's
        while True:
            runs = await self.look.runs()
            rows, now = sum(run.rows for run in runs.values()), time.monotonic()
            if before is not None and rows > before:
                end = end or now + seconds
                if now >= end:
                    return now, runs
            before = rows
            assert now < deadline, f"nothing was stored in {FIRST_ROWS_SECONDS:.0f} s:\n{self.log_tail()}"
            assert life.exit_code is None, f"the worker ended by itself:\n{self.log_tail()}"
            await asyncio.sleep(0.004)

    async def _check_cursors(self) -> None:
        """I2, I3: no cursor leads its rows, and none has gone back."""
        for run_id, run in (await self.look.counted(only_unsettled=True)).items():
            assert run.cursor <= run.rows, f"{run_id}: cursor {run.cursor}, rows {run.rows}"
            assert run.cursor >= self.cursors.get(run_id, 0), f"{run_id}: the cursor went back to {run.cursor}"
            self.cursors[run_id] = run.cursor


@asynccontextmanager
async def campaign(database_url: str, folder: Path) -> AsyncIterator[Campaign]:
    """Let the agents talk, and stop them."""
    async with FakeLetta(keepalive_interval=0.2, seed=SEED) as letta:
        talk = Talk(letta, speakers=SPEAKERS, seed=SEED, chunks_per_second=CHUNKS_PER_SECOND, longest=LONGEST_RUN)
        config = folder / "config.toml"
        settings = {"url": letta.url, "batch_size": 1000, "max_streams": 16}
        config.write_text(CONFIG.format(**settings, database_url=database_url))
        assert await Life(["migrate", "--config", str(config)], folder / "worker.log").wait(60) == 0
        talking = asyncio.create_task(talk.speak())
        try:
            async with looking(database_url) as look:
                yield Campaign(letta, talk, look, folder, database_url)
            await talking
        finally:
            talking.cancel()


async def test_kills_lose_and_double_nothing(database_url: str, tmp_path: Path) -> None:
    """I1, I2, I3, I5: after every SIGKILL the worker goes on from its cursors; every chunk is stored exactly once."""
    began = time.monotonic()
    async with campaign(database_url, tmp_path) as it:
        await until(lambda: len(it.letta.runs) >= SPEAKERS, 10)
        while len(it.kills) < KILLS:
            await it.kill_once()
        it.talk.finish()
        await until(lambda: not it.talk.live_runs, 120)
        await it.end()
        totals = {run.id: len(run.expected_rows()) for run in it.letta.runs.values()}
        tally = compare(it.letta.runs, await it.look.chunks())
        stored = await it.look.counted()
        gaps, rejects = await it.look.count("gaps"), await it.look.count("rejects")
    landed = sum(kill.landed(totals) for kill in it.kills)
    print(
        f"\n{database_url.partition(':')[0]}: {len(it.kills)} kills, {landed} landed mid-write, {tally.runs} runs,"
        f" {tally.chunks} chunks: {tally.lost} lost, {tally.doubled} doubled, {tally.altered} altered"
        f" ({it.fewest_live}+ runs alive, {time.monotonic() - began:.0f} s, seed {SEED})"
    )
    assert tally.is_exact
    assert {run_id: (run.state, run.cursor, run.rows) for run_id, run in stored.items()} == {
        run_id: ("complete", total, total) for run_id, total in totals.items()
    }
    assert (gaps, rejects) == (0, 0)
    assert landed >= 0.9 * KILLS
    assert it.fewest_live >= 20
