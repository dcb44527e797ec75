"""The promise itself, as one property: whatever happens, rows are the server's log minus recorded gaps.

`LETTA_INGEST_EXAMPLES=500 make test ARGS="-s tests/faults/test_promise.py"` runs 500 examples on SQLite, a fifth of
that on PostgreSQL, and tells how often what happened. What the machine can do is in promise.py.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import os
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.promise import ENDINGS, MOMENTS, TROUBLES, UNREADABLE, WORKERS, Campaign, Promise
from tests.faults.promise_oracle import GARBAGE
from tests.support.rig import hurry
from worker.demo.fake_faults import Answer, Cut, EndEarly, ReaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from worker.demo.fake_faults import Fault

EXAMPLES = int(os.environ.get("LETTA_INGEST_EXAMPLES", "10"))
STEPS = 30
BROKEN_ANSWERS: list[Fault] = [
    Cut(after_bytes=700, on="stream"),
    EndEarly(after_events=1, on="stream"),
    ReaderError(after_events=1, on="stream"),
    Answer(500, on="stream"),
    Answer(200, GARBAGE, content_type="text/event-stream", on="stream"),
]
EVENTS = {
    *("run started", "chunks written", "chunks doubled", "chunk lost", "chunk late", "chunks reordered"),
    *("stream trimmed", "stream lost", "cancelled run ended", "run expired"),
    *("worker started", "worker stopped", "workers caught up", "both workers at one run", "killed at any moment"),
    *("gap", "gap closed again", "reject", "state complete", "state incomplete", "state backfilled"),
    *(f"killed {moment}" for moment in MOMENTS),
    *(f"run {ending}" for ending in ENDINGS),
    *(f"unreadable: {kind}" for kind in UNREADABLE),
    *(f"server {trouble}" for trouble in TROUBLES),
    *(f"answer: {type(fault).__name__}" for fault in BROKEN_ANSWERS),
}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    hurry(monkeypatch)


@pytest.fixture(params=["sqlite", "postgresql"])
def campaign(request: pytest.FixtureRequest, tmp_path: Path) -> Campaign:
    """Examples on one kind of database."""
    if request.param == "sqlite":
        return Campaign(empty_files(tmp_path))
    return Campaign(emptied(request.getfixturevalue("postgresql_url")))


def empty_files(folder: Path) -> Iterator[str]:
    """A SQLite file that does not exist yet, for each example."""
    while True:
        for old in folder.glob("letta-ingest.db*"):
            old.unlink()
        yield f"sqlite:///{folder}/letta-ingest.db"


def emptied(url: str) -> Iterator[str]:
    """One PostgreSQL database, emptied for each example."""
    while True:
        asyncio.run(empty(url))
        yield url


async def empty(url: str) -> None:
    """Delete every row that a worker wrote."""
    connection = await asyncpg.connect(url)
    try:
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
        for (table,) in await connection.fetch(tables):
            await connection.execute(f'DELETE FROM "{table}"')
    finally:
        await connection.close()


def test_the_promise_holds(campaign: Campaign, request: pytest.FixtureRequest) -> None:
    """Whatever the server does and wherever two workers die, nothing goes missing silently (I1, I2, I3, I4, I5, I6)."""
    share = 1 if "sqlite" in request.node.name else 5
    profile = settings(
        max_examples=max(EXAMPLES // share, 3),
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(functools.partial(Promise, campaign), settings=profile)
    finally:
        print(f"\n{request.node.name}\n{campaign}")
    if profile.max_examples >= 10:
        assert campaign.tally["both workers at one run"]
        assert sum(campaign.tally[f"killed {moment}"] for moment in MOMENTS)


def test_all_that_can_happen_happens(campaign: Campaign) -> None:
    """Each event of the machine takes place, one after the other, and the promise holds (I1, I2, I3, I4, I5, I6)."""
    machine = Promise(campaign)
    machine.begin(honours_run_id=True, new=[6], old=["completed"], streams=16, batch=1000)
    try:
        tour(machine)
    except BaseException:
        machine.is_broken = True
        raise
    finally:
        machine.teardown()
    print(f"\n{campaign}")
    assert EVENTS - campaign.tally.keys() == set()


def do(machine: Promise, rule: Callable[..., None], **how: Any) -> None:
    """Let one thing happen, and all workers come to the end of what the server has said."""
    rule(**how)
    machine.holds()
    machine.catch_up()
    machine.holds()


def kill_storing(machine: Promise, moment: str) -> None:
    """Kill in the middle of a transaction; the other worker may have stored it all before this one comes to it."""
    for _ in range(5):
        do(machine, machine.kill_storing, which=-1, worker=0, moment=moment, countdown=0, again=True)
        if machine.tally[f"killed {moment}"]:
            break


def strike(machine: Promise, kind: Fault) -> None:
    """Let answers go wrong until one has: the worker that asked may be killed first, or have nothing to read."""
    for _ in range(10):
        fault = copy.deepcopy(kind)
        machine.break_off(fault=fault)
        do(machine, machine.kill, worker=0, seconds=0.0, again=True)
        do(machine, machine.say, which=-1, count=3)
        if fault.fired:
            break


def tour(machine: Promise) -> None:
    """Each rule at least once, where it has something to do."""
    then = functools.partial(do, machine)

    def unseen(*rules: Callable[..., None]) -> None:
        """Let chunks be written, and something happen to them, before any worker has read them."""
        for worker in range(WORKERS):
            machine.stop(worker=worker, again=False)
        machine.say(which=-1, count=4)
        for rule in rules:
            rule(which=-1, **({} if rule == machine.give_back else {"choice": -1}))
        then(machine.revive)

    for moment in MOMENTS:
        kill_storing(machine, moment)
    then(machine.kill, worker=1, seconds=0.0, again=True)
    then(machine.repeat, which=-1, length=3)
    for trouble in TROUBLES:
        then(machine.restart, trouble=trouble)
    for fault in BROKEN_ANSWERS:
        strike(machine, fault)
    unseen(machine.lose)
    then(machine.send_late, which=-1)
    unseen(machine.lose, machine.give_back)
    unseen(machine.trim)
    for kind in UNREADABLE:
        machine.garble(which=-1, kind=kind)
        then(machine.say, which=-1, count=1)
    then(machine.end, which=-1, ending="completed")
    for ending in ENDINGS:
        then(machine.start_run, pings=ending != "failed", count=3)
        then(machine.end, which=-1, ending=ending)
    then(machine.finish_cancel, which=-1)
    then(machine.start_run, pings=True, count=3)
    then(machine.expire, which=-1)
    machine.end(which=-1, ending="orphaned")
    then(machine.start_run, pings=True, count=3)
    then(machine.forget, which=-1)
