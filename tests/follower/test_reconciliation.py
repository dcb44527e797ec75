"""When a run is over: its verdict, and what people read in the views and by the queries of docs/queries.md."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from worker.demo.fake_faults import Answer

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun

QUERIES = re.findall(r"```sql\n(.*?)```", (Path(__file__).parents[2] / "docs" / "queries.md").read_text(), re.DOTALL)


def completed(letta: FakeLetta, conversation: str) -> FakeRun:
    """A run with everything an agent can say."""
    run = letta.new_run(conversation, prompt="refund me")
    run.think("hm\0m")
    run.call_tool("look", '{"order": 7}')
    run.tool_return("paid twice")
    run.say("You get ")
    run.say("your refund.")
    run.complete()
    return run


def cancelled(letta: FakeLetta, conversation: str) -> FakeRun:
    """A run of which the server keeps no message."""
    run = letta.new_run(conversation, prompt="and again")
    run.say("Wait, ")
    run.say("let me")
    run.cancel()
    run.finish_cancel()
    return run


async def verdict(rig: Rig, run: FakeRun) -> Any:
    """The verdict, its detail, and the completeness people are shown."""
    columns = "verdict, verdict_detail, completeness"
    return (await rig.query(f"SELECT {columns} FROM run_report WHERE run_id = :run", run=run.id))[0]


async def test_streamed_and_stored_agree(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A complete run whose messages say what was streamed is called so, NUL and all (I5)."""
    run = completed(letta, letta.new_conversation())
    await rig_on_both.follow(run)
    assert await verdict(rig_on_both, run) == ("agrees", None, "complete")
    assert await rig_on_both.query("SELECT * FROM streamed_messages") == []


async def test_a_stored_message_that_differs_is_told(rig_on_both: Rig, letta: FakeLetta) -> None:
    """Where all chunks are there and the messages say something else, the verdict says which, and where (I5)."""
    run = completed(letta, letta.new_conversation())
    answer = run._parts[-1]
    answer.deltas[-1] = "nothing."
    await rig_on_both.follow(run)
    detail = f"assistant_message {answer.message['id']}: its text differs from the stored one"
    assert await verdict(rig_on_both, run) == ("differs", detail, "differs")
    assert rig_on_both.log.of("run.differs") == [
        {"run_id": run.id, "conversation_id": run.conversation_id, "differences": [detail]}
    ]
    assert (await rig_on_both.row(run))["state"] == "complete"


@pytest.mark.parametrize("last_word", ["your refund.", "nothing."])
async def test_a_worker_that_heard_only_the_end_compares_all(
    rig_on_both: Rig, letta: FakeLetta, last_word: str
) -> None:
    """After a restart in the middle of a run the verdict is on all that is stored, not on what came since (I5)."""
    run = letta.new_run(letta.new_conversation())
    run.say("You get ")
    first = asyncio.create_task(rig_on_both.follow(run))
    await rig_on_both.until_stored(run, 2)
    first.cancel()
    await asyncio.wait([first])
    run.say("your refund.")
    run.complete()
    run._parts[-1].deltas[-1] = last_word
    await rig_on_both.follow(run)
    assert (await verdict(rig_on_both, run))[0] == ("agrees" if last_word == "your refund." else "differs")


async def test_where_the_server_keeps_nothing_the_stream_stands_in(rig_on_both: Rig, letta: FakeLetta) -> None:
    """Of a cancelled run the server keeps no message: what it streamed can be read all the same (I5)."""
    run = cancelled(letta, letta.new_conversation())
    await rig_on_both.follow(run)
    assert await verdict(rig_on_both, run) == ("unmatched", None, "complete")
    said = await rig_on_both.query("SELECT speaker, text, source, completeness FROM transcript")
    assert said == [("agent", "Wait, let me", "stream", "complete")]


async def test_messages_that_cannot_be_had(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A server that fails for this run's messages for good leaves the run complete, unmatched, and says why (I5)."""
    run = completed(letta, letta.new_conversation())
    broken = Answer(on="messages", run_id=run.id, times=None, status=500)
    letta.faults.append(broken)
    await rig_on_both.follow(run)
    assert broken.fired
    assert await verdict(rig_on_both, run) == ("unmatched", None, "complete")
    assert "does not give the run's record and messages" in (await rig_on_both.row(run))["error"]
    said = await rig_on_both.query("SELECT text FROM transcript ORDER BY position")
    assert [text for (text,) in said] == ["hmm", 'look({"order": 7})', "paid twice", "You get your refund."]


async def test_a_trimmed_run_has_its_messages_only(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A run whose head was trimmed is not compared: its messages are there, its gap is told (I5)."""
    run = completed(letta, letta.new_conversation())
    run.trim(3)
    await rig_on_both.follow(run)
    assert await verdict(rig_on_both, run) == (None, None, "messages only")
    assert await rig_on_both.query("SELECT missing FROM run_report") == [("1-2 (not served)",)]
    assert await rig_on_both.query("SELECT COUNT(*) FROM transcript WHERE source = 'server'") == [(5,)]


async def test_what_is_left_of_a_trimmed_cancelled_run(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A run with a gap and no messages is partial: what is stored of it can be read, and is called partial (I5)."""
    run = cancelled(letta, letta.new_conversation())
    run.trim(3)
    await rig_on_both.follow(run)
    assert await verdict(rig_on_both, run) == (None, None, "partial")
    said = await rig_on_both.query("SELECT text, source, completeness FROM transcript")
    assert said == [("let me", "stream", "partial")]


async def test_a_run_of_which_nothing_is_left(rig_on_both: Rig, letta: FakeLetta) -> None:
    """An expired run without messages is reported with nothing, and a live one as being followed (I5)."""
    gone = cancelled(letta, letta.new_conversation())
    gone.created_at -= letta.retention
    alive = letta.new_run(letta.new_conversation())
    await rig_on_both.follow(gone)
    assert await verdict(rig_on_both, gone) == (None, None, "nothing")
    assert await verdict(rig_on_both, alive) == (None, None, "following")


async def ask(rig: Rig, number: int, conversation: str) -> list[tuple[Any, ...]]:
    """The answer to the documented question of this number, about this conversation."""
    return await rig.query(QUERIES[number - 1].replace("conv-1", conversation))


@pytest.fixture
async def office(rig_on_both: Rig, letta: FakeLetta) -> str:
    """A conversation of three runs, one of them cancelled and one trimmed; returns its id."""
    conversation = letta.new_conversation()
    first, second, third = (
        completed(letta, conversation),
        cancelled(letta, conversation),
        completed(letta, conversation),
    )
    third.trim(3)
    other = completed(letta, letta.new_conversation())
    for run in (first, second, third, other):
        await rig_on_both.follow(run)
    return conversation


async def test_question_1_what_was_said(rig_on_both: Rig, office: str) -> None:
    """The first documented query gives the conversation in its order, with the source and completeness of each line."""
    whole = [
        ("user", "refund me"),
        ("agent", "hmm"),
        ("agent", 'look({"order": 7})'),
        ("tool", "paid twice"),
        ("agent", "You get your refund."),
    ]
    answers = await ask(rig_on_both, 1, office)
    assert [(who, what, source, is_all) for _, who, _, what, source, is_all in answers] == [
        *((who, what, "server", "complete") for who, what in whole),
        ("agent", "Wait, let me", "stream", "complete"),
        *((who, what, "server", "messages only") for who, what in whole),
    ]
    assert all(said_at is not None for said_at, *_ in answers)


async def test_question_2_what_is_missing(rig_on_both: Rig, office: str) -> None:
    """The second documented query lists the one run with a gap, and its gap."""
    answers = await ask(rig_on_both, 2, office)
    assert [(row[1], row[3], row[4], row[5]) for row in answers] == [
        (office, "completed", "messages only", "1-2 (not served)")
    ]


async def test_question_3_who_said_this(rig_on_both: Rig, office: str) -> None:
    """The third documented query finds a word wherever it was said, with who said it."""
    answers = await ask(rig_on_both, 3, office)
    assert sorted((who, what) for *_, who, what in answers) == [
        *[("agent", "You get your refund.")] * 3,
        *[("user", "refund me")] * 3,
    ]


async def test_question_4_how_runs_end(rig_on_both: Rig, office: str) -> None:
    """The fourth documented query counts runs and chunks by day and by ending."""
    answers = await ask(rig_on_both, 4, office)
    counts = {(status, stop, is_all): (runs, int(chunks)) for _, status, stop, is_all, runs, chunks in answers}
    assert counts == {
        ("completed", "end_turn", "complete"): (2, 16),
        ("completed", "end_turn", "messages only"): (1, 6),
        ("cancelled", "cancelled", "complete"): (1, 4),
    }


async def test_question_5_how_fast_runs_are(rig_on_both: Rig, office: str) -> None:
    """The fifth documented query gives each run's first and last chunk, and how many there were."""
    answers = await ask(rig_on_both, 5, office)
    assert sorted(chunks for *_, chunks in answers) == [2, 3, 4, 4]
    assert all(str(first) <= str(last) for *_, first, last, _ in answers)
