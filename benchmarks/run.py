"""`make bench`: catching up with finished runs, side by side in one go, as ratios. Prints a table, median and spread.

    naive           the official client's stream iterated, one row and one commit a chunk, as people write it first
    letta-ingest    the installed worker as a process, with default settings, start and all, on either database

Goals and more contenders (a raw floor, live streams, memory) are the subject of a later issue.
"""

import argparse
import asyncio
import contextlib
import datetime as dt
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
from letta_client import Letta

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.blaster import run_id  # noqa: E402 - the checkout is not a package
from tests.support.postgres import running_postgres  # noqa: E402

NAIVE_CHUNKS = 2000


@contextlib.contextmanager
def blaster(runs: int, chunks: int) -> Iterator[str]:
    """The load, in a process of its own; its URL."""
    created_at = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    command = [sys.executable, str(HERE / "blaster.py"), str(runs), str(chunks), created_at]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def naive(url: str, folder: Path) -> float:
    """Chunks a second of the loop people write first."""
    client = Letta(base_url=url, api_key="none")
    database = sqlite3.connect(folder / "naive.db")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE chunks (run_id TEXT, seq_id INTEGER, payload TEXT, PRIMARY KEY (run_id, seq_id))")
    begun, count = time.perf_counter(), 0
    for chunk in client.runs.messages.stream(run_id(1)):
        count += 1
        row = (run_id(1), getattr(chunk, "seq_id", None) or count, chunk.model_dump_json())
        database.execute("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", row)
        database.commit()
        if count >= NAIVE_CHUNKS:
            break
    return count / (time.perf_counter() - begun)


def worker(url: str, database_url: str, folder: Path, total: int) -> float:
    """Chunks a second of the worker from the start of its process to its exit."""
    config = folder / "config.toml"
    config.write_text(
        f'[letta]\nbase_url = "{url}"\n[watch]\nall = true\n[storage]\nurl = "{database_url}"\n'
        '[service]\nlisten = "127.0.0.1:0"\n[log]\nlevel = "warning"\n'
    )
    command = [str(Path(sys.executable).parent / "letta-ingest")]
    subprocess.run([*command, "migrate", "--config", str(config)], check=True, stdout=subprocess.DEVNULL)
    begun = time.perf_counter()
    subprocess.run([*command, "run", "--once", "--config", str(config)], check=True)
    seconds = time.perf_counter() - begun
    stored = asyncio.run(count_rows(database_url))
    if stored != total:
        raise SystemExit(f"bench: {stored} rows are stored, {total} were served")
    return stored / seconds


async def count_rows(database_url: str) -> int:
    """What is really there; a fast wrong answer is not a measurement."""
    if database_url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as database:
            return int(database.execute("SELECT count(*) FROM chunks").fetchone()[0])
    connection = await asyncpg.connect(database_url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM chunks"))
    finally:
        await connection.close()


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """All contenders in turn, round after round, so that noise hits them alike."""
    rates: dict[str, list[float]] = {"naive": [], "letta-ingest, SQLite": [], "letta-ingest, PostgreSQL": []}
    total = arguments.runs * (arguments.chunks + 2)
    with running_postgres() as server, blaster(arguments.runs, arguments.chunks) as url:
        for number in range(1, arguments.rounds + 1):
            print(f"round {number} of {arguments.rounds}", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="letta-ingest-bench-") as name:
                folder = Path(name)
                rates["naive"].append(naive(url, folder))
                file = f"sqlite:///{folder / 'bench.db'}"
                rates["letta-ingest, SQLite"].append(worker(url, file, folder, total))
                rates["letta-ingest, PostgreSQL"].append(worker(url, server.create_database(), folder, total))
    return rates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="finished runs to catch up with (100)")
    parser.add_argument("--chunks", type=int, default=2000, help="numbered chunks in each (2000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; at least 3 for a number worth keeping (3)")
    arguments = parser.parse_args()
    rates = measure(arguments)
    base = statistics.median(rates["naive"])
    load = f"{arguments.runs} runs x {arguments.chunks} chunks"
    print(f"catching up with {load}, {os.cpu_count()} cores, {arguments.rounds} rounds")
    print(f"{'':28}{'x naive':>9}{'chunks/s':>11}{'lowest':>9}{'highest':>9}")
    for name, measured in rates.items():
        median = statistics.median(measured)
        print(f"{name:28}{median / base:>9.1f}{median:>11,.0f}{min(measured):>9,.0f}{max(measured):>9,.0f}")


if __name__ == "__main__":
    main()
