"""What the server skips silently: found by number, asked for once more, recorded with the rows behind it (I2, I3)."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

from tests.support.rig import until, working
from worker.demo.fake_faults import Answer, Drip, Hang

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import Entry, FakeRun


def talking(letta: FakeLetta, count: int) -> FakeRun:
    """A run that goes on."""
    run = letta.new_run(letta.new_conversation())
    for number in range(count):
        run.say(f"tok{number:06d} ")
    return run


def lose(run: FakeRun, *seq_ids: int) -> list[Entry]:
    """Let the server's reader skip these numbers; returns the entries, to be put back."""
    lost = [entry for entry in run.log if entry.seq_id in seq_ids]
    for entry in lost:
        run.log[run.log.index(entry)] = dataclasses.replace(entry, data="")
    return lost


def without(run: FakeRun, *seq_ids: int) -> list[tuple[int, str]]:
    """All rows the run ever had but these."""
    return [row for row in run.expected_rows(ever_logged=True) if row[0] not in seq_ids]


async def test_trimmed_run_read_late(rig: Rig, letta: FakeLetta) -> None:
    """Of a 13,000-chunk run read late, what was trimmed is one gap, committed with the rows behind (I2, I3)."""
    run = talking(letta, 13_000)
    run.complete()
    first = run.log[0].seq_id
    assert first > 3000

    await rig.follow(run)

    await rig.assert_stored(run, "incomplete", (1, first - 1, "not served", None))
    assert rig.cursors(run) == [0, 0], "a hole is asked for exactly once more"


async def test_trimmed_while_nobody_watched(letta: FakeLetta, database_url: str) -> None:
    """A cursor that was trimmed away leads to a gap in the middle, and to all rows on both sides (I2)."""
    run = talking(letta, 10)
    async with working(letta, database_url) as rig:
        await rig.stored(run)
        task = asyncio.create_task(rig.follow(run))
        await rig.until_stored(run, 11)
        task.cancel()
        await asyncio.wait([task])
    for number in range(30):
        run.say(f"late{number} ")
    run.trim(20)
    run.complete()

    async with working(letta, database_url) as rig:
        await rig.follow(run)
        await rig.assert_stored(run, "incomplete", (12, 19, "not served", None), rows=without(run, *range(12, 20)))


async def test_several_holes(rig: Rig, letta: FakeLetta) -> None:
    """Chunks lost to a slow reader are gaps of their own, however many; every one is asked for once more (I2)."""
    run = talking(letta, 40)
    run.complete()
    lose(run, 5, 6, 20, 40)

    await rig.follow(run)

    lost = [(5, 6, "not served", None), (20, 20, "not served", None), (40, 40, "not served", None)]
    await rig.assert_stored(run, "incomplete", *lost, rows=without(run, 5, 6, 20, 40))
    assert rig.cursors(run) == [0, 4, 19, 39], "each is asked for exactly once more"


async def test_hole_that_was_only_late(rig: Rig, letta: FakeLetta) -> None:
    """Chunks that come in the second reading leave no gap behind (I5)."""
    run = talking(letta, 10)
    run.complete()
    late = lose(run, 4, 5)
    fault = Hang(on="stream")
    letta.faults += [Drip(100_000, 0, on="stream"), fault]
    async with rig.following(run):
        await until(lambda: fault.fired)
        for entry in late:
            run.log[entry.index] = entry
        fault.release()

    await rig.assert_complete(run)
    assert rig.cursors(run) == [0, 3]


async def test_gap_filled_late(letta: FakeLetta, database_url: str) -> None:
    """Chunks that turn up after their gap was recorded close it: the run is complete after all (I2, I5)."""
    run = talking(letta, 10)
    late = lose(run, 4, 5)
    async with working(letta, database_url) as rig:
        async with rig.following(run):
            await rig.until_stored(run, 9)
            assert await rig.gaps(run) == [(4, 5, "not served", None)]
            run._append(late[0].seq_id, late[0].data, complete=False)
            await rig.until_stored(run, 10)
            run._append(late[1].seq_id, late[1].data, complete=False)
            run.say("and on ")
            run.complete()
        await rig.assert_stored(run, "complete", (4, 5, "not served", "filled"), rows=without(run))


async def test_gap_outlives_its_worker(letta: FakeLetta, database_url: str) -> None:
    """A worker that is started again knows of the gaps found before, and does not call the run complete (I3, I5)."""
    run = talking(letta, 10)
    lose(run, 4, 5)
    async with working(letta, database_url) as rig:
        await rig.stored(run)
        task = asyncio.create_task(rig.follow(run))
        await rig.until_stored(run, 9)
        task.cancel()
        await asyncio.wait([task])
    run.complete()

    async with working(letta, database_url) as rig:
        await rig.follow(run)
        await rig.assert_stored(run, "incomplete", (4, 5, "not served", None), rows=without(run, 4, 5))


async def test_batch_repeated(rig: Rig, letta: FakeLetta) -> None:
    """A batch that the server wrote twice, numbers going backwards, is stored once (I1)."""
    run = talking(letta, 10)
    run.repeat(3, 9)
    for number in range(5):
        run.say(f"more{number} ")
    run.repeat(2, 4)
    run.stop_reason("end_turn")
    run.repeat(12, 17)
    run.usage()
    run.write_done()
    run._end("completed", "end_turn")

    await rig.follow(run)

    await rig.assert_complete(run)
    assert rig.metrics.duplicates._value.get() >= 10


async def test_batch_repeated_at_the_end(rig: Rig, letta: FakeLetta) -> None:
    """A batch written twice just before the unnumbered end costs nothing: asked again, the server skips it (I2)."""
    run = talking(letta, 10)
    run.repeat(3, 5)
    run.complete()

    await rig.follow(run)

    await rig.assert_complete(run)


async def test_bytes_that_are_no_chunk(rig: Rig, letta: FakeLetta) -> None:
    """What is no JSON keeps its place as a reject, verbatim, and what follows it is stored (I6)."""
    run = talking(letta, 3)
    run.write('data: {"broken":\n\n')
    run.say("behind it ")
    run.write('data: {"message_type":"never_heard_of","seq_id":null,"run_id":null,"new":[1,{}]}\n\n')
    run.complete()

    await rig.follow(run)

    rows = [row for row in run.expected_rows() if row[0] != 5]
    assert await rig.rows(run) == rows
    assert await rig.gaps(run) == [(5, 5, "rejected", None)]
    assert await rig.query("SELECT after_seq_id, raw FROM rejects") == [(4, b'{"broken":')]
    assert (await rig.row(run))["state"] == "incomplete"


async def test_hostile_stream(rig: Rig, letta: FakeLetta) -> None:
    """A response of garbage is kept as rejects, moves nothing and stops nothing (I6)."""
    run = talking(letta, 3)
    run.complete()
    garbage = b"data: \xff\xfe\n\ndata: []\n\ndata: 1e999\n\n:comment\n\nid: 7\n\ndata: " + b"[" * 5000 + b"\n\n"
    fault = Answer(200, garbage, content_type="text/event-stream", on="stream", repeat=5)
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired == 1
    await rig.assert_complete(run)


async def test_event_over_the_limit(letta: FakeLetta, sqlite_url: str) -> None:
    """An event over the size limit is rejected with its beginning; memory is bounded and the run goes on (I6, I8)."""
    run = talking(letta, 2)
    run.say("x" * 1_000_000)
    run.say("behind it ")
    run.complete()

    async with working(letta, sqlite_url, max_event_bytes=100_000) as rig:
        await rig.follow(run)

        assert await rig.rows(run) == [row for row in run.expected_rows() if row[0] != 4]
        assert await rig.gaps(run) == [(4, 4, "rejected", None)]
        ((raw,),) = await rig.query("SELECT raw FROM rejects")
        assert raw.startswith(b'data: {"id":"message-')
        assert len(raw) <= 4096
