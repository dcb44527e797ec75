"""Long life: a worker under a steady load of runs that come and go keeps its size, and stores everything.

`make soak MINUTES=60` runs it on each database; the samples and a chart go to .cache/soak.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import sqlalchemy as sa

from benchmarks import processes
from benchmarks.blaster import TAIL, event, run_id
from tests.soak.chart import chart
from tests.soak.sampling import Sample, Sampler
from worker.storage.engine import create_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncConnection

MINUTES = float(os.environ.get("LETTA_INGEST_MINUTES") or "2")
RUNS, RATE, CHUNKS = 100, 20, 600
"""So many runs at once, chunks a second of each, chunks in each: 2,000 chunks a second, 3 runs a second."""
REPORT = Path(__file__).parents[2] / ".cache" / "soak"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.campaign


@pytest.fixture
def load() -> Iterator[str]:
    """The URL of the load, which is a process of its own."""
    with processes.load("live", RUNS, RATE, CHUNKS) as url:
        yield url


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, list[Sample]]]:
    """The samples of each database; written down when all is over."""
    samples: dict[str, list[Sample]] = {}
    yield samples
    REPORT.mkdir(parents=True, exist_ok=True)
    for database, taken in samples.items():
        (REPORT / f"{database}.json").write_text(json.dumps([asdict(sample) for sample in taken]))
    if samples:
        (REPORT / "soak.svg").write_text(chart(samples))


def test_long_life(load: str, database_url: str, tmp_path: Path, report: dict[str, list[Sample]]) -> None:
    """Memory, descriptors, threads, tasks and connections stay where they were, and nothing is lost (I2, I5, I8)."""
    sampler = soak(load, database_url, tmp_path)
    database = database_url.partition(":")[0]
    report[database] = sampler.samples
    early, late = quarter(sampler.samples, 2), quarter(sampler.samples, 4)
    rate = (late[-1].chunks - early[0].chunks) / (late[-1].minutes - early[0].minutes) / 60
    print(f"\n{database}: {late[-1].minutes:.0f} min, {rate:,.0f} chunks/s, {late[-1].chunks:,} chunks")
    for name in ("memory", "descriptors", "connections", "threads", "tasks", "unfinished"):
        before, after = mean(early, name), mean(late, name)
        print(f"  {name:12} {before:8.1f} in the second quarter, {after:8.1f} in the fourth")
    assert rate > 0.95 * RUNS * RATE
    assert mean(late, "memory") < mean(early, "memory") * 1.05 + 4
    for name in ("descriptors", "connections", "threads", "tasks", "unfinished"):
        assert mean(late, name) < mean(early, name) * 1.1 + 5, name
    asyncio.run(check(database_url, late[-1].chunks))


def soak(load: str, database_url: str, folder: Path) -> Sampler:
    """Let the worker work for the whole time, looking at it; then stop it as systemd would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "config.toml"
    config.write_text(
        f'letta = {{ base_url = "{load}", max_streams = {RUNS + 30} }}\nwatch = {{ all = true }}\n'
        f'storage = {{ url = "{database_url}" }}\nservice = {{ listen = "{address}" }}\n'
        'discovery = { interval = 1 }\nlog = { level = "warning" }\n'
    )
    command = [sys.executable, "-m", "worker"]
    subprocess.run([*command, "migrate", "--config", str(config)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    with subprocess.Popen([*command, "run", "--config", str(config)], cwd=ROOT) as process:
        try:
            wait_until_ready(f"http://{address}/readyz")
            sampler = Sampler(process.pid, f"http://{address}/metrics")
            while sampler.look().minutes < MINUTES:
                assert process.poll() is None, "the worker has ended"
                time.sleep(min(5.0, MINUTES))
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
    return sampler


def wait_until_ready(url: str, seconds: float = 60.0) -> None:
    """Wait until the worker listens, and server and database work."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, trust_env=False).status_code == httpx.codes.OK:
                return
        time.sleep(0.2)
    raise TimeoutError


def quarter(samples: list[Sample], number: int) -> list[Sample]:
    """The second, third or fourth quarter of the time."""
    size = len(samples) // 4
    return samples[(number - 1) * size : number * size]


def mean(samples: list[Sample], name: str) -> float:
    """The mean of one figure."""
    return sum(getattr(sample, name) for sample in samples) / len(samples)


async def check(database_url: str, least: int) -> None:
    """Every run is stored from its first chunk to its cursor, and those that ended are complete and agree."""
    engine = create_engine(database_url)
    try:
        async with engine.connect() as connection:
            total = await value(connection, "SELECT COUNT(*) FROM chunks")
            assert total >= least
            for table in ("gaps", "rejects"):
                assert await value(connection, f"SELECT COUNT(*) FROM {table}") == 0
            assert await value(connection, "SELECT SUM(chunk_count) FROM runs") == total
            wrong = "SELECT COUNT(*) FROM runs WHERE chunk_count <> last_seq_id OR settled_at IS NOT NULL AND "
            whole = f"(state <> 'complete' OR verdict <> 'agrees' OR last_seq_id <> {CHUNKS + len(TAIL) - 1})"
            assert await value(connection, wrong + whole) == 0
            settled = await value(connection, "SELECT COUNT(*) FROM runs WHERE settled_at IS NOT NULL")
            assert settled > RUNS
            assert await value(connection, "SELECT COUNT(*) FROM runs") - settled < 3 * RUNS
            for number in random.Random(1).sample(range(settled), 20):
                query = "SELECT payload FROM chunks WHERE run_id = :run AND seq_id <= :last ORDER BY seq_id"
                rows = await connection.execute(sa.text(query), {"run": run_id(number), "last": CHUNKS})
                said = [event(run_id(number), seq_id)[6:-2].decode() for seq_id in range(1, CHUNKS + 1)]
                assert [payload for (payload,) in rows] == said
    finally:
        with contextlib.suppress(Exception):
            await engine.dispose()


async def value(connection: AsyncConnection, query: str) -> int:
    """The one figure a query gives."""
    return int((await connection.execute(sa.text(query))).scalar_one())
