"""verify: finds what is wrong in a store and what the server has that the store has not, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tests.support.rig import SECRET, hurry, working
from worker import app
from worker.config import Config
from worker.demo.fake_letta import FakeLetta
from worker.verify import Report, verify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.rig import Rig
    from worker.demo.fake_run import FakeRun


@pytest.fixture
async def letta(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeLetta]:
    """A fake server with quick clocks."""
    hurry(monkeypatch)
    async with FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.03, seed=1) as server:
        yield server


@pytest.fixture
def config(letta: FakeLetta, database_url: str) -> Config:
    """What `verify` is given."""
    return Config.model_validate(
        {
            "letta": {"base_url": letta.url, "api_key": SECRET},
            "watch": {"all": True},
            "storage": {"url": database_url},
        }
    )


@pytest.fixture
async def rig(letta: FakeLetta, database_url: str) -> AsyncIterator[Rig]:
    """A worker on the same database."""
    async with working(letta, database_url) as made:
        yield made


def said(letta: FakeLetta) -> FakeRun:
    """A completed run of 6 chunks."""
    run = letta.new_run(letta.new_conversation())
    for word in ("one ", "two ", "three "):
        run.say(word)
    run.complete()
    return run


async def verified(config: Config, *, with_server: bool = False) -> Report:
    """The report, and its progress told to the end."""
    seen: list[tuple[int, int]] = []
    report = await verify(config, with_server=with_server, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, report.runs) for n in range(1, report.runs + 1)]
    return report


async def change(config: Config, sql: str) -> None:
    """Break what is stored behind the worker's back; the change is shown to have happened."""
    async with app.open_database(config) as engine, engine.begin() as connection:
        assert (await connection.execute(sa.text(sql))).rowcount


async def test_a_sound_store(rig: Rig, letta: FakeLetta, config: Config) -> None:
    """Complete, cancelled, trimmed, expired and live runs are all sound, and are counted for what they are (I5)."""
    complete, trimmed, gone, alive = said(letta), said(letta), said(letta), letta.new_run(letta.new_conversation())
    trimmed.trim(3)
    gone.created_at -= letta.retention
    for run in (complete, trimmed, gone):
        await rig.follow(run)
    await rig.stored(alive)
    report = await verified(config, with_server=True)
    assert report.is_sound
    assert (report.runs, report.chunks, report.runs_with_gaps) == (4, 6 + 4, 2)
    assert report.states == {"complete": 1, "incomplete": 1, "backfilled": 1, "pending": 1}
    assert (report.server_runs, report.undiscovered_runs, report.unknown_runs) == (4, 0, [])


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("DELETE FROM chunks WHERE seq_id = 3", "3 are neither stored nor a gap"),
        ("UPDATE runs SET last_seq_id = 9", "7-9 are neither stored nor a gap"),
        ("UPDATE runs SET chunk_count = 5", "chunk_count is 5, but 6 rows are stored"),
        ("UPDATE chunks SET payload = 'x' WHERE seq_id = 2", "the payload of 2 is not a chunk"),
        ("UPDATE chunks SET seq_id = 7 WHERE seq_id = 6", "6 are neither stored nor a gap"),
        ("UPDATE runs SET state = 'incomplete'", "the run is incomplete, but no gap says what is missing"),
        ("UPDATE runs SET verdict = 'differs'", "the stored verdict is differs, but chunks and messages say: agrees"),
        ("DELETE FROM messages", "the stored verdict is agrees, but chunks and messages say: unmatched"),
    ],
)
async def test_a_store_that_was_tampered_with(
    rig: Rig, letta: FakeLetta, config: Config, broken: str, fault: str
) -> None:
    """What is lost or changed behind the worker's back makes the store unsound, and is named (I1, I2, I5)."""
    run = said(letta)
    await rig.follow(run)
    await change(config, broken)
    report = await verified(config)
    assert not report.is_sound
    assert [faulty.run_id for faulty in report.faulty] == [run.id]
    assert any(fault in text for text in report.faulty[0].faults), report.faulty[0].faults


async def test_messages_that_differ_are_no_fault_of_ours(rig: Rig, letta: FakeLetta, config: Config) -> None:
    """A run whose messages say something else is listed with what differs; the store is sound all the same (I5)."""
    run = said(letta)
    run._parts[-1].deltas[0] = "ONE "
    await rig.follow(run)
    report = await verified(config)
    assert report.is_sound
    assert [(found.run_id, len(found.differences)) for found in report.differing] == [(run.id, 1)]


async def test_a_run_the_store_has_lost(rig: Rig, letta: FakeLetta, config: Config) -> None:
    """A run that the server lists, older than discovery's position, and that is not stored is missing (I5)."""
    kept, lost, late = said(letta), said(letta), None
    for run in (kept, lost):
        await rig.follow(run)
    await change(config, f"DELETE FROM runs WHERE run_id = '{lost.id}'")
    late = said(letta)
    assert (await verified(config)).is_sound
    report = await verified(config, with_server=True)
    assert not report.is_sound
    assert report.unknown_runs == [lost.id]
    assert (report.server_runs, report.undiscovered_runs) == (3, 1), late
