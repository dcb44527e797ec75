"""Memory while the database takes nothing and the server sends all it has, measured on a worker of its own process.

A campaign; the queue's own count of what waits is asserted in every trial of test_database.py.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.database_faults import LOCK, Trouble, locked, troubled
from tests.support.lives import until
from tests.support.looks import looking
from tests.support.shell import Shell
from worker.demo.fake_letta import FakeLetta
from worker.storage.committer import MAX_WAITING_BYTES

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from tests.faults.database_faults import Fault
    from tests.support.lives import Life
    from tests.support.looks import Look

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]

RUNS = 4
SAID = {"tokens": ("tok000001 ", 80_000), "large": ("x" * 100_000, 400)}
"""What each run says and how often: more than what may wait and what fits into the sockets on the way, together."""
MOST_GROWTH = 2.25 * MAX_WAITING_BYTES
"""A row of a few hundred bytes takes about twice what it counts: its columns, and the objects around it."""
STILL_SECONDS = 2.0


def resident(life: Life, *, peak: bool = False) -> int:
    """Bytes of memory the process has, or had at most."""
    status = Path(f"/proc/{life.pid}/status").read_text()
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(name))


async def until_still(letta: FakeLetta) -> int:
    """Wait until the server gets rid of nothing more; return the bytes it got rid of."""
    before, sent = -1, 0
    async with asyncio.timeout(120):
        while sent != before:
            await asyncio.sleep(STILL_SECONDS)
            before, sent = sent, sum(request.bytes_sent for request in letta.requests if request.kind == "stream")
    return sent


async def stored(look: Look, rows: int, seconds: float) -> None:
    """Wait until so many chunks can be seen in the database."""
    async with asyncio.timeout(seconds):
        while await look.count("chunks") < rows:  # noqa: ASYNC110 - another process stores them
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_memory_is_bounded(request: pytest.FixtureRequest, tmp_path: Path, database: str, kind: str) -> None:
    """However much a server sends while the database is away, memory grows by a bound that follows from one (I8)."""
    said, count = SAID[kind]
    trouble: AbstractAsyncContextManager[Fault] = (
        locked(tmp_path)
        if database == "sqlite"
        else troubled(request.getfixturevalue("postgres_server"), Trouble(LOCK, ("COMMIT",), ""))
    )
    async with FakeLetta(keepalive_interval=60, max_length=10**9, seed=1) as letta, trouble as fault:
        shell = Shell(letta, tmp_path, fault.worker_url)
        assert (await shell.do("migrate")).code == 0
        runs = [letta.new_run(letta.new_conversation()) for _ in range(RUNS)]
        for run in runs:
            run.say("first ")
        life = shell.start("run")
        try:
            async with looking(fault.url) as look:
                await until(lambda: letta.open_streams == RUNS, 30)
                await stored(look, RUNS, 30)
                before = resident(life)
                await fault.begin(None)  # type: ignore[arg-type] - these two need no rig
                for run in runs:
                    for _ in range(count):
                        run.say(said)
                    await asyncio.sleep(0)
                sent = await until_still(letta)
                growth = resident(life, peak=True) - before
                everything = sum(len(entry.data) for run in runs for entry in run.log)
                assert sent < 0.9 * everything, "it did not stop reading"
                await fault.end()
                rows = sum(len(run.expected_rows()) for run in runs)
                await stored(look, rows, 180)
                all_growth = resident(life, peak=True) - before
                assert (await shell.tally()).is_exact
        finally:
            life.kill()
        print(
            f"\n{database}, {kind}: {sent >> 20} of {everything >> 20} MiB sent while nothing was stored;"
            f" {before >> 20} MiB + {growth >> 20}, afterwards + {all_growth >> 20}"
        )
        assert growth < MOST_GROWTH
        assert all_growth < MOST_GROWTH + 64 * 1024 * 1024
