"""Whether the cost stays flat: a database that is full already, a run that is very long, a second worker."""

import time
from typing import NamedTuple

from benchmarks.blaster import event
from benchmarks.catch_up import WORKER, Load, once
from benchmarks.database import DATABASES, fresh, query
from benchmarks.processes import load, run_to_end, say, started
from benchmarks.worker import Worker
from tests.support.postgres import PostgresServer

ROWS_A_STATEMENT = 500_000
PAYLOAD = event("run-00000000-0000-4000-8000-000000000000", 1)[6:-2].decode()


class Flat(NamedTuple):
    """Catching up into a database that holds so many rows, and into an empty one, in turn."""

    database: str
    stored: int
    rate: float
    rate_of_empty: float


class Length(NamedTuple):
    """One run of so many chunks."""

    database: str
    chunks: int
    peak_mib: float
    rate: float


class Second(NamedTuple):
    """Two workers on one database at the same work, against one alone."""

    seconds: float
    seconds_alone: float


def flat(stored: int, size: Load, rounds: int, server: PostgresServer) -> list[Flat]:
    """Fill a database, then catch up into it, and each time into an empty one, too."""
    measured = []
    for database in DATABASES:
        say(f"flat cost: filling {database} with {stored:,} rows")
        with fresh(database, server) as (folder, url):
            with load("blaster", 0, 1) as letta:
                Worker(folder, letta, url)
            fill(url, stored)
            for number in range(1, rounds + 1):
                say(f"flat cost: {database}, round {number} of {rounds}")
                with load("blaster", *size, number * 1_000_000) as letta:
                    rate = size.rows / run_to_end(Worker(folder, letta, url).command("run", "--once")).seconds
                    rate_of_empty = once(WORKER, database, letta, size, server).seconds
                    measured.append(Flat(database, stored, rate, size.rows / rate_of_empty))
    return measured


def fill(url: str, count: int) -> None:
    """Store so many chunks of runs that are over and done, as the worker would have."""
    is_sqlite = url.startswith("sqlite")
    for first in range(0, count, ROWS_A_STATEMENT):
        last = min(count, first + ROWS_A_STATEMENT) - 1
        if is_sqlite:
            numbers = f"WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})"
            at, run = (
                "strftime('%Y-%m-%d %H:%M:%S.000000', 1700000000 + i / 1000, 'unixepoch')",
                "printf('%08d', i / 2000)",
            )
            source = "n"
        else:
            numbers, source = "", f"generate_series({first}, {last}) AS n(i)"
            at, run = "to_timestamp(1700000000 + i / 1000)", "lpad((i / 2000)::text, 8, '0')"
        key = f"'run-' || {run} || '-0000-4000-8000-000000000000'"
        query(
            url,
            f"{numbers} INSERT INTO chunks (run_id, seq_id, message_type, message_id, otid, step_id, payload,"
            f" received_at, seq_source) SELECT {key}, i % 2000 + 1, 'assistant_message',"
            f" 'message-' || {run} || '-0000-4000-8000-000000000000', {run} || '-0000-4000-8000-000000000001',"
            f" 'step-' || {run} || '-0000-4000-8000-000000000002', '{PAYLOAD}', {at}, 'wire' FROM {source}",
        )


def length(chunks: int, server: PostgresServer) -> list[Length]:
    """Catch up with one long run."""
    measured = []
    for database in DATABASES:
        for size in (Load(1, chunks // 100), Load(1, chunks)):
            say(f"one run of {size.chunks:,} chunks, {database}")
            with load("blaster", *size) as letta:
                result = once(WORKER, database, letta, size, server)
            measured.append(Length(database, size.chunks, result.peak_mib, result.rate))
    return measured


def second(size: Load, server: PostgresServer) -> Second:
    """Two workers catch up with the same runs, into one PostgreSQL; and one alone."""
    say("two workers on one PostgreSQL")
    with load("blaster", *size) as letta:
        alone = once(WORKER, "PostgreSQL", letta, size, server).seconds
        with fresh("PostgreSQL", server) as (folder, url):
            (folder / "other").mkdir()
            workers = Worker(folder, letta, url), Worker(folder / "other", letta, url)
            begun = time.monotonic()
            with started(workers[0].command("run", "--once")) as first:
                run_to_end(workers[1].command("run", "--once"))
                if first.wait() != 0:
                    raise SystemExit("bench: one of two workers failed")
            seconds = time.monotonic() - begun
            ((stored,),) = query(url, "SELECT count(*) FROM chunks")
    if stored != size.rows:
        raise SystemExit(f"bench: two workers stored {stored} chunks, {size.rows} were served")
    return Second(seconds, alone)
