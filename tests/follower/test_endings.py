"""Every way a run can end: decided from evidence, never from the end of a response (letta-protocol g)."""

from __future__ import annotations

import asyncio
import itertools
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.support.rig import until, working
from worker.demo.fake_faults import Drip, EndEarly, Hang

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun


def talking(letta: FakeLetta, count: int = 5) -> FakeRun:
    """A run that goes on."""
    run = letta.new_run(letta.new_conversation())
    for number in range(count):
        run.say(f"tok{number:06d} ")
    return run


async def test_completed(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A completed run is complete: thoughts, tool calls and the unnumbered end included (I5)."""
    run = letta.new_run(letta.new_conversation())
    run.think("hm")
    run.call_tool("look", '{"where": "there"}')
    run.tool_return("nothing")
    run.say("Nothing\0\u2028\u0085 there.")
    run.complete()

    await rig_on_both.follow(run)

    await rig_on_both.assert_complete(run)
    kinds = ["user_message", "reasoning_message", "tool_call_message", "tool_return_message", "assistant_message"]
    assert await rig_on_both.messages(run) == kinds
    source = "SELECT message_type, seq_source FROM chunks ORDER BY seq_id DESC LIMIT 2"
    assert await rig_on_both.query(source) == [("usage_statistics", "derived"), ("stop_reason", "derived")]


@pytest.mark.parametrize("pings", [True, False])
async def test_completed_while_followed(rig: Rig, letta: FakeLetta, *, pings: bool) -> None:
    """A live run is stored as it goes, whether its log begins with a ping or not, and is complete at its end (I9)."""
    run = letta.new_run(letta.new_conversation(), pings=pings)
    async with rig.following(run):
        for number in range(20):
            seq_id = run.say(f"tok{number} ")
            await rig.until_stored(run, seq_id)
            assert (await rig.row(run))["state"] == "following"
        run.complete()

    await rig.assert_complete(run)
    assert len(rig.asked("stream")) == 1


async def test_completed_before_its_status(rig: Rig, letta: FakeLetta) -> None:
    """The status may follow the marker after a moment: the stored one is the last (I5)."""
    run = talking(letta)
    async with rig.following(run):
        run.stop_reason("end_turn")
        run.usage()
        run.write_done()
        await until(lambda: rig.asked("run"))
        run._end("completed", "end_turn")

    await rig.assert_complete(run)


async def test_failed(rig_on_both: Rig, letta: FakeLetta) -> None:
    """The run's own error is a chunk with a number and its end, although no [DONE] follows (I5)."""
    run = talking(letta)
    run.fail("the model hung up")

    await rig_on_both.follow(run)

    await rig_on_both.assert_complete(run)
    assert [payload for _, payload in await rig_on_both.rows(run)][-1].startswith('{"message_type":"error_message"')
    assert "the model hung up" in (await rig_on_both.row(run))["error"]
    assert await rig_on_both.messages(run) == []
    assert len(rig_on_both.asked("stream")) == 1


async def test_failed_at_its_start(rig: Rig, letta: FakeLetta) -> None:
    """A run that failed before it had a stream is given up after two silences, and says why (I5)."""
    run = letta.new_run(letta.new_conversation())
    run.fail_to_start("no Redis")

    await rig.follow(run)

    gap = (1, None, "not served", None)
    assert (await rig.rows(run), await rig.gaps(run)) == ([], [gap])
    row = await rig.row(run)
    assert (row["state"], row["status"], row["error"]) == ("unavailable", "failed", "no Redis")
    assert len(rig.asked("stream")) == 2


async def test_cancelled_while_followed(rig: Rig, letta: FakeLetta) -> None:
    """The stop_reason made up for a live reader is not the end: the chunks behind it are stored (I2)."""
    run = talking(letta)
    async with rig.following(run):
        await rig.until_stored(run, 6)
        letta.cancel_check_interval = 0  # the server's check is due with the next chunk
        run.cancel()
        run.say("this one the live reader never gets")
        await until(lambda: rig.asked("stream")[0].closed_at)
        letta.cancel_check_interval = 60
        run.say("late ")
        run.finish_cancel()

    await rig.assert_complete(run)
    assert len(rig.asked("stream")) >= 2


async def test_cancelled_while_nobody_watched(rig: Rig, letta: FakeLetta) -> None:
    """A cancelled run is read again from the cursor until its stored end, however often it is cut (I2)."""
    run = talking(letta, 400)
    run.cancel()
    run.finish_cancel()
    slow = Drip(1000, 0.001, on="stream", times=3)
    letta.faults.append(slow)

    await rig.follow(run)

    await rig.assert_complete(run)
    assert slow.fired == 3, "too few readings were cut"


async def test_cancelled_and_orphaned(rig: Rig, letta: FakeLetta) -> None:
    """A cancelled run whose end never comes is given up after a bounded time, with what it had (I5)."""
    run = talking(letta)
    run.cancel()

    await rig.follow(run)

    await rig.assert_stored(run, "incomplete", (7, None, "not served", None))
    assert len(rig.asked("stream")) <= 5


async def test_cancelled_and_too_long_to_be_read(rig: Rig, letta: FakeLetta) -> None:
    """Where the server needs too long to get to the cursor, it cuts every reading off there: the rest is a gap (I5)."""
    run = talking(letta)
    async with rig.following(run):
        await rig.until_stored(run, 6)
        had = run.expected_rows()
        letta.cancel_check_interval = 0  # its check is due before the first chunk behind the cursor
        run.cancel()
        run.say("in the log, and never sent")
        run.finish_cancel()

    await rig.assert_stored(run, "incomplete", (7, None, "not served", None), rows=had)
    assert len(rig.asked("stream")) <= 10


async def test_orphan_expires(rig_on_both: Rig, letta: FakeLetta) -> None:
    """An orphan sends pings for ever; it is asked for ever less often, and at its 410 its end is a gap (I5, I9)."""
    rig, run = rig_on_both, talking(letta)
    async with rig.following(run) as following:
        await until(lambda: len(rig.asked("run", run)) >= 5)
        assert not following.done()
        assert len(rig.asked("stream", run)) == 1
        looked = [request.opened_at for request in rig.asked("run", run)]
        waits = [later - earlier for earlier, later in itertools.pairwise(looked)]
        # Requests reach the server with the delays of a busy machine, so the waits between them are not exact.
        assert waits[0] < 0.75 * waits[2]
        assert waits[3] > 0.75 * rig.patience.most_silence
        letta.retention = timedelta(0)
        await letta.drop_connections()

    await rig.assert_stored(run, "incomplete", (7, None, "expired", None))
    assert (await rig.row(run))["status"] == "running"


async def test_orphan_between_silent_ends(rig: Rig, letta: FakeLetta) -> None:
    """Responses that end after nothing but pings prove nothing: REST is asked first, and the run goes on (I5)."""
    run = talking(letta)
    letta.max_stream_silence = 0.05
    # A response ends long before its silence is looked up, also on a busy machine: REST is asked between them only.
    rig.patience = msgspec.structs.replace(rig.patience, silence=5.0)
    async with rig.following(run):
        await until(lambda: len(rig.asked("stream", run)) >= 4)
        asked = [request.kind for request in letta.requests if request.kind in {"stream", "run"}]
        assert asked[:6] == ["stream", "stream", "run", "stream", "run", "stream"]
        assert (await rig.row(run))["state"] == "following"
        run.say("it lives")
        run.complete()

    await rig.assert_complete(run)


async def test_vanished_stream(rig: Rig, letta: FakeLetta) -> None:
    """Of a stream that is gone the rows stay, the rest is a gap, and REST gives the messages (I5)."""
    run = talking(letta)
    async with rig.following(run):
        await rig.until_stored(run, 6)
        had = run.expected_rows()
        run.forget()
        run.complete()
        run.forget()

    await rig.assert_stored(run, "backfilled", (7, None, "not served", None), rows=had)
    assert await rig.messages(run) == ["user_message", "assistant_message"]


async def test_vanished_before_it_was_read(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A completed run without a single byte of stream is backfilled from REST (I5)."""
    run = talking(letta)
    run.complete()
    run.forget()

    await rig_on_both.follow(run)

    assert await rig_on_both.rows(run) == []
    assert await rig_on_both.gaps(run) == [(1, None, "not served", None)]
    row = await rig_on_both.row(run)
    assert (row["state"], row["status"], row["chunk_count"]) == ("backfilled", "completed", 0)
    assert await rig_on_both.messages(run) == ["user_message", "assistant_message"]
    assert len(rig_on_both.asked("stream")) == 2


async def test_no_bytes_at_all(rig: Rig, letta: FakeLetta) -> None:
    """A request that is never answered, not even by a status line, is given up, and the run with it, in time."""
    run = talking(letta)
    run.complete()
    fault = Hang(on="stream", times=None)
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired == 2
    assert (await rig.row(run))["state"] == "backfilled"


@pytest.mark.parametrize("after_events", [0, 3])
async def test_frozen_for_a_while(rig: Rig, letta: FakeLetta, after_events: int) -> None:
    """One silence after the end is not taken for the end: the second reading brings everything (I5)."""
    run = talking(letta)
    run.complete()
    fault = Hang(after_events, on="stream")
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired == 1
    await rig.assert_complete(run)


async def test_only_the_end_is_left(letta: FakeLetta, database_url: str) -> None:
    """Started again at the last visible number, the worker gets only unnumbered events and numbers them right (I2)."""
    run = talking(letta)
    run.complete()
    fault = EndEarly(6, on="stream")
    hang = Hang(on="stream", times=None)
    letta.faults += [fault, hang]
    async with working(letta, database_url) as rig:
        await rig.stored(run)
        task = asyncio.create_task(rig.follow(run))
        await until(lambda: hang.fired)
        await rig.until_stored(run, 6)
        task.cancel()
        await asyncio.wait([task])
    letta.faults.clear()
    letta.requests.clear()

    async with working(letta, database_url) as rig:
        await rig.follow(run)
        await rig.assert_complete(run)

    assert fault.fired == 1
    assert rig.cursors(run) == [6, 6]
    assert [request.path.split("/")[2] for request in rig.asked("stream")] == ["conversations", "runs"], (
        "events that name no run prove themselves only at the run's own endpoint"
    )


async def test_cursor_at_the_end(rig: Rig, letta: FakeLetta) -> None:
    """Asked for what is behind the last number the server never answers; the worker does not wait for ever (I5)."""
    run = talking(letta)
    run.fail("gone")
    await rig.follow(run)
    async with rig.engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE runs SET state = 'following', settled_at = NULL")

    await rig.follow(run)

    last = run.expected_rows()[-1][0]
    await rig.assert_stored(run, "incomplete", (last + 1, None, "not served", None))
    assert rig.cursors(run) == [0, last, last]


async def test_settled_run_is_never_reopened(rig: Rig, letta: FakeLetta) -> None:
    """A finished run that was not settled gets its messages; its stream is not asked for again (I5)."""
    run = talking(letta)
    run.complete()
    await rig.follow(run)
    async with rig.engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE runs SET settled_at = NULL")

    await rig.follow(run)

    await rig.assert_complete(run)
    assert len(rig.asked("stream")) == 1
