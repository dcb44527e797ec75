"""What discovery writes, on both databases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tests.storage.store import AT, ending, known, later, lot
from worker.core.records import RunRecord
from worker.storage import tables
from worker.storage.reads import DiscoveryState, Reads
from worker.storage.writes import SweepWrite

if TYPE_CHECKING:
    from tests.storage.store import Store


async def test_a_new_run_is_pending(store: Store) -> None:
    """I3: A run that discovery finds is stored with all that the listing says, pending, at cursor 0."""
    found = RunRecord("run-1", later(-9), "created", "conv-1", "agent-1", True, "x", later(-1), "an error")  # noqa: FBT003
    await store.write(SweepWrite(AT, [found]))
    run = await store.run("run-1")
    assert (run.state, run.last_seq_id, run.chunk_count, run.settled_at) == ("pending", 0, 0, None)
    assert (run.discovered_at, run.updated_at) == (AT, AT)
    assert (await Reads(store.engine, is_patient=False).run("run-1")).record == found  # type: ignore[union-attr]


async def test_a_listing_refreshes_the_status_and_nothing_of_ours(store: Store) -> None:
    """I3: Seeing a known run again updates the server's words; cursor, count and state stay."""
    await store.write(known("run-1", status="created"), lot("run-1", 1, 4))
    ended = RunRecord("run-1", AT, "completed", stop_reason="end_turn", completed_at=later(3))
    await store.write(SweepWrite(later(4), [ended]))
    run = await store.run("run-1")
    assert (run.status, run.stop_reason, run.completed_at) == ("completed", "end_turn", later(3))
    assert (run.state, run.last_seq_id, run.chunk_count, run.discovered_at) == ("following", 4, 4, AT)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_a_stale_listing_does_not_undo_an_end(store: Store, status: str) -> None:
    """I4: A listing from before the run's end does not make it running again."""
    await store.write(known("run-1", status=status), ending("run-1", 1, 2))
    await store.write(known("run-1", status="running"), known("run-1", status=None))
    assert (await store.run("run-1")).status == status


async def test_a_run_without_a_status_gets_one(store: Store) -> None:
    """I3: A status that was missing is filled in by the next listing."""
    await store.write(known("run-1", status=None))
    await store.write(known("run-1", status="running"))
    assert (await store.run("run-1")).status == "running"


async def test_the_position_only_goes_forward(store: Store) -> None:
    """I4: Two workers sweep; the position is the furthest of them."""
    reads = Reads(store.engine, is_patient=False)
    assert await reads.discovery_state() == DiscoveryState(None, {})
    for position, expected in ((later(5), later(5)), (later(3), later(5)), (later(6.000001), later(6.000001))):
        await store.write(SweepWrite(AT, (), position))
        assert (await reads.discovery_state()).position_at == expected
    assert await store.count(tables.discovery) == 1


async def test_scopes_come_and_go(store: Store) -> None:
    """I4: A new scope keeps the start it was first given; a dropped one is forgotten and may come anew."""
    reads = Reads(store.engine, is_patient=False)
    await store.write(SweepWrite(AT, (), later(1), new_scopes={"all": None, "agent:a": later(1)}))
    await store.write(SweepWrite(AT, (), new_scopes={"all": later(9), "agent:a": later(9)}))
    assert await reads.discovery_state() == DiscoveryState(later(1), {"all": None, "agent:a": later(1)})
    await store.write(SweepWrite(AT, (), dropped_scopes=["all"]))
    assert await reads.discovery_state() == DiscoveryState(later(1), {"agent:a": later(1)})
    await store.write(SweepWrite(AT, (), new_scopes={"all": later(2)}))
    assert (await reads.discovery_state()).scopes["all"] == later(2)


async def test_a_page_with_the_same_run_twice(store: Store) -> None:
    """I6: A listing that repeats a run, and one of many runs, are stored."""
    many = [RunRecord(f"run-{number}", AT, "running") for number in range(500)]
    await store.write(SweepWrite(AT, [*many, *many[:3]]), known("run-1"))
    assert await store.count(tables.runs) == 500
    assert (await store.all(sa.select(sa.func.count()).where(tables.runs.c.state == "pending")))[0][0] == 500
