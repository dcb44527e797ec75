"""The campaign: talking agents, one database, and life after life of a worker on it; and what is checked after each.

faults.py says how lives end, figures.py what is reported. All checks are made by sqlite3 and asyncpg alone against
the logs of the server, FakeLetta.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.lives import Life, until
from tests.support.looks import looking
from tests.torture.figures import Figures, Kill, Point, Side
from worker.demo.fake_faults import Exchange, Fault
from worker.demo.fake_letta import FakeLetta
from worker.demo.proof import Tally, compare
from worker.demo.talk import Talk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support.looks import Look
    from tests.torture.boundaries import Strike

SPEAKERS = 24
CHUNKS_PER_SECOND = 300.0
LONGEST_RUN = 200
RECENT_SECONDS = 0.1
"""A kill landed mid-write if rows were added so shortly before it."""
AUDIT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
"""What must happen happens within this time, on a busy machine too."""
END_SECONDS = 900.0

CONFIG = """\
letta = {{ base_url = "{url}", batch_size = {batch_size}, max_streams = {max_streams} }}
watch = {{ all = true }}
storage = {{ url = "{database_url}" }}
discovery = {{ interval = 0.3 }}
service = {{ listen = "127.0.0.1:0" }}
"""

DAMAGE = re.compile(r'"level": "(error|critical)"|Traceback|Exception ignored')
"""No fault of this campaign is one that the worker may call an error (I4)."""


@dataclass(kw_only=True)
class Served(Fault):
    """Not a fault: counts the numbered chunks that leave the server, and those of them that it has sent before."""

    times: int | None = None
    sent: int = 0
    sent_again: int = 0
    highest: dict[str, int] = field(default_factory=dict)

    async def send(self, exchange: Exchange, data: bytes) -> None:
        """Count, and send as it is."""
        number = re.search(rb'"seq_id":(\d+)', data)
        run_id = exchange.record.run_id
        if number and run_id and b'"message_type":"ping"' not in data:
            seq_id = int(number[1])
            self.sent += 1
            self.sent_again += seq_id <= self.highest.get(run_id, 0)
            self.highest[run_id] = max(seq_id, self.highest.get(run_id, 0))
        await exchange.write(data)


@dataclass
class Worker:
    """One life of the worker."""

    life: Life
    log: Path
    testimony: Path
    born_at: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """It lives."""
        assert self.life.exit_code is None, f"the worker ended by itself:\n{self.said()}"

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-3000:]

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.life.pid, number)

    async def logged(self, event: str) -> None:
        """Wait until it has logged this event; a drain is over in some hundredths of a second."""
        await self._until(lambda: f'"event": "{event}"' in self.log.read_text(), 0.002)

    async def stopped(self) -> None:
        """Wait until a SIGSTOP has stopped it."""
        stat = Path(f"/proc/{self.life.pid}/stat")
        await self._until(lambda: stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "T", 0.01)

    async def _until(self, is_so: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            self.check()
            assert time.monotonic() < deadline, f"it did not happen:\n{self.said()}"
            await asyncio.sleep(seconds)

    async def struck(self) -> None:
        """Wait until it dies by its own strike."""
        code = await self.life.wait(PATIENCE_SECONDS)
        assert code == -signal.SIGKILL, f"exit code {code}:\n{self.said()}"
        assert self.testimony.exists(), f"it died before its strike:\n{self.said()}"


@dataclass
class Campaign:
    """One worker after another on one database."""

    letta: FakeLetta
    talk: Talk
    look: Look
    folder: Path
    database_url: str
    figures: Figures
    chance: random.Random
    served: Served = field(default_factory=Served)
    workers: list[Worker] = field(default_factory=list)
    births: int = 0
    cursors: dict[str, int] = field(default_factory=dict)
    audited: set[str] = field(default_factory=set)
    audited_at: float = field(default_factory=time.monotonic)

    # What the faults do

    def start(self, *command: str, strike: Strike | None = None, stdout: Path | None = None) -> Worker:
        """Start a life with settings of its own."""
        self.births += 1
        batch_size, max_streams = self.chance.choice((2, 10, 1000)), self.chance.choice((8, 16, 40))
        settings = {"url": self.letta.url, "batch_size": batch_size, "max_streams": max_streams}
        config, log = self.folder / f"{self.births}.toml", self.folder / f"{self.births}.log"
        config.write_text(CONFIG.format(**settings, database_url=self.database_url))
        log.touch()
        life = Life([*command, "--config", str(config)], log, stdout=stdout, prepare=strike)
        self.workers.append(Worker(life, log, strike.testimony if strike else self.folder / "none"))
        return self.workers[-1]

    @property
    def testimony(self) -> Path:
        """A file for what the next life leaves."""
        return self.folder / f"{self.births + 1}.json"

    async def stores(self, worker: Worker, seconds: float) -> bool:
        """Whether rows are added within this time, while the worker lives."""
        before, deadline = await self.look.stored(), time.monotonic() + seconds
        while await self.look.stored() <= before:
            worker.check()
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def until_stored(self, worker: Worker) -> float:
        """Wait until rows are added; when it was."""
        assert await self.stores(worker, PATIENCE_SECONDS), f"nothing is stored any more:\n{worker.said()}"
        return time.monotonic()

    async def until_first_stored(self, worker: Worker) -> float:
        """Wait for the first rows of a life; when it was."""
        at = await self.until_stored(worker)
        self.figures.restart_seconds.append(at - worker.born_at)
        return at

    def kill(self, worker: Worker, kind: str) -> bool:
        """SIGKILL it; False if it had ended before."""
        worker.life.kill()
        if worker.life.exit_code != -signal.SIGKILL:
            return False
        self.count(kind)
        return True

    def count(self, kind: str, side: Side | None = None, *, is_mid_write: bool = False) -> None:
        """Count a kill."""
        self.figures.kills.append(Kill(kind, self.figures.seconds(), side, is_mid_write))

    async def side(self, worker: Worker) -> Side:
        """On which side of its commit a strike fell. I3: the store is as before the transaction, or as after it."""
        await self.until_alone()
        stored = [list(run) for run in await self.look.unsettled()]
        found, made = json.loads(worker.testimony.read_text())
        assert stored in (found, made), f"I3: neither before nor after: {found} {stored} {made}"
        return "gone" if stored == found else "durable"

    def is_mid_run(self, stored: dict[str, int]) -> bool:
        """Whether a live run has some of its chunks stored."""
        return any(stored.get(run.id) for run in self.talk.live_runs)

    async def until_alone(self) -> None:
        """Wait until PostgreSQL has noticed that its clients are dead: it finishes what it was told."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while await self.look.sessions():
            assert time.monotonic() < deadline, "PostgreSQL goes on with the session of a dead worker"
            await asyncio.sleep(0.01)

    # What is checked

    async def check(self) -> None:
        """After a fault: see what it left."""
        await self.bury()
        self.figures.fewest_live = min(self.figures.fewest_live, len(self.talk.live_runs))
        if self.chance.random() < 0.5:  # else the next life is the first to see what this one left
            await self.check_cursors()
        if time.monotonic() - self.audited_at >= AUDIT_SECONDS:
            await self.audit()

    async def bury(self) -> None:
        """Kill whoever still lives. I4: no life has called anything an error."""
        for worker in self.workers:
            worker.life.kill()
            text = worker.log.read_text()
            assert not DAMAGE.search(text), f"the worker logs an error:\n{text[-5000:]}"
            for path in (worker.log, worker.testimony, worker.log.with_suffix(".toml")):
                path.unlink(missing_ok=True)
        self.workers.clear()
        await self.until_alone()

    async def check_cursors(self) -> None:
        """I2, I3: up to a cursor everything is stored, and no cursor goes back."""
        for run_id, run in (await self.look.runs(only_unsettled=True)).items():
            assert run.rows_to_cursor == run.cursor, f"I2: {run_id}: cursor {run.cursor}, {run.rows_to_cursor} rows"
            assert run.cursor >= self.cursors.get(run_id, 0), f"I3: {run_id}: the cursor went back to {run.cursor}"
            self.cursors[run_id] = run.cursor

    async def audit(self) -> None:
        """I1, I5: compare the runs that were settled since the last audit with the server's logs."""
        fresh = await self.look.settled() - self.audited
        live = {run.id for run in self.talk.live_runs}
        assert not fresh & live, f"I5: settled, but still talking: {fresh & live}"
        if fresh:
            self.figures.add(
                compare({run_id: self.letta.runs[run_id] for run_id in fresh}, await self.look.chunks(fresh))
            )
        self.audited |= fresh
        self.audited_at = time.monotonic()
        figures = self.figures
        figures.points.append(
            Point(
                round(figures.seconds(), 1),
                len(figures.kills),
                await self.look.stored(),
                figures.lost,
                figures.doubled,
                figures.altered,
            )
        )
        print(figures.progress(), flush=True)

    async def end(self) -> Tally:
        """Let all runs end, the worker store what there is and `verify` look at it; then compare everything."""
        self.talk.finish()
        await until(lambda: not self.talk.live_runs, PATIENCE_SECONDS)
        last = self.start("run", "--once")
        assert await last.life.wait(END_SECONDS) == 0, last.said()
        report = self.folder / "report.json"
        verifying = self.start("verify", "--server", "--json", stdout=report)
        assert await verifying.life.wait(END_SECONDS) == 0, verifying.said() + report.read_text()[:3000]
        await self.bury()
        await self.check_cursors()
        await self.audit()
        return compare(self.letta.runs, await self.look.chunks())


@asynccontextmanager
async def campaigning(database_url: str, folder: Path, figures: Figures) -> AsyncIterator[Campaign]:
    """A server on which nobody talks yet, and an empty database."""
    async with FakeLetta(keepalive_interval=0.2, seed=figures.seed) as letta:
        talk = Talk(
            letta, speakers=SPEAKERS, seed=figures.seed, chunks_per_second=CHUNKS_PER_SECOND, longest=LONGEST_RUN
        )
        async with looking(database_url) as look:
            campaign = Campaign(letta, talk, look, folder, database_url, figures, random.Random(figures.seed))
            letta.faults.append(campaign.served)
            try:
                yield campaign
            finally:
                for worker in campaign.workers:
                    worker.life.kill()
            figures.sent, figures.sent_again = campaign.served.sent, campaign.served.sent_again


@asynccontextmanager
async def talking(campaign: Campaign) -> AsyncIterator[None]:
    """Let the agents talk; whoever leaves the block has let them finish."""
    task = asyncio.create_task(campaign.talk.speak())
    try:
        await until(lambda: len(campaign.letta.runs) >= SPEAKERS, PATIENCE_SECONDS)
        yield
        await task
    finally:
        task.cancel()
