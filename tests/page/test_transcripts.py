"""A conversation is read a page at a time: every run and every message once, in order, with its verdict, bounded."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import pytest

from tests.support.pages import Seen, page_of, talk
from tests.support.rig import SECRET, working
from worker.demo.fake_letta import FakeLetta
from worker.storage import transcripts
from worker.storage.reads import Reads
from worker.storage.transcripts import Transcripts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.rig import Rig
    from worker.storage.transcripts import TranscriptPage

VIEW = """SELECT run_id, position, text, completeness FROM transcript WHERE conversation_id = :conversation
ORDER BY run_created_at, run_id, position"""


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server that asks for a key."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as server:
        yield server


async def pages_of(rig: Rig, conversation: str) -> list[TranscriptPage]:
    """All pages of a conversation, each from where the one before ended."""
    reader = Transcripts(Reads(rig.engine, is_patient=False))
    pages = [await reader.page(conversation)]
    while pages[-1].next is not None:
        pages.append(await reader.page(conversation, pages[-1].next))
        assert len(pages) < 50, "it goes round in circles"
    return pages


@pytest.mark.parametrize(("runs", "messages"), [(20, 100), (2, 100), (20, 1), (3, 2), (1, 3)])
async def test_pages_are_the_whole(
    letta: FakeLetta, database_url: str, monkeypatch: pytest.MonkeyPatch, runs: int, messages: int
) -> None:
    """However the pages fall, together they are the view `transcript`, with each run's verdict; and nobody else's."""
    monkeypatch.setattr(transcripts, "RUNS_A_PAGE", runs)
    monkeypatch.setattr(transcripts, "MESSAGES_A_PAGE", messages)
    conversation = letta.new_conversation()
    at = dt.datetime.now(dt.UTC).replace(microsecond=0)
    made = [letta.new_run(conversation, created_at=at - dt.timedelta(seconds=9 - number // 2)) for number in range(5)]
    for number, run in enumerate(made):
        run.think(f"thought {number}")
        talk(run, f"words {number}")
    empty = letta.new_run(conversation)
    talk(letta.new_run(letta.new_conversation()), "somebody else's")
    async with working(letta, database_url) as rig:
        await rig.sweep()
        for run in made:
            await rig.follow(run)
        pages = await pages_of(rig, conversation)
        view = await rig.query(VIEW, conversation=conversation)

    told = {run.run_id: run for page in pages for run in page.runs}
    said = [(m.run_id, m.position, m.text, told[m.run_id].completeness) for page in pages for m in page.messages]
    assert said == view
    assert len(said) >= 10
    assert {run_id: run.completeness for run_id, run in told.items()} == {
        **{run.id: "complete" for run in made},
        empty.id: "following",
    }
    assert list(told)[-1] == empty.id
    for page in pages:
        assert len(page.runs) <= runs
        assert len(page.messages) <= messages
        assert {message.run_id for message in page.messages} <= {run.run_id for run in page.runs}


async def test_long_text_is_cut(letta: FakeLetta, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: of a message without end a page reads and shows so much, and says how much more there is."""
    monkeypatch.setattr(transcripts, "TEXT_CHARS", 7)
    run = letta.new_run(letta.new_conversation())
    talk(run, "éé<x>éé and so on")
    async with working(letta, database_url) as rig, page_of(rig) as (client, _):
        await rig.follow(run)
        seen = Seen((await client.get(f"/conversations/{run.conversation_id}")).text)
    assert "éé<x>éé" in seen.texts
    assert "and so on" not in seen.text
    assert "10 characters more: read them in the view transcript." in seen.texts


async def test_agents_own_conversation(letta: FakeLetta, database_url: str) -> None:
    """A conversation without an id is opened by its agent's, as the configuration names it, and is only that one."""
    own = letta.new_run(None)
    other = letta.new_run(letta.new_conversation(own.agent_id))
    assert own.agent_id == other.agent_id
    talk(own, "said directly")
    talk(other, "said in a conversation")
    async with working(letta, database_url) as rig:
        await rig.follow(own)
        await rig.follow(other)
        (page,) = await pages_of(rig, own.agent_id)
    assert [run.run_id for run in page.runs] == [own.id]
    assert {message.text for message in page.messages} == {"hi", "said directly"}


async def test_what_is_missing_is_said(letta: FakeLetta, database_url: str) -> None:
    """I5: a run whose beginning the server has lost is no complete one to a reader either."""
    run = letta.new_run(letta.new_conversation())
    for word in ("one", "two", "three"):
        run.say(word)
    run.complete()
    run.trim(3)
    async with working(letta, database_url) as rig, page_of(rig) as (client, _):
        await rig.follow(run)
        seen = Seen((await client.get(f"/conversations/{run.conversation_id}")).text)
        ((completeness, missing),) = await rig.query("SELECT completeness, missing FROM run_report")
    assert completeness == "messages only"
    assert {completeness, f"missing: {missing}"} <= set(seen.texts)
    assert "onetwothree" in seen.text
