"""A response may break or end at any place: nothing is lost, nothing doubled, and the cursor leads on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.support.rig import until
from worker.demo.fake_faults import Answer, Cut, EndEarly, Hang, ReaderError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.rig import Rig
    from worker.demo.fake_faults import Fault
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun


def recorded(letta: FakeLetta) -> FakeRun:
    """A finished run of twelve events, with two of them unnumbered, bytes that are not ASCII, and a tool call."""
    run = letta.new_run(letta.new_conversation())
    run.think("Ünï")
    run.call_tool("look")
    run.tool_return("\u2028")
    for number in range(4):
        run.say(f"tök{number} ")
    run.complete()
    return run


async def follow_each(rig: Rig, faults: list[Callable[[FakeRun], Fault]]) -> None:
    """Follow one recorded run per fault, all at once; each fault must fire, each run must be complete."""
    runs = [recorded(rig.letta) for _ in faults]
    made = [make(run) for make, run in zip(faults, runs, strict=True)]
    rig.letta.faults += made
    await rig.sweep()

    await asyncio.gather(*(rig.follow(run) for run in runs))

    for run, fault in zip(runs, made, strict=True):
        assert fault.fired >= 1, fault
        await rig.assert_complete(run)
        assert len(rig.asked("stream", run)) > 1


async def test_cut_after_every_event(rig_on_both: Rig) -> None:
    """A response cut behind any event, pings and unnumbered ones included, is taken up behind it (I2)."""
    event_count = len(recorded(rig_on_both.letta).log) - 1  # the second [DONE] is never sent
    await follow_each(
        rig_on_both, [lambda run, n=n: EndEarly(n, on="stream", run_id=run.id) for n in range(event_count)]
    )


async def test_reader_breaks_after_every_event(rig: Rig) -> None:
    """The server's own reader may fail behind any event: the run goes on, and the error is no part of it (I5)."""
    faults = [lambda run, n=n: ReaderError(n, on="stream", run_id=run.id) for n in range(1, 11)]
    await follow_each(rig, faults)


async def test_every_reading_is_cut(rig: Rig, letta: FakeLetta) -> None:
    """A run whose every response breaks after two more events is complete in the end (I2)."""
    run = recorded(letta)
    fault = Cut(900, on="stream", times=8)
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired >= 4
    assert rig.cursors(run) == sorted(rig.cursors(run))
    await rig.assert_complete(run)


async def test_truncated_chunk_is_not_parsed(rig: Rig, letta: FakeLetta) -> None:
    """An event that the end of a response cuts short is not taken for a whole one (I1)."""
    run = recorded(letta)
    whole = run.on_the_wire(run.log[0]) + run.on_the_wire(run.log[1])
    faults = [Answer(200, whole.encode()[:-cut], content_type="text/event-stream", on="stream") for cut in (1, 2, 30)]
    letta.faults += faults

    await rig.follow(run)

    assert [fault.fired for fault in faults] == [1, 1, 1]
    assert set(rig.cursors(run)) == {0, 1}
    await rig.assert_complete(run)


async def test_live_run_survives_restarts_of_the_server(rig: Rig, letta: FakeLetta) -> None:
    """Every connection aborted and the port closed, again and again: the live run is stored without a hole (I2)."""
    run = letta.new_run(letta.new_conversation())
    async with rig.following(run):
        for number in range(5):
            await rig.until_stored(run, run.say(f"tok{number} "))
            await letta.stop_listening()
            await letta.drop_connections()
            run.say("said while nobody could listen ")
            refused = len(rig.log.of("run.reconnecting"))
            await until(lambda refused=refused: len(rig.log.of("run.reconnecting")) > refused + 2)
            await letta.start_listening()
        run.complete()

    await rig.assert_complete(run)
    assert any("Cannot connect" in str(line.get("error")) for line in rig.log.of("run.reconnecting"))


async def test_hanging_connection_is_left(rig: Rig, letta: FakeLetta) -> None:
    """A live run that falls silent for ever is only looked up; when its connection breaks, it goes on (I2)."""
    run = letta.new_run(letta.new_conversation())
    fault = Hang(3, on="stream")
    letta.faults.append(fault)
    run.say("one ")
    run.say("two ")
    async with rig.following(run):
        run.say("three ")
        run.complete()
        await until(lambda: fault.fired)

    await rig.assert_complete(run)
    assert rig.cursors(run) == [0, 3]
