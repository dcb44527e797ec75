"""Live runs that talk all at once: does the worker keep up, how late is a chunk durable, and what does that cost."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.database import DATABASES, fresh
from benchmarks.processes import cpu_seconds, load, resident_mib, say
from benchmarks.worker import Worker
from tests.support.postgres import PostgresServer
from worker.page.snapshot import bound

RATE = 20
"""Chunks a second of each run, in bursts twice a second."""
SETTLING_SECONDS = 8
MEASURED_SECONDS = 20
LAG = "letta_ingest_commit_lag_seconds_bucket"


class Live(NamedTuple):
    """So many runs at once, on one database."""

    runs: int
    database: str
    served: int
    """Chunks a second that the runs say."""
    stored: float
    """Chunks a second that became durable."""
    p50: float
    p99: float
    """Seconds from the receipt of a lot of chunks to its commit."""
    cpu: float
    """Of one core; the database server's is not in it."""
    mib: float


def measure(run_counts: Sequence[int], server: PostgresServer) -> list[Live]:
    """Each number of runs on each database."""
    return [once(runs, database, server) for runs in run_counts for database in DATABASES]


def once(runs: int, database: str, server: PostgresServer) -> Live:
    """Let so many runs start one after the other, and look at the worker when all of them talk."""
    say(f"live: {runs} runs, {database}")
    ramp = max(1.0, runs / 100)
    with fresh(database, server) as (folder, database_url), load("live", runs, RATE, 1_000_000, ramp) as url:
        worker = Worker(folder, url, database_url, more=f"max_streams = {runs + 20}")
        with worker.running() as process:
            time.sleep(ramp + SETTLING_SECONDS)
            before, cpu, began = worker.figures(), cpu_seconds(process.pid), time.monotonic()
            time.sleep(MEASURED_SECONDS)
            after, seconds = worker.figures(), time.monotonic() - began
            used, mib = cpu_seconds(process.pid) - cpu, resident_mib(process.pid)
    name = "letta_ingest_chunks_stored_total", ""
    stored = (after[name] - before[name]) / seconds
    lags = {float(le): after[metric, le] - before[metric, le] for metric, le in after if metric == LAG}
    p50, p99 = bound(lags, 0.5) or 0.0, bound(lags, 0.99) or 0.0
    return Live(runs, database, runs * RATE, stored, p50, p99, used / seconds, mib)
