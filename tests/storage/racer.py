"""One of two workers that write the same runs at once: `python racer.py URL SEED`. Prints its log events."""

from __future__ import annotations

import asyncio
import random
import sys

from tests.storage.store import RecordingLog, ending, known, later, lot
from worker.metrics import Metrics
from worker.storage import engine
from worker.storage.committer import Committer
from worker.storage.transactions import Transactions
from worker.storage.writes import Write

RUNS = 12
CHUNKS = 60


def script(seed: int) -> list[Write]:
    """What a worker writes of all runs, in an order and in lots of its own."""
    chance = random.Random(seed)
    names = [f"run-{number:02}" for number in range(RUNS)]
    ahead = dict.fromkeys(names, 0)
    writes: list[Write] = []
    while ahead:
        run_id = chance.choice(sorted(ahead))
        first = ahead[run_id] + 1
        last = min(CHUNKS, ahead[run_id] + chance.randint(1, 25))
        again = chance.randint(max(1, first - 5), first)
        make = ending if last == CHUNKS else lot
        writes.append(make(run_id, again, last, at=later(seed)))
        if last == CHUNKS:
            del ahead[run_id]
        else:
            ahead[run_id] = last
        if chance.random() < 0.4:
            writes.append(known(*chance.sample(names, chance.randint(1, RUNS))))
    return writes


async def race(url: str, seed: int) -> RecordingLog:
    """Write it all through a committer with an engine of its own."""
    log = RecordingLog()
    engine.BUSY_TIMEOUT_SECONDS = 60.0  # a slow disk is no fault; a deadlock SQLite reports without waiting
    chance = random.Random(seed)
    async with Transactions(url) as transactions:
        committer = Committer(transactions, log, Metrics())
        running = asyncio.create_task(committer.run())
        for write in script(seed):
            await committer.submit(write)
            if chance.random() < 0.5:
                await asyncio.sleep(0.001 * chance.random())
        await committer.drain()
        running.cancel()
        await asyncio.wait([running])
    return log


if __name__ == "__main__":
    print(asyncio.run(race(sys.argv[1], int(sys.argv[2]))).names)
