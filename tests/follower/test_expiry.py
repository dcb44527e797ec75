"""Runs without a stream: expired, deleted, or never streamed; what REST has is kept, and what is missing said."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tests.support.rig import until, working
from worker.demo.fake_faults import Answer
from worker.follower import Follower
from worker.places import Places

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun

OLD = timedelta(hours=4)


def old_run(letta: FakeLetta, age: timedelta = OLD) -> FakeRun:
    """A run of four chunks that began long ago and goes on."""
    run = letta.new_run(letta.new_conversation(), created_at=datetime.now(UTC) - age, prompt="long ago")
    run.think("hm ")
    run.say("yes ")
    run.say("no")
    return run


async def test_expired_at_discovery(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A run that was never read in its three hours is backfilled with its messages, and its gap is all of it (I5)."""
    run = old_run(letta)
    run.complete()

    await rig_on_both.follow(run)

    await rig_on_both.assert_stored(run, "backfilled", (1, None, "expired", None), rows=[])
    assert await rig_on_both.messages(run) == ["user_message", "reasoning_message", "assistant_message"]
    texts = "SELECT text FROM messages ORDER BY position"
    assert await rig_on_both.query(texts) == [("long ago",), ("hm ",), ("yes no",)]


async def test_expired_half_read(letta: FakeLetta, sqlite_url: str) -> None:
    """Of a run that expired while the worker was down the rows stay, and the gap begins behind the cursor (I5)."""
    run = old_run(letta, timedelta(hours=2))
    async with working(letta, sqlite_url) as rig:
        await rig.stored(run)
        task = asyncio.create_task(rig.follow(run))
        await rig.until_stored(run, 4)
        task.cancel()
        await asyncio.wait([task])
        had = run.expected_rows()
    run.say("never read")
    run.complete()
    letta.retention = timedelta(hours=1)

    async with working(letta, sqlite_url) as rig:
        await rig.follow(run)
        await rig.assert_stored(run, "backfilled", (5, None, "expired", None), rows=had)
        said = [(request.path.split("/")[2], request.status) for request in rig.asked("stream", run)]
        assert said[1:] == [("conversations", 410), ("runs", 410)], "the run's own 410 is final"


async def test_expired_behind_another_worker(rig: Rig, letta: FakeLetta) -> None:
    """A worker that is behind records the gap where the rows of another end, not where its own do (I4, I5)."""
    run = old_run(letta, timedelta(hours=2))
    behind = Follower(await rig.stored(run), rig.equipment, Places(1))
    task = asyncio.create_task(rig.follow(run))
    await rig.until_stored(run, 4)
    task.cancel()
    await asyncio.wait([task])
    had = run.expected_rows()
    run.complete()
    letta.retention = timedelta(hours=1)

    await behind.follow()

    await rig.assert_stored(run, "backfilled", (5, None, "expired", None), rows=had)


async def test_failed_and_expired(rig: Rig, letta: FakeLetta) -> None:
    """A failed run stores no messages; expired unread, nothing of it is available, and that is said (I5)."""
    run = old_run(letta)
    run.fail("gone")

    await rig.follow(run)

    await rig.assert_stored(run, "unavailable", (1, None, "expired", None), rows=[])
    assert "gone" in (await rig.row(run))["error"]
    assert await rig.messages(run) == []


async def test_not_background(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A run that was not made in background mode never had a stream: none is asked for, its messages are kept (I5)."""
    run = letta.new_run(letta.new_conversation(), background=False)
    run.say("said in the foreground")
    run.complete()

    await rig_on_both.follow(run)

    await rig_on_both.assert_stored(run, "backfilled", (1, None, "not made in background mode", None), rows=[])
    assert await rig_on_both.messages(run) == ["user_message", "assistant_message"]
    assert rig_on_both.asked("stream") == []


async def test_not_background_and_still_running(rig: Rig, letta: FakeLetta) -> None:
    """REST has the messages of a run without a stream only once it is over: so long it is waited for (I5)."""
    run = letta.new_run(letta.new_conversation(), background=False)
    async with rig.following(run):
        await until(lambda: rig.asked("run", run))
        assert rig.asked("messages", run) == []
        run.say("said in the foreground")
        run.complete()

    assert await rig.messages(run) == ["user_message", "assistant_message"]
    assert rig.asked("stream") == []


async def test_not_background_says_the_endpoint(rig: Rig, letta: FakeLetta) -> None:
    """A listing without the word background does not hide it: the endpoint's 400 says so (I5)."""
    run = letta.new_run(None, background=False)
    run.say("said in the foreground")
    run.complete()
    fault = Answer(200, body_of(run, background=None), on="runs")
    letta.faults.append(fault)
    await rig.sweep()
    async with rig.engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE runs SET agent_id = NULL")

    await rig.follow(run)

    assert fault.fired == 1
    await rig.assert_stored(run, "backfilled", (1, None, "not made in background mode", None), rows=[])
    assert len(rig.asked("stream")) == 1


def body_of(run: FakeRun, **fields: object) -> bytes:
    """A listing of this run with some fields changed."""
    return json.dumps([run.as_json(listed=True) | fields]).encode()


async def test_deleted_run(rig: Rig, letta: FakeLetta) -> None:
    """A run the server knows no more is unavailable, with the server's word for it (I5)."""
    run = old_run(letta)
    await rig.stored(run)
    del letta.runs[run.id]

    await rig.follow(run)

    assert await rig.rows(run) == []
    assert await rig.gaps(run) == [(1, None, "unknown to the server", None)]
    row = await rig.row(run)
    assert row["state"] == "unavailable"
    assert "does not know the run" in row["error"]
    assert row["settled_at"]


async def test_deleted_conversation(rig: Rig, letta: FakeLetta) -> None:
    """The stream of a deleted conversation's run is read to its end all the same, though REST has no messages (I5)."""
    run = letta.new_run(letta.new_conversation())
    run.say("one ")
    run.complete()
    letta.delete_conversation(str(run.conversation_id))

    await rig.follow(run)

    await rig.assert_complete(run)
    assert await rig.messages(run) == []
    assert await rig.query("SELECT verdict FROM runs") == [("unmatched",)]


async def test_deleted_while_followed(rig: Rig, letta: FakeLetta) -> None:
    """A run deleted under its reader keeps its rows and is settled, and nobody asks for it again (I5)."""
    run = letta.new_run(letta.new_conversation())
    run.say("one ")
    async with rig.following(run):
        await rig.until_stored(run, 2)
        del letta.runs[run.id]

    assert await rig.rows(run) == run.expected_rows()
    assert await rig.gaps(run) == [(3, None, "unknown to the server", None)]
    assert (await rig.row(run))["state"] == "incomplete"


async def test_deleted_without_a_stream(rig: Rig, letta: FakeLetta) -> None:
    """A run without a stream that is deleted while its end is waited for is settled too (I5)."""
    run = letta.new_run(letta.new_conversation(), background=False)
    await rig.stored(run)
    del letta.runs[run.id]

    await rig.follow(run)

    row = await rig.row(run)
    assert (row["state"], bool(row["settled_at"])) == ("unavailable", True)


async def test_messages_are_not_given(rig: Rig, letta: FakeLetta) -> None:
    """Messages the server never gives do not hold the run open; its row says what is missing (I5)."""
    run = letta.new_run(letta.new_conversation())
    run.say("one ")
    run.complete()
    fault = Answer(500, b'{"detail":"An unknown error occurred"}', on="messages", times=None)
    letta.faults.append(fault)

    await rig.follow(run)

    await rig.assert_complete(run)
    assert "messages: HTTP 500: An unknown error occurred" in (await rig.row(run))["error"]
    assert 1 < fault.fired < 20


async def test_many_messages(rig: Rig, letta: FakeLetta) -> None:
    """The pages of messages are walked to their end, whatever a page's length says (I1)."""
    run = letta.new_run(letta.new_conversation())
    for number in range(120):
        run.think(f"step {number}")
        run.call_tool("count", str(number))
        run.tool_return(str(number))
    run.say("done")
    run.complete()

    await rig.follow(run)

    await rig.assert_complete(run)
    assert len(await rig.messages(run)) == len(run.messages) == 362
    assert len(rig.asked("messages", run)) >= 3
