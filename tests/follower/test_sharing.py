"""What followers share, places and the committer: nobody loses by it what it has read, nor asks too often."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from tests.support.rig import QUICK, until, working
from worker.errors import InvariantError
from worker.follower import Follower
from worker.places import Places
from worker.storage import committer

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun


def talking(letta: FakeLetta) -> FakeRun:
    """A run that has said something and goes on."""
    run = letta.new_run(letta.new_conversation())
    run.say("one ")
    return run


@pytest.mark.parametrize("is_over", [False, True], ids=["live", "over"])
async def test_waiting_for_the_database_is_neither_idleness_nor_silence(
    letta: FakeLetta, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, *, is_over: bool
) -> None:
    """A lot that waits for room is not given up for another run's turn, nor because the run seems silent (I2, I8)."""
    monkeypatch.setattr(committer, "MAX_WAITING_BYTES", 1)
    run, other = talking(letta), talking(letta)
    other.complete()
    if is_over:
        run.complete()
    async with working(letta, sqlite_url) as rig:
        await rig.sweep()

    async with working(letta, sqlite_url, commits=False) as rig:
        places = Places(1)
        follower = Follower(await rig.stored(run), rig.equipment, places)
        following = asyncio.create_task(follower.follow())
        await until(lambda: follower._runlog.cursor)
        following_other = asyncio.create_task(rig.follow(other, places))
        await asyncio.sleep(3 * QUICK.ended)  # the longest of the waits that might run out
        assert places.is_wanted
        committing = asyncio.create_task(rig.committer.run())
        if not is_over:
            run.complete()
        async with asyncio.timeout(20):
            await asyncio.gather(following, following_other)
        committing.cancel()
        await asyncio.wait([committing])

        await rig.assert_complete(run)
        await rig.assert_complete(other)


async def test_nothing_is_built_upon_a_write_that_failed(rig: Rig, letta: FakeLetta) -> None:
    """What the database cannot take stops its follower: the cursor does not pass it, and it is read again (I2, I7)."""
    run = talking(letta)
    follower = Follower(await rig.stored(run), rig.equipment, Places(1))
    async with rig.engine.begin() as connection:
        await connection.exec_driver_sql(REFUSE_THE_THIRD)
    following = asyncio.create_task(follower.follow())
    await rig.until_stored(run, 2)
    run.say("two ")
    await until(lambda: follower._runlog.cursor == 3 and follower._last_commit and follower._last_commit.durable.done())
    run.complete()

    with pytest.raises(InvariantError, match="does not take this write"):
        await asyncio.wait_for(following, 10)

    assert (await rig.row(run))["last_seq_id"] == 2
    async with rig.engine.begin() as connection:
        await connection.exec_driver_sql("DROP TRIGGER refuse_the_third")
    await rig.follow(run)
    await rig.assert_complete(run)


REFUSE_THE_THIRD = (
    "CREATE TRIGGER refuse_the_third BEFORE INSERT ON chunks WHEN NEW.seq_id = 3"
    " BEGIN SELECT RAISE(ABORT, 'not the third'); END"
)


async def test_silent_runs_come_back_ever_less_often(rig: Rig, letta: FakeLetta) -> None:
    """Runs without news that take turns ask ever later: the server goes on working for a reader that left."""
    one, two = talking(letta), talking(letta)
    places = Places(1)
    async with rig.following(one, places), rig.following(two, places):
        await until(lambda: len(rig.asked("stream", one)) >= 6)
        one.complete()
        two.complete()

    await rig.assert_complete(one)
    await rig.assert_complete(two)
    at = [request.opened_at for request in rig.asked("stream", one)][:6]
    waits = [later - earlier for earlier, later in itertools.pairwise(at)]
    # As seen by the server, with the delays of a busy machine; the first readings brought something.
    assert min(waits[3:]) > 0.75 * rig.patience.most_silence
