"""Two workers on the same runs, and the same worker in other lots: it comes to the same."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.storage.racer import CHUNKS, RUNS, race
from tests.storage.store import AT, Store, accepted, ending, known, lot, row, rows
from worker.core.records import RunRecord
from worker.core.runlog import Gap, Reject
from worker.storage import tables
from worker.storage.writes import RunWrite

if TYPE_CHECKING:
    from worker.storage.writes import Write

QUICKLY = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def one_workers_lots(draw: st.DrawFn, run_id: str, last: int, missed: int | None) -> list[RunWrite]:
    """A run of `last` chunks as one worker may write it: lots, repetitions, perhaps a chunk it never saw."""
    writes: list[RunWrite] = []
    first = 1
    while first <= last:
        end = draw(st.integers(first, last))
        again = draw(st.integers(max(1, first - 2), first))
        new = [row(n) for n in range(again, end + 1) if n != missed]
        gaps = [Gap(missed, missed, "not served")] if missed is not None and first <= missed <= end else []
        count = end - (missed is not None and missed <= end)
        is_end = end == last
        state = ("complete" if missed is None else "incomplete") if is_end else "following"
        found = accepted(new, gaps=gaps, cursor=end, count=count, finished=is_end, complete=state == "complete")
        writes.append(RunWrite(run_id, AT, state, found))
        if draw(st.integers(0, 4)) == 0:
            writes.append(
                RunWrite(run_id, AT, None, accepted(rejects=[Reject(end, b"?", "x")], cursor=end, count=count))
            )
        first = end + 1
    record = RunRecord(run_id, AT, "completed", completed_at=AT)
    return [*writes, RunWrite(run_id, AT, record=record, is_settled=True)]


class Case(NamedTuple):
    """A run of `last` chunks, what each worker never saw of it, and what is written, transaction by transaction."""

    last: int
    missed: tuple[int | None, ...]
    transactions: list[list[RunWrite]]


@st.composite
def one_worker(draw: st.DrawFn) -> Case:
    """One worker's writes in transactions of any size."""
    last = draw(st.integers(2, 12))
    missed = draw(st.none() | st.integers(1, last - 1))
    queue = draw(one_workers_lots("run", last, missed))
    transactions = []
    while queue:
        size = draw(st.integers(1, len(queue)))
        transactions.append(queue[:size])
        del queue[:size]
    return Case(last, (missed,), transactions)


@st.composite
def two_workers(draw: st.DrawFn) -> Case:
    """Two workers' writes in one another, each in its own order."""
    last = draw(st.integers(2, 12))
    missed = draw(st.tuples(*[st.none() | st.integers(1, last - 1)] * 2))
    rest = [draw(one_workers_lots("run", last, each)) for each in missed]
    transactions = []
    while rest:
        script = draw(st.sampled_from(rest))
        transactions.append([script.pop(0)])
        rest = [each for each in rest if each]
    return Case(last, missed, transactions)


number = 0


def fresh_run() -> str:
    """A run no other example uses."""
    global number  # noqa: PLW0603
    number += 1
    return f"run-{number}"


async def picture(store: Store, run_id: str) -> tuple[Any, ...]:
    """All that is stored of a run but its name."""
    run = await store.run(run_id)
    rejects = await store.all(sa.select(tables.rejects.c.after_seq_id).where(tables.rejects.c.run_id == run_id))
    return (
        (run.state, run.status, run.last_seq_id, run.chunk_count, run.settled_at, run.error),
        await store.chunks(run_id),
        await store.gaps(run_id),
        sorted(r.after_seq_id for r in rejects),
    )


@given(case=one_worker())
@QUICKLY
async def test_how_writes_are_grouped_changes_nothing(store: Store, case: Case) -> None:
    """I3: A run's writes in one transaction, or in one each, or in any lots, come to the same."""
    together, each, some = ids = [fresh_run() for _ in range(3)]
    await store.write(known(*ids))
    script = [write for transaction in case.transactions for write in transaction]
    await store.write(*(_of(together, write) for write in script))
    for write in script:
        await store.write(_of(each, write))
    for transaction in case.transactions:
        await store.write(*(_of(some, write) for write in transaction))
    pictures = [await picture(store, run_id) for run_id in ids]
    assert pictures[0] == pictures[1] == pictures[2]
    assert pictures[0][0][0] == ("complete" if case.missed == (None,) else "incomplete")


def _of(run_id: str, write: RunWrite) -> RunWrite:
    fields = {name: getattr(write, name) for name in write.__struct_fields__}
    return RunWrite(**{**fields, "run_id": run_id})


@given(case=two_workers())
@QUICKLY
async def test_two_workers_in_any_order_come_to_the_same(store: Store, case: Case) -> None:
    """I4, I5: However the lots of two workers fall into one another, all rows are there, and the run is complete."""
    run_id = fresh_run()
    await store.write(known(run_id))
    for transaction in case.transactions:
        await store.write(*(_of(run_id, write) for write in transaction))
    run, chunks, gaps, _ = await picture(store, run_id)
    one, other = case.missed
    lost = {one} if one is not None and one == other else set()
    assert sorted(chunks) == [n for n in range(1, case.last + 1) if n not in lost]
    assert run[:4] == ("incomplete" if lost else "complete", "completed", case.last, case.last - len(lost))
    assert {first for first, *_, is_open in gaps if is_open} == lost


def assert_whole(chunks: dict[int, str], run: Any) -> None:
    """The run is there once, to its end."""
    assert chunks == {n: f'{{"seq_id":{n}}}' for n in range(1, CHUNKS + 1)}
    assert (run.last_seq_id, run.chunk_count, run.state) == (CHUNKS, CHUNKS, "complete")


async def prepare(store: Store) -> None:
    """Discovery has found the runs of the race."""
    await store.write(known(*(f"run-{n:02}" for n in range(RUNS))))


@pytest.mark.parametrize("seed", [1, 3])
async def test_two_committers_at_once(store: Store, seed: int) -> None:
    """I4: Two committers that write the same runs at once, in different lots and orders, never trip over each other."""
    await prepare(store)
    logs = await asyncio.gather(race(store.url, seed), race(store.url, seed + 1))
    assert [log.names for log in logs] == [[], []]
    for n in range(RUNS):
        assert_whole(await store.chunks(f"run-{n:02}"), await store.run(f"run-{n:02}"))


async def test_two_processes_at_once(store: Store) -> None:
    """I4: The same with two processes."""
    await prepare(store)
    program = [sys.executable, "-m", "tests.storage.racer", store.url]
    racers = [
        await asyncio.create_subprocess_exec(*program, seed, stdout=asyncio.subprocess.PIPE) for seed in ("11", "12")
    ]
    said = [(await racer.communicate())[0] for racer in racers]
    assert said == [b"[]\n", b"[]\n"]
    for n in range(RUNS):
        assert_whole(await store.chunks(f"run-{n:02}"), await store.run(f"run-{n:02}"))


async def test_a_sweep_and_a_follower_in_crossed_order(postgresql_url: str) -> None:
    """I4: A listing and a run's lot in one transaction take their locks in one order, so none deadlocks."""
    async with Store(postgresql_url) as one, Store(postgresql_url) as other:
        await one.write(known("run-a", "run-b"))

        async def repeat(store: Store, listed: str, followed: str) -> None:
            for n in range(1, 60):
                await store.write(known(listed), lot(followed, n, n))

        await asyncio.gather(repeat(one, "run-b", "run-a"), repeat(other, "run-a", "run-b"))
        assert await one.cursor("run-a") == await one.cursor("run-b") == 59


async def test_a_worker_that_is_behind_changes_nothing(store: Store) -> None:
    """I4: A second worker that reads a finished run again leaves everything as it is but updated_at."""
    script: list[Write] = [lot("run-1", 1, 4), lot("run-1", 5, 9), ending("run-1", 10, 10)]
    await store.write(known("run-1"))
    await store.write(*script)
    before = await store.snapshot()
    for write in script:
        await store.write(write)
    assert await store.snapshot() == before


# Two workers that missed, or gave up, different things


async def test_count_of_two_workers(store: Store) -> None:
    """I3, I4: What one worker missed and the other had closes the gap, and the count is of what is stored."""
    partial = accepted(rows(3, 6), gaps=[Gap(1, 2, "not served")], cursor=6, count=4)
    await store.write(known("run-1"), RunWrite("run-1", AT, "following", partial))
    await store.write(lot("run-1", 1, 2))
    assert (await store.run("run-1")).chunk_count == 6
    assert await store.gaps("run-1") == [(1, 2, "not served", False)]
    await store.write(RunWrite("run-1", AT, None, accepted([row(7)], cursor=7, count=5)))
    assert (await store.run("run-1")).chunk_count == 7


async def test_open_end_moves(store: Store) -> None:
    """I4: What a second worker stores behind the place where the first gave up is not called missing."""
    gone = accepted(rows(1, 2), gaps=[Gap(3, None, "expired")], finished=True)
    await store.write(known("run-1"), RunWrite("run-1", AT, "incomplete", gone))
    await store.write(lot("run-1", 1, 6))
    assert await store.gaps("run-1") == [(7, None, "expired", True)]


async def test_open_end_is_not_dropped(store: Store) -> None:
    """I2, I5: That the end is unknown is recorded whatever other gap begins at the same number."""
    partial = accepted([*rows(1, 2), *rows(5, 6)], gaps=[Gap(3, 4, "not served")], cursor=6, count=4)
    await store.write(known("run-1"), RunWrite("run-1", AT, "following", partial))
    gone = accepted(rows(1, 2), gaps=[Gap(3, None, "expired")], finished=True)
    await store.write(RunWrite("run-1", AT, "incomplete", gone))
    await store.write(RunWrite("run-1", AT, None, accepted(rows(3, 4), cursor=6, count=6, late=True)))
    assert (await store.run("run-1")).state == "incomplete"
    assert [gap for gap in await store.gaps("run-1") if gap[3]] == [(7, None, "expired", True)]


async def test_complete_has_no_open_end(store: Store) -> None:
    """I5: A worker that gives up just after another has seen the end leaves no gap in a complete run."""
    await store.write(known("run-1"), ending("run-1", 1, 6))
    gone = accepted(rows(1, 2), gaps=[Gap(3, None, "expired")], finished=True)
    await store.write(RunWrite("run-1", AT, "incomplete", gone))
    assert (await store.run("run-1")).state == "complete"
    assert [gap for gap in await store.gaps("run-1") if gap[3]] == []
