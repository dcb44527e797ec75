"""Floods: what is huge or without end, through a real process. Its memory is bounded, and it answers meanwhile (I8).

Memory is the process's own peak as the kernel knows it. How long nobody got an answer is told in CPU seconds of the
event loop's thread, which a busy machine does not stretch.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.faults.hostile import Cutting, Flood, Numbers, Poison, poisoned_run
from tests.support.lives import until
from tests.support.looks import looking
from tests.support.shell import SECRET, Shell
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.lives import Life
    from tests.support.looks import RunLook
    from worker.demo.fake_run import FakeRun

MEGABYTE = 1 << 20
LIMIT = 32 * MEGABYTE
"""letta.max_event_bytes by default."""
MANY = 1_000_000
PIECES = {
    "garbage": b"data: x\n\n",
    "objects without a number": b'data: {"a":1}\n\n',
    "numbers that are none": b'data: {"seq_id":-1}\n\n',
    "keepalives": b'data: {"message_type":"ping","run_id":"RUN"}\n\n',
    "errors of the reader": b"event: error\ndata: x\n\n",
    "comments": b":\n\n",
    "blank lines": b"\n\n",
}
END = b"data: [DONE]\n\n"
AGAIN = b'data: {"seq_id":1,"run_id":"RUN"}\n\n'
"""A chunk that came before; what is unnumbered in front of such a one is taken for a part of the repetition."""


@pytest.fixture
async def shell(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Shell]:
    """Commands on SQLite, or on the database the test asks for, with a port for the endpoints."""
    url = request.getfixturevalue("database_url" if "database_url" in request.fixturenames else "sqlite_url")
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as letta:
        made = Shell(letta, tmp_path, url)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            made.listen = f"127.0.0.1:{probe.getsockname()[1]}"
        try:
            yield made
        finally:
            for life in made.lives:
                life.kill()


@dataclass(frozen=True)
class Survival:
    """How a worker took a flood."""

    run: RunLook
    grown_megabytes: float
    longest_wait: float
    """CPU seconds of the event loop's thread during the one answer of /healthz that took the most."""
    answer_count: int
    rejects: int


def peak_megabytes(life: Life) -> float:
    """The most memory the process has had."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{life.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def loop_seconds(life: Life) -> float:
    """The CPU time of the process's first thread, in which the event loop is."""
    fields = Path(f"/proc/{life.pid}/task/{life.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


async def survived(shell: Shell, poison: Poison, seconds: float = 60.0) -> tuple[Survival, FakeRun]:
    """Start a worker, let it follow a poisoned run while /healthz is asked all the time, and stop it in good order."""
    assert (await shell.do("migrate")).code == 0
    life = shell.start("run")
    await shell.until_logged(life, "worker.started")
    before, longest, count = peak_megabytes(life), 0.0, 0
    run = poisoned_run(shell.letta, poison)
    is_over = asyncio.create_task(
        until(lambda: any(line["event"] == "run.finished" for line in shell.logged(life)), seconds)
    )
    async with httpx.AsyncClient(base_url=f"http://{shell.listen}", trust_env=False, timeout=30) as client:
        while not is_over.done():
            begun = loop_seconds(life)
            assert (await client.get("/healthz")).json() == {"status": "ok"}
            longest, count = max(longest, loop_seconds(life) - begun), count + 1
            await asyncio.sleep(0.005)
    await is_over
    grown = peak_megabytes(life) - before
    assert await shell.stop(life) == 0
    async with looking(shell.database_url) as look:
        survival = Survival((await look.runs())[run.id], grown, longest, count, await look.count("rejects"))
    print(f"\n{poison.fired=} {survival}")
    assert poison.fired
    assert survival.longest_wait < 1
    assert survival.run.is_settled
    return survival, run


async def test_event_of_100_megabytes(shell: Shell) -> None:
    """An event of 100 MB costs a few times the limit for one event, not its size, and its run goes on (I6, I8)."""
    poison = Flood(b"y" * MEGABYTE, repeat=100, head=b'data: {"seq_id":3,"content":"', tail=b'"}\n\n')

    survival, run = await survived(shell, poison)

    assert survival.grown_megabytes < 4 * LIMIT / MEGABYTE
    assert (survival.run.state, survival.run.cursor, survival.rejects) == ("incomplete", 7, 1)
    assert survival.run.rows == len(run.expected_rows()) - 1


@pytest.mark.campaign
@pytest.mark.parametrize("piece", ["x" * 1024, "\U0001f999" * 256], ids=["ASCII", "four bytes a character"])
async def test_event_of_the_largest_size(shell: Shell, database_url: str, piece: str) -> None:
    """The largest event that is taken is stored, and costs at most eight times its size for a moment (I6, I8)."""
    poison = Flood(piece.encode(), repeat=31 * 1024, head=b'data: {"seq_id":3,"content":"', tail=b'"}\n\n')

    survival, run = await survived(shell, poison)

    assert survival.grown_megabytes < 9 * LIMIT / MEGABYTE
    assert (survival.run.state, survival.run.rows) == ("complete", len(run.expected_rows()))


async def test_line_without_end(shell: Shell) -> None:
    """A line that has no end after 200 MB costs no more; what was there before it broke off is read again (I2, I8)."""
    poison = Cutting(b"y" * MEGABYTE, repeat=200, is_extra=True, head=b"data: ")

    survival, run = await survived(shell, poison)

    assert poison.fired == 2
    assert survival.grown_megabytes < 4 * LIMIT / MEGABYTE
    assert (survival.run.state, survival.run.rows, survival.rejects) == ("complete", len(run.expected_rows()), 0)


async def test_flood_of_everything(shell: Shell) -> None:
    """Tiny events of every useless kind, as fast as they come, cost little memory and hold nobody up (I6, I8)."""
    poison = Flood(b"".join(PIECES.values()), repeat=5000, is_extra=True)

    survival, run = await survived(shell, poison)

    assert survival.grown_megabytes < 100
    assert survival.answer_count > 10
    assert (survival.run.state, survival.run.rows) == ("complete", len(run.expected_rows()))
    assert survival.rejects == 3


@pytest.mark.campaign
@pytest.mark.parametrize("name", [*PIECES, "chunks that came before"])
async def test_a_million_tiny_events(shell: Shell, name: str) -> None:
    """A million events of one useless kind: the same (I6, I8)."""
    poison = Flood(PIECES.get(name, AGAIN), repeat=MANY, is_extra=True)

    survival, run = await survived(shell, poison, 300)

    assert survival.grown_megabytes < 150
    assert (survival.run.state, survival.run.rows) == ("complete", len(run.expected_rows()))
    assert survival.rejects == (name in list(PIECES)[:3])


@pytest.mark.campaign
async def test_a_million_different_things_to_keep(shell: Shell, database_url: str) -> None:
    """A million things that cannot be rows, no two alike, are all kept, at the pace of the database (I6, I8)."""
    poison = Numbers(b"data: x%d\n\n", numbers=range(MANY), is_extra=True)

    survival, run = await survived(shell, poison, 300)

    assert survival.grown_megabytes < 200
    assert (survival.run.state, survival.rejects) == ("complete", MANY)
    assert survival.run.rows == len(run.expected_rows())


@pytest.mark.campaign
async def test_a_hundred_thousand_holes(shell: Shell, database_url: str) -> None:
    """Every other entry cannot be a row: each has its gap, and the rows between them are all stored (I2, I6, I8)."""
    numbers = range(4, 200_004, 2)
    poison = Numbers(b'data: x\n\ndata: {"seq_id":%d}\n\n', numbers=numbers, tail=END)

    survival, _ = await survived(shell, poison, 300)

    assert survival.grown_megabytes < 200
    assert (survival.run.state, survival.run.cursor, survival.rejects) == ("incomplete", numbers[-1], len(numbers))
    assert survival.run.rows == 2 + len(numbers)


@pytest.mark.campaign
async def test_a_million_tiny_chunks(shell: Shell, database_url: str) -> None:
    """A million chunks of 20 bytes, as fast as they come, are all stored, and memory does not grow with them (I8)."""
    poison = Numbers(b'data: {"seq_id":%d}\n\n', numbers=range(3, MANY + 1), tail=END)

    survival, _ = await survived(shell, poison, 300)

    assert survival.grown_megabytes < 200
    assert (survival.run.state, survival.run.rows) == ("complete", MANY)
