"""Catching up with finished runs, side by side: a floor, what people write first, dlt, and the worker."""

import itertools
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

import httpx

from benchmarks.blaster import TAIL
from benchmarks.database import DATABASES, fresh, query
from benchmarks.processes import load, module, run_to_end, say
from benchmarks.worker import Worker
from tests.support.postgres import PostgresServer

ROWS_OF_TAIL = len(TAIL) - 1
"""[DONE] is no row."""


class Load(NamedTuple):
    """How many finished runs of how many tokens."""

    runs: int
    chunks: int

    @property
    def rows(self) -> int:
        """What must be stored."""
        return self.runs * (self.chunks + ROWS_OF_TAIL)


class Measured(NamedTuple):
    """One contender, once. Its start is not counted in `rate`: that begins with the first request for a stream."""

    rate: float
    """Chunks a second."""
    cpu: float
    """Microseconds of CPU a chunk, its start and all; the database server's are not in it."""
    seconds: float
    """From the start of the process to its end."""
    peak_mib: float


Results = dict[tuple[str, str], list[Measured]]
"""(contender, database) -> a measurement a round"""


class Contender(NamedTuple):
    """Who catches up."""

    name: str
    module: str
    python: str = sys.executable
    share: float = 1.0
    """Of the runs: the slow ones would take minutes."""


FLOOR = Contender("floor", "floor")
WORKER = Contender("letta-ingest", "")


def contenders(dlt_python: str | None) -> list[Contender]:
    """All of them; dlt only where it is installed."""
    dlt = [Contender("dlt", "with_dlt", dlt_python, 0.1)] if dlt_python else []
    return [FLOOR, WORKER, *dlt, Contender("naive", "naive", share=0.01)]


def measure(contenders: Sequence[Contender], size: Load, rounds: int, server: PostgresServer) -> Results:
    """All contenders in turn, round after round, so that noise hits them alike."""
    results: Results = {}
    with load("blaster", *size) as url:
        for number in range(1, rounds + 1):
            for database, contender in itertools.product(DATABASES, contenders):
                say(f"catch-up, round {number} of {rounds}: {contender.name}, {database}")
                measured = once(contender, database, url, size, server)
                results.setdefault((contender.name, database), []).append(measured)
    return results


def once(contender: Contender, database: str, url: str, size: Load, server: PostgresServer) -> Measured:
    """Let one contender catch up, into an empty database. What it stored is counted: a fast wrong answer is none."""
    size = Load(max(1, int(size.runs * contender.share)), size.chunks)
    with fresh(database, server) as (folder, database_url):
        arguments = url, database_url, size.runs
        command = (
            module(f"benchmarks.contenders.{contender.module}", *arguments, python=contender.python)
            if contender.module
            else Worker(folder, url, database_url).command("run", "--once")
        )
        httpx.get(f"{url}/bench", trust_env=False)  # it counts anew
        used = run_to_end(command)
        began = httpx.get(f"{url}/bench", trust_env=False).json()["began"]
        ((stored,),) = query(database_url, "SELECT count(*) FROM chunks")
    if stored != size.rows:
        raise SystemExit(f"bench: {contender.name} stored {stored} chunks on {database}, {size.rows} were served")
    return Measured(stored / (used.ended - began), 1e6 * used.cpu_seconds / stored, used.seconds, used.peak_mib)


def ratio(results: Results, contender: str, other: str, database: str) -> float:
    """How many times the other's rate it has: the median of the rounds, each of which saw both."""
    pairs = zip(results[contender, database], results[other, database], strict=True)
    return statistics.median(one.rate / two.rate for one, two in pairs)
