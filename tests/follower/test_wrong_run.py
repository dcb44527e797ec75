"""A conversation endpoint that ignores `run_id` answers for another run: noticed, and nothing is stored under it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.support.rig import working
from worker.demo.fake_faults import OtherRun

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun


def finished(letta: FakeLetta, conversation_id: str | None, word: str = "mine") -> FakeRun:
    """A run of this conversation that is over."""
    run = letta.new_run(conversation_id, prompt=word)
    run.say(f"{word} one ")
    run.say(f"{word} two ")
    run.complete()
    return run


async def test_another_run_is_active(rig: Rig, letta: FakeLetta) -> None:
    """Where the newest active run is another one, the run's own endpoint is asked instead (I1)."""
    letta.honours_run_id = False
    conversation = letta.new_conversation()
    run = finished(letta, conversation)
    other = letta.new_run(conversation)
    other.say("theirs")

    await rig.follow(run)

    await rig.assert_complete(run)
    assert await rig.rows(other) == []
    assert [request.path.split("/")[2] for request in rig.asked("stream", run)] == ["conversations", "runs"]
    assert rig.log.of("run.address_changed")


@pytest.mark.parametrize("include_pings", [True, False])
async def test_another_run_is_active_and_silent(letta: FakeLetta, sqlite_url: str, *, include_pings: bool) -> None:
    """Another run's silence, in which not even a ping gives it away, is not taken for the end of ours (I5)."""
    letta.honours_run_id = False
    conversation = letta.new_conversation()
    run = finished(letta, conversation)
    orphan = letta.new_run(conversation, pings=False)

    async with working(letta, sqlite_url, include_pings=include_pings) as rig:
        await rig.follow(run)

        await rig.assert_complete(run)
        assert orphan.status == "running"
        assert [request.path.split("/")[2] for request in rig.asked("stream", run)] == ["conversations", "runs"]


async def test_no_run_is_active(rig_on_both: Rig, letta: FakeLetta) -> None:
    """`No active runs found` from a server that ignores run_id says nothing of this run (I5)."""
    letta.honours_run_id = False
    run = finished(letta, letta.new_conversation())

    await rig_on_both.follow(run)

    await rig_on_both.assert_complete(run)


async def test_unnumbered_tail_of_another_run(rig: Rig, letta: FakeLetta) -> None:
    """Events that name no run are not believed: the end of the wrong run ends nothing (I5)."""
    conversation = letta.new_conversation()
    run, other = letta.new_run(conversation), finished(letta, conversation, "theirs")
    fault = OtherRun(other, on="stream", times=1)
    letta.faults.append(fault)
    other.trim(len(other.log) - 3)
    assert [entry.payload[:12] for entry in other.log][-2:] == ["[DONE]", "[DONE]"]
    run.say("one ")
    run.complete()

    await rig.follow(run)

    assert fault.fired == 1
    await rig.assert_complete(run)


async def test_chunks_of_another_run(rig: Rig, letta: FakeLetta) -> None:
    """Another run's chunks, numbered just as ours would be, are not stored under our name (I1)."""
    conversation = letta.new_conversation()
    run, other = finished(letta, conversation), finished(letta, conversation, "theirs")
    fault = OtherRun(other, run_id=run.id, on="stream")
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired == 1
    await rig.assert_complete(run)
    assert await rig.query("SELECT count(*) FROM rejects") == [(0,)]


async def test_another_run_has_expired(rig: Rig, letta: FakeLetta) -> None:
    """A 410 for the conversation's orphan is not taken for the run's own (I5)."""
    letta.honours_run_id = False
    conversation = letta.new_conversation()
    orphan = letta.new_run(conversation, created_at=datetime.now(UTC) - timedelta(hours=4))
    run = finished(letta, conversation)

    await rig.follow(run)

    assert orphan.status == "running"
    assert [request.status for request in rig.asked("stream", run)] == [410, 200]
    await rig.assert_complete(run)


async def test_another_run_is_not_background(rig: Rig, letta: FakeLetta) -> None:
    """A 400 about another run's mode is not taken for the run's own (I5)."""
    letta.honours_run_id = False
    conversation = letta.new_conversation()
    run = finished(letta, conversation)
    letta.new_run(conversation, background=False)

    await rig.follow(run)

    assert [request.status for request in rig.asked("stream", run)] == [400, 200]
    await rig.assert_complete(run)


async def test_agent_direct(rig: Rig, letta: FakeLetta) -> None:
    """`default` finds the agent's newest run whatever its conversation; an agent-direct run is stored all the same."""
    letta.honours_run_id = False
    agent = letta.new_agent()
    run = finished(letta, None)
    run.agent_id = agent
    named = letta.new_run(letta.new_conversation(agent))
    named.say("theirs")

    await rig.follow(run)

    await rig.assert_complete(run)
    first = rig.asked("stream", run)[0]
    assert (first.path, first.body["agent_id"]) == ("/v1/conversations/default/stream", agent)
