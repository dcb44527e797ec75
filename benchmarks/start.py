"""Starting and idling: a store full of runs, a thousand of them unfinished; five thousand quiet conversations."""

import time
import uuid
from typing import NamedTuple

import httpx

from benchmarks.database import DATABASES, fresh, query
from benchmarks.processes import cpu_seconds, load, say
from benchmarks.worker import Worker
from tests.support.postgres import PostgresServer

IDLE_SECONDS = 60
INTERVAL = 5
"""discovery.interval, by default."""
RUNS_A_STATEMENT = 10_000


class Restart(NamedTuple):
    """Seconds from the start of the process to the first new row that is durable."""

    database: str
    runs: int
    seconds: float


class Idle(NamedTuple):
    """What doing nothing costs."""

    conversations: int
    cpu: float
    requests_an_interval: float


def restart(stored_runs: int, unfinished: int, server: PostgresServer) -> list[Restart]:
    """Kill a worker that follows `unfinished` runs, in a store with so many more; start one with default settings."""
    measured = []
    for database in DATABASES:
        say(f"restart: {stored_runs:,} stored runs, {unfinished:,} unfinished, {database}")
        with fresh(database, server) as (folder, url), load("live", unfinished, 2, 100_000, 1) as letta:
            all_at_once = Worker(folder, letta, url, more=f"max_streams = {unfinished + 20}")
            fill(url, stored_runs)
            with all_at_once.running():
                wait_for_more(url, 2 * unfinished)
            worker, before = Worker(folder, letta, url), rows(url)
            begun = time.monotonic()
            with worker.running():
                wait_for_more(url, before + 1)
                measured.append(Restart(database, stored_runs, time.monotonic() - begun))
    return measured


def fill(url: str, count: int) -> None:
    """Store so many runs that are over and done."""
    for first in range(0, count, RUNS_A_STATEMENT):
        values = ", ".join(
            f"('run-{uuid.UUID(int=10**9 + number)}', 'conv-{number % 500}', 'agent-1', 'completed',"
            f" '2026-01-{1 + number % 28:02} 10:00:00.000000', 'complete', 2002, 2002, '2026-01-01 10:00:00.000000',"
            " '2026-01-01 10:00:00.000000', '2026-01-01 10:00:00.000000', 'agrees')"
            for number in range(first, min(count, first + RUNS_A_STATEMENT))
        )
        query(
            url,
            "INSERT INTO runs (run_id, conversation_id, agent_id, status, created_at, state, last_seq_id, chunk_count,"
            f" discovered_at, updated_at, settled_at, verdict) VALUES {values}",
        )


def rows(url: str) -> int:
    """How many chunks are stored."""
    ((count,),) = query(url, "SELECT COALESCE(SUM(last_seq_id), 0) FROM runs WHERE settled_at IS NULL")
    return int(count)


def wait_for_more(url: str, count: int) -> None:
    """Wait until so many chunks are stored."""
    until = time.monotonic() + 120
    while rows(url) < count:
        if time.monotonic() > until:
            raise SystemExit("bench: the worker stores nothing")
        time.sleep(0.02)


def idle(conversations: int, server: PostgresServer) -> list[Idle]:
    """Watch so many conversations in which nothing happens."""
    say(f"idle: {conversations:,} conversations, {IDLE_SECONDS} s")
    names = ", ".join(f'"conv-{uuid.UUID(int=number)}"' for number in range(conversations))
    with fresh("SQLite", server) as (folder, url), load("blaster", 0, 1) as letta:
        worker = Worker(folder, letta, url, watch=f"conversations = [{names}]")
        with worker.running() as process:
            time.sleep(10)
            httpx.get(f"{letta}/bench", trust_env=False)
            cpu = cpu_seconds(process.pid)
            time.sleep(IDLE_SECONDS)
            used = cpu_seconds(process.pid) - cpu
            requests = httpx.get(f"{letta}/bench", trust_env=False).json()["requests"]
    return [Idle(conversations, used / IDLE_SECONDS, requests / (IDLE_SECONDS / INTERVAL))]
